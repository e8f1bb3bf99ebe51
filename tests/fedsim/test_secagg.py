"""Behind secure aggregation the server gets one sum, exact to the quantization, and no upload."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server.workflow.secure_aggregation import secaggplus_workflow
from torch import Tensor

from fedsim.audit.aggregate import aggregation_cost
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.registry import build
from strategies.channels.secagg import SecAgg
from tests.fedsim.small import Ran, federated, meddling, plug_in, scenario, watching

FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
SKEWED = {"data.partition": "dirichlet(alpha=1.0, min_partition_size=5)"}


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


def summed(folder: Path, changes: dict[str, Any]) -> Ran:
    return federated(folder, {"attack": "watching", **changes})


def uploads(ran: Ran, name: str) -> tuple[Tensor, Tensor]:
    """Return every client's upload as it was sent, ``[C, ...]``, and its weight, ``[C]``."""
    records = list(ran.vault)
    sent = [record.upload[name].double() for record in records if record.upload]
    return torch.stack(sent), torch.tensor([float(len(r.labels)) for r in records]).double()


KINDS: dict[str, dict[str, Any]] = {
    "gradients": {"channel": "secagg(max_weight=2)"},
    "gradients of few examples": {"channel": "secagg"},
    "weights": {"channel": "secagg(max_weight=1000)", "federation.local": FEDAVG},
    "unequal weights": {"channel": "secagg(max_weight=1000)", "federation.local": FEDAVG, **SKEWED},
    "coarse": {"channel": "secagg(max_weight=2, quantization_range=4096)"},
    "few shares": {"channel": "secagg(max_weight=2, num_shares=0.5)", "federation.clients": 7},
    "two clients": {"channel": "secagg(max_weight=2)", "federation.clients": 2},
    "double precision": {"channel": "secagg(max_weight=2)", "federation.precision": "float64"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_weighted_mean_to_the_quantization(kind: str, tmp_path: Path) -> None:
    ran = summed(tmp_path, KINDS[kind])
    (view,) = ran.views
    clients = ran.parts.scenario.federation.clients
    assert view.senders == tuple(range(clients))
    assert view.metrics == {}
    told = ran.federation["channel"]
    for name, found in view.received.items():
        sent, weights = uploads(ran, name)
        assert view.num_examples == int(weights.sum())
        shares = weights / weights.sum()
        mean = torch.tensordot(shares, sent, dims=1)
        # Each client rounds weight/max_weight times its value by less than a step; float32 besides.
        total = weights.sum() / told["max_weight"]
        bound = clients * told["quantization_step"] / total + 1e-6
        assert found.shape == sent.shape[1:]
        assert (found.double() - mean).abs().max() <= bound


def test_a_long_run_behind_it_learns_as_one_in_the_clear(tmp_path: Path) -> None:
    changes = {"attack": "none", "federation.local": FEDAVG, "federation.rounds": 8}
    clear = federated(tmp_path, changes)
    behind = federated(tmp_path, {**changes, "channel": "secagg"})
    found, expected = (ran.federation["accuracy"]["after"] for ran in (behind, clear))
    assert expected > 0.5
    assert found == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("strategy", [
    "fedadam(eta=0.01)", "fedprox(proximal_mu=0.1)", "fedavgm(server_momentum=0.9)",
])  # fmt: skip
def test_any_averaging_strategy_can_sit_behind_it(strategy: str, tmp_path: Path) -> None:
    changes = {"federation.strategy": strategy, "federation.local": FEDAVG, "channel": "secagg"}
    ran = summed(tmp_path, {**changes, "federation.rounds": 2})
    assert [view.round for view in ran.views] == [1, 2]
    assert ran.failures == []


def test_batchnorm_statistics_are_summed_where_they_are_shared(tmp_path: Path) -> None:
    for policy, shared in (("shared", True), ("frozen", False)):
        changes = {
            "model.name": "resnet20(width=4)",
            "model.batchnorm": policy,
            "federation.local": "fedsgd(batch_size=4)",
            "channel": "secagg(max_weight=4)",
        }
        (view,) = summed(tmp_path, changes).views
        assert ("norm1.running_mean" in view.received) == shared
        if shared:
            mean = torch.stack([r.upload["norm1.running_mean"] for r in summed(
                tmp_path, changes).vault if r.upload]).mean(dim=0)  # fmt: skip
            assert torch.allclose(view.received["norm1.running_mean"].float(), mean, atol=1e-4)


def test_a_manipulator_behind_it_gets_one_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "meddling", meddling(lambda arrays, knowledge: None))
    ran = federated(tmp_path, {"attack": "meddling", "channel": "secagg(max_weight=2)"})
    assert [view.label for view in ran.views] == ["round-1-aggregate-of-4"]


def test_what_one_client_sends_says_nothing_of_its_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked uploads are uniform over the modulus, and differ from each other in every entry."""
    masked: list[np.ndarray[Any, Any]] = []
    honest = secaggplus_workflow.bytes_to_ndarray

    def peep(content: bytes) -> Any:
        array = honest(content)
        masked.append(array)
        return array

    monkeypatch.setattr(secaggplus_workflow, "bytes_to_ndarray", peep)
    ran = summed(tmp_path, {"channel": "secagg(max_weight=2)", "federation.clients": 3})
    layers = [array for array in masked if array.shape == (8, 64)]
    assert len(layers) == 3
    sent, _ = uploads(ran, "1.weight")
    for layer, upload in zip(layers, sent, strict=True):
        share = layer.astype(np.float64) / 2**32
        assert 0 <= share.min() < 0.02 < 0.98 < share.max() < 1
        assert abs(share.mean() - 0.5) < 0.06
        assert abs(np.corrcoef(share.ravel(), upload.numpy().ravel())[0, 1]) < 0.2
    assert (layers[0] != layers[1]).mean() > 0.99


@pytest.mark.parametrize("clients", [2, 4])
def test_any_all_but_one_masked_uploads_reveal_nothing(
    clients: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any n - 1 of n and fewer, added or subtracted, are uniform over the modulus.

    64 bins, chi-square.  What such a test finds is the quantized upload itself, all of it in two
    bins, and one mask that all clients share: it falls out of differences.
    """
    masked: list[np.ndarray[Any, Any]] = []
    honest = secaggplus_workflow.bytes_to_ndarray

    def peep(content: bytes) -> Any:
        masked.append(honest(content))
        return masked[-1]

    monkeypatch.setattr(secaggplus_workflow, "bytes_to_ndarray", peep)
    changes = {"federation.clients": clients, "model.name": "mlp(hidden=[128])"}
    ran = summed(tmp_path, {"channel": "secagg(max_weight=2)", **changes})
    layers = [array.astype(np.int64) for array in masked if array.shape == (128, 64)]
    assert len(layers) == clients
    found = [chi_square(layer) for layer in combined(layers)]
    assert 15 < min(found) < max(found) < 125  # 63 degrees of freedom: 63 ± 5.5 std
    sent, _ = uploads(ran, "1.weight")
    steps = [np.rint((one.numpy() + 8) / 16 * 2**22).astype(np.int64) for one in sent]
    assert chi_square(steps[0]) > 100_000
    if clients > 2:
        common = [(step + layers[0]) % 2**32 for step in steps]
        sums = [chi_square(np.sum(np.delete(common, at, axis=0), axis=0)) for at in range(clients)]
        assert max(sums) < 125  # that sums are uniform says nothing of it
        assert max(map(chi_square, combined(common))) > 100_000


def combined(layers: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Return any n - 1 of n and fewer, each of them added, subtracted or left out."""
    signs = product((0, 1, -1), repeat=len(layers))
    partial = [some for some in signs if 0 in some and sum(np.abs(some)) > 0]
    return [np.tensordot(some, layers, axes=1) for some in partial]


def chi_square(values: np.ndarray[Any, Any], bins: int = 64) -> float:
    """Return the chi-square statistic of values modulo 2^32 against the uniform distribution."""
    shares = (values % 2**32).ravel().astype(np.float64) / 2**32
    counts, _ = np.histogram(shares, bins=bins, range=(0, 1))
    expected = shares.size / bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "kind", ["gradients", "coarse", "two clients", "gradients of few examples"]
)
def test_the_price_of_rounding_and_clipping_is_told(kind: str, tmp_path: Path) -> None:
    """Stochastic rounding of n clients: std step * sqrt(n / 6) over the total weight, at most."""
    ran = summed(tmp_path, {**KINDS[kind], "model.name": "mlp(hidden=[64])"})
    told = ran.federation["channel"]
    cost = aggregation_cost(ran.folder.path, told)
    clients = ran.parts.scenario.federation.clients
    total = 2 * clients / told["max_weight"]
    expected = told["quantization_step"] * (clients / 6) ** 0.5 / total
    # Where a value is a small part of a step it is rounded to none of it, mostly: less error.
    assert 0.2 * expected < cost["error_std"] < 1.05 * expected
    assert cost["clipped_share"] == 0
    tight = summed(tmp_path / "tight", {"channel": "secagg(max_weight=2, clipping_range=0.01)"})
    clipped = aggregation_cost(tight.folder.path, tight.federation["channel"])
    everything = torch.cat([
        t.flatten() for record in tight.vault if record.upload for t in record.upload.values()
    ])  # fmt: skip
    share = float((everything.abs() > 0.01).double().mean())
    assert clipped["clipped_share"] == pytest.approx(share) != 0
    assert clipped["error_std"] < 1e-6 < clipped["largest_error"]


def test_keys_and_masks_are_new_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    honest = SecAgg.client

    def client(self: SecAgg, *args: Any) -> Any:
        reply = honest(self, *args)
        told = reply.content.config_records[RECORD_KEY_CONFIGS]
        seen.extend(told[key] for key in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2) if key in told)
        return reply

    monkeypatch.setattr(SecAgg, "client", client)
    summed(tmp_path, {"channel": "secagg(max_weight=2)", "federation.rounds": 2})
    assert len(seen) == len(set(seen)) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("channel", "clients", "fits"),
    [
        ("secagg", 1023, True),
        ("secagg", 1024, False),
        ("secagg", 2, True),
        ("secagg", 1, False),
        ("secagg(quantization_range=65536)", 65_535, True),
        ("secagg(quantization_range=65536)", 65_536, False),
    ],
)
def test_a_cohort_must_hide_its_members_and_not_overflow(
    channel: str, clients: int, fits: bool
) -> None:
    built: SecAgg = build("channel", channel, "channel")
    if fits:
        return built.check(clients, 2)
    with pytest.raises(ValueError, match=r"nothing to hide in|would overflow"):
        built.check(clients, 2)


WEIGHTS: dict[str, tuple[str, str, int]] = {
    # partition of the digits among 4 clients, local rule, the largest weight any client reports
    "a batch": ("iid", "fedsgd(batch_size=16, lr=0.1)", 16),
    "a batch larger than some partitions": ("iid", "fedsgd(batch_size=361, lr=0.1)", 361),
    "a partition": ("iid", "fedavg(epochs=3, batch_size=32, lr=0.1)", 361),
    "unequal partitions": (SKEWED["data.partition"], FEDAVG, 0),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_largest_client_must_weigh_no_more_than_max_weight(case: str, tmp_path: Path) -> None:
    """The bound that is checked beforehand is the largest weight that the run then reports."""
    partition, local, expected = WEIGHTS[case]
    common = {"data.partition": partition, "federation.local": local}
    clear = [view.num_examples or 0 for view in summed(tmp_path, common).views]
    largest = max(clear)
    assert largest == expected or (not expected and largest > min(clear))
    for max_weight in (largest, largest - 1):
        changes = {**common, "channel": f"secagg(max_weight={max_weight})"}
        if max_weight == largest:
            assert summed(tmp_path, changes).failures == []
            continue
        with pytest.raises(ScenarioError, match=f"let max_weight be at least {largest}$"):
            check(Parts(scenario(tmp_path, changes)))


def test_weights_that_are_taken_are_kept_to_a_twentieth_of_a_percent(tmp_path: Path) -> None:
    """At the largest max_weight for the lightest of ten unequal clients the mean is true still."""
    common = {"federation.local": FEDAVG, **SKEWED, "federation.clients": 10}
    lightest = min(map(len, Parts(scenario(tmp_path, common)).partitions))
    most = lightest * 2**22 / 1000
    refused = {**common, "channel": f"secagg(max_weight={1.001 * most!r}, clipping_range=0.1)"}
    with pytest.raises(ScenarioError, match=rf"on {lightest} examples would weigh 999 steps"):
        check(Parts(scenario(tmp_path, refused)))
    ran = summed(
        tmp_path, {**common, "channel": f"secagg(max_weight={most!r}, clipping_range=0.1)"}
    )
    (view,) = ran.views
    for name, found in view.received.items():
        sent, weights = uploads(ran, name)
        mean = torch.tensordot(weights / weights.sum(), sent, dims=1)
        rounded = 10 * ran.federation["channel"]["quantization_step"] * most / weights.sum()
        bound = 5e-4 * (sent - mean).abs().max() + rounded + 1e-6
        assert (found.double() - mean).abs().max() <= bound


def test_its_cohort_is_those_who_train_not_those_who_are_there(tmp_path: Path) -> None:
    check(Parts(scenario(tmp_path, {"channel": "secagg", "federation.fraction": 0.5})))
    with pytest.raises(ValueError, match="a cohort of 1"):
        check(Parts(scenario(tmp_path, {"channel": "secagg", "federation.fraction": 0.25})))
