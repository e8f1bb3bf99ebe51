"""Curious servers through a federation: what traps catch, behind convolutions, sums and steps.

R is counted by the auditor's matching of candidates to the vault; A and P by running the model that
was sent on it.  ``alone`` is what any reading could get: images that some row heard alone.
"""

from pathlib import Path
from statistics import mean

import pytest
import torch

from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from strategies.attacks.analytic.isolation.trap import firing_rate
from tests.fedsim.small import federated, scenario
from tests.strategies.isolation.trapped_federation import (
    Caught,
    cifar,
    needs_cifar,
    plug_in_cifar,
    rounds,
)

TILES = {
    "data.dataset": "photo-tiles",
    "model.name": "mlp(hidden=[128])",
    "federation.clients": 4,
    "federation.local": "fedsgd(batch_size=8, lr=0.1)",
}


def shares(seen: list[Caught]) -> tuple[float, float, float, float]:
    """Return A, P, R and the share of images that some row heard alone."""
    alone = mean(float(one.alone.double().mean()) for one in seen)
    return (
        mean(one.active for one in seen),
        mean(one.single for one in seen),
        mean(one.recall for one in seen),
        alone,
    )


# -- the paper's batches of 100 from CIFAR-10 ------------------------------------------------------
@pytest.mark.slow
@needs_cifar
@pytest.mark.parametrize(
    ("rows", "active", "single", "recall"),
    [
        ("scale=0.95", (0.65, 0.78), (0.36, 0.46), (0.42, 0.56)),
        ("scale=0.97", (0.98, 1.0), (0.0, 0.05), (0.09, 0.29)),
        ("rows='gaussian'", (0.8, 1.0), (0.0, 0.1), (0.13, 0.3)),
        ("rows='quantile'", (0.49, 0.6), (0.39, 0.49), (0.5, 0.64)),
    ],
)
def test_what_the_paper_counts(
    rows: str,
    active: tuple[float, float],
    single: tuple[float, float],
    recall: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in_cifar(monkeypatch)
    seen = rounds(
        tmp_path,
        f"curious-abandon-honesty({rows})",
        **{
            "data.dataset": "cifar",
            "model.name": "mlp(hidden=[1000])",
            "federation.clients": 10,
            "federation.local": "fedsgd(batch_size=100, lr=0.1)",
        },
    )
    a, p, r, alone = shares(seen)
    rate = mean(float(one.fired.double().mean()) for one in seen)
    print(f"{rows}: A {a:.3f} P {p:.3f} R {r:.3f}, alone {alone:.3f}, rate {rate:.4f}")
    assert active[0] <= a <= active[1]
    assert single[0] <= p <= single[1]
    assert recall[0] <= r <= recall[1]
    assert r >= alone - 0.02
    if rows.startswith("scale="):
        images = cifar().train.batch(torch.arange(5000), torch.float64)[0].flatten(1)
        law = float(firing_rate(images, float(rows.removeprefix("scale="))).mean())
        print(f"law of the rate {law:.4f}")
        assert rate == pytest.approx(law, rel=0.1)


# -- what comes back is what some row heard alone ------------------------------------------------
@pytest.mark.parametrize("model", ["mlp(hidden=[128])", "convnet(width=32, hidden=[128])"])
def test_whoever_is_alone_in_a_row_comes_back(model: str, tmp_path: Path) -> None:
    seen = rounds(tmp_path, "curious-abandon-honesty", **{**TILES, "model.name": model})
    *_, recall, alone = shares(seen)
    assert alone > 0.5
    assert recall == pytest.approx(alone, abs=0.04)


def test_a_sum_of_clients_is_one_large_batch(tmp_path: Path) -> None:
    channel = {"channel": "secagg(max_weight=8)"}
    (one,) = rounds(tmp_path, "curious-abandon-honesty(together=32)", **{**TILES, **channel})
    read = one.psnr >= 40
    assert one.alone.sum() >= 3
    assert (read & one.alone).sum() >= one.alone.sum() - 1
    assert read.double().mean() < 0.6


def test_without_surrogate_data_it_is_threat_model_f(tmp_path: Path) -> None:
    settings = {**TILES, "threat-model": "F"}
    with pytest.raises(ScenarioError, match="needs surrogate"):
        federated(tmp_path, {**settings, "attack": "curious-abandon-honesty"})
    seen = rounds(tmp_path, "curious-abandon-honesty(rows='quantile')", **settings)
    assert shares(seen)[2] > 0.5


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"model.name": "resnet20"}, "cannot be led through"),
        ({"model.name": "convnet"}, "needs a bias, a ReLU"),
        (
            {
                "model.name": "convnet(hidden=[16])",
                "federation.local": "fedavg(batch_size=8, lr=0.1)",
            },
            "the convolutions before the traps drift",
        ),
        ({"attack": "curious-abandon-honesty(rows='gaussian', scale=0.9)"}, "scale= is the traps'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_client_trains(
    changes: dict[str, str], because: str, tmp_path: Path
) -> None:
    settings = {**TILES, "threat-model": "G", "attack": "curious-abandon-honesty", **changes}
    with pytest.raises(ScenarioError, match=because):
        federated(tmp_path, settings)
    assert not list(tmp_path.iterdir())


# -- local steps -----------------------------------------------------------------------------------
def after_local_steps(folder: Path, batch: int, epochs: int = 1) -> tuple[float, float]:
    """Return the share read at 50 dB, and the share alone in the model as it was sent.

    35 or 36 images a client; float32 weights keep about 70 dB.
    """
    seen = rounds(
        folder,
        "curious-abandon-honesty(together=36)",
        **{
            **TILES,
            "federation.clients": 64,
            "federation.fraction": 0.0625,
            "federation.local": f"fedavg(batch_size={batch}, epochs={epochs}, lr=0.01)",
        },
    )
    read = mean(float((one.psnr >= 50).double().mean()) for one in seen)
    return read, shares(seen)[3]


def test_local_steps_lose_little_because_a_row_hears_few_images(tmp_path: Path) -> None:
    one_step, alone = after_local_steps(tmp_path / "1", batch=36)
    eight_steps, _ = after_local_steps(tmp_path / "8", batch=5)
    assert alone > 0.2
    assert one_step == pytest.approx(alone, abs=0.05)
    assert eight_steps >= one_step - 0.1


@pytest.mark.parametrize(
    ("channel", "gain", "refused"),
    [
        ("secagg", "", True),
        ("secagg", "gain=1e-3", False),
        ("ckks", "", False),
        ("trusted-sum", "", False),
    ],
)
def test_local_steps_are_refused_behind_what_rounds_and_not_behind_every_sum(
    channel: str, gain: str, refused: bool, tmp_path: Path
) -> None:
    attack = f"curious-abandon-honesty({gain})" if gain else "curious-abandon-honesty"
    changes = {**TILES, "threat-model": "G", "attack": attack, "channel": channel}
    parts = Parts(scenario(tmp_path, {**changes, "federation.local": "fedavg(batch_size=8)"}))
    if refused:
        with pytest.raises(ScenarioError, match="drowns in the rounding of secagg"):
            check(parts)
    else:
        check(parts)


def test_encrypted_sums_of_weights_read_as_clear_ones_do(tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    found = []
    for channel in ("trusted-sum", "ckks(coeff_modulus=[60, 60])"):
        (one,) = rounds(
            tmp_path / channel[:4],
            "curious-abandon-honesty(together=32)",
            **{
                **TILES,
                "federation.clients": 64,
                "federation.fraction": 0.0315,
                "federation.local": "fedavg(batch_size=36, lr=0.01)",
                "channel": channel,
            },
        )
        found.append(int((one.psnr >= 40).sum()))
    print(found)
    assert found[0] == found[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "epochs"), [(36, 1), (18, 1), (5, 1), (9, 8)])
def test_the_share_read_after_local_steps(batch: int, epochs: int, tmp_path: Path) -> None:
    read, alone = after_local_steps(tmp_path, batch, epochs)
    steps = epochs * -(-36 // batch)
    print(f"{steps} local steps: read {read:.3f}, alone before training {alone:.3f}")
    assert read >= alone - 0.1
