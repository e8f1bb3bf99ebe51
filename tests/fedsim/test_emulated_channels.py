"""RoFL, TAPFed and PPFL as ideal functionalities: what they let through, and what they do not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import reconstructions
from fedsim.errors import RunFailed, ScenarioError
from fedsim.registry import build
from strategies.channels.emulated_tapfed import EmulatedTapfed, NotReleased
from tests.fedsim.small import Ran, federated, meddling, plug_in, told, watching

FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
ALL = ["emulated-rofl(l2=100.0)", "emulated-tapfed", "emulated-ppfl"]


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


def behind(folder: Path, channel: str, changes: dict[str, Any] | None = None) -> Ran:
    return federated(folder, {"attack": "watching", "channel": channel, **(changes or {})})


@pytest.mark.parametrize("channel", ALL)
@pytest.mark.parametrize("local", ["fedsgd(batch_size=2, lr=0.1)", FEDAVG])
def test_what_is_released_is_the_trusted_sum(channel: str, local: str, tmp_path: Path) -> None:
    """Over two rounds: the second model sent is what the first sum made of the first."""
    common = {"federation.local": local, "federation.rounds": 2}
    ran = behind(tmp_path / "ran", channel, common)
    ideal = behind(tmp_path / "ideal", "trusted-sum", common)
    assert ran.failures == []
    assert ran.federation["accuracy"] == ideal.federation["accuracy"]
    assert ran.federation["channel"]["emulated"]
    for mine, theirs in zip(ran.views, ideal.views, strict=True):
        assert mine.senders == theirs.senders == (0, 1, 2, 3)
        assert mine.received
        for name, got in mine.received.items():
            assert torch.equal(got, theirs.received[name])


@pytest.mark.parametrize("channel", ALL)
def test_a_single_client_has_nothing_to_hide_in(channel: str) -> None:
    with pytest.raises(ValueError, match="at least 2 clients"):
        build("channel", channel, "channel").check(1, 8)


# -- RoFL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "weights"])
@pytest.mark.parametrize("bound", ["l2", "linf"])
def test_uploads_over_a_bound_are_turned_away(bound: str, kind: str, tmp_path: Path) -> None:
    local = {"federation.local": FEDAVG if kind == "weights" else "fedsgd(batch_size=2, lr=0.1)"}
    plain = behind(tmp_path / "plain", "plain", local)
    norms = []
    for view in plain.views:
        start = view.sent if kind == "weights" else {}
        update = torch.cat(
            [
                (t.double() - start.get(n, torch.tensor(0))).flatten()
                for n, t in view.received.items()
            ]
        )
        norms.append(float(update.norm() if bound == "l2" else update.abs().max()))
    middle = sum(sorted(norms)[1:3]) / 2
    ran = behind(tmp_path / "ran", f"emulated-rofl({bound}={middle!r})", local)
    within = tuple(client for client, norm in enumerate(norms) if norm <= middle)
    assert len(within) == 2
    assert [view.senders for view in ran.views] == [within]
    assert {c for _, c, _ in ran.failures} == set(range(4)) - set(within)
    assert all(f"over the {'L2' if bound == 'l2' else 'L-infinity'} bound" in f[2]
               for f in ran.failures)  # fmt: skip
    figures = ran.federation["channel"]
    assert figures["rejected"] == 2
    assert figures[f"largest_{bound}"] == pytest.approx(max(norms))


def test_what_is_clipped_to_the_bound_is_within_it(tmp_path: Path) -> None:
    ran = behind(tmp_path, "emulated-rofl(l2=0.01)", {"defenses": "clip(norm=0.01)"})
    assert ran.failures == []
    assert ran.federation["channel"]["largest_l2"] == pytest.approx(0.01, rel=1e-5)
    with pytest.raises(RunFailed, match="over the L2 bound"):
        behind(tmp_path, "emulated-rofl(l2=0.009)", {"defenses": "clip(norm=0.01)"})


def test_bounds_that_bind_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match=r"write l2=1\.0"):
        build("channel", "emulated-rofl", "channel").check(4, 8)


# -- TAPFed ----------------------------------------------------------------------------------------

FAIR = {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0}
ONE_HOT = {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}
REQUESTS: dict[str, tuple[list[dict[int, float]], str | None]] = {
    "all agree": ([FAIR] * 5, None),
    "enough agree": ([FAIR] * 3 + [ONE_HOT] * 2, None),
    "too few agree": ([FAIR] * 2 + [{**FAIR, 0: 3.0}] * 2 + [ONE_HOT], "2 of 5 aggregators agree"),
    "one-hot weights": ([ONE_HOT] * 5, "the weights are of 1 clients, 3 must be"),
    "two clients' weights": ([{**ONE_HOT, 1: 1.0}] * 5, "the weights are of 2 clients"),
    "nearly one-hot weights": ([{**FAIR, 0: 1e6}] * 5, "one client has 1 of all weight"),
    "one taken off": ([{**FAIR, 0: -2.0}] * 5, "negative"),
    "no number": ([{**FAIR, 0: float("nan")}] * 5, "agree|no number"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_what_aggregators_get_is_what_enough_may_have(case: str) -> None:
    requests, refusal = REQUESTS[case]
    if refusal is None:
        assert EmulatedTapfed().released(requests) == FAIR
        return
    with pytest.raises(NotReleased, match=refusal):
        EmulatedTapfed().released(requests)


@pytest.mark.parametrize(("dishonest", "gets"), [(0, True), (2, True), (3, False), (5, False)])
def test_dishonest_aggregators_get_no_upload(dishonest: int, gets: bool, tmp_path: Path) -> None:
    channel = f"emulated-tapfed(dishonest={dishonest})"
    if gets:
        assert [view.senders for view in behind(tmp_path, channel).views] == [(0, 1, 2, 3)]
        return
    with pytest.raises(RunFailed, match="TAPFed released nothing: the weights are of 1 clients"):
        behind(tmp_path, channel)


@pytest.mark.parametrize(
    ("channel", "why"),
    [
        ("emulated-tapfed(min_cohort=5)", "nothing would be released"),
        ("emulated-tapfed(threshold=2)", "more than half, 3 to 5"),
        ("emulated-tapfed(threshold=6)", "more than half, 3 to 5"),
        ("emulated-tapfed(dishonest=6)", "of 5 aggregators 6 are dishonest"),
    ],
)
def test_aggregators_that_cannot_be_are_refused(channel: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        build("channel", channel, "channel").check(4, 8)


# -- PPFL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "hidden"),
    [
        ("start=0, end=0", {"1.weight", "1.bias"}),
        ("start=1, end=2", {"3.weight", "3.bias", "5.weight", "5.bias"}),
        ("start=1, end=-1", {"3.weight", "3.bias", "5.weight", "5.bias"}),
    ],
)
@pytest.mark.parametrize("local", ["fedsgd(batch_size=2, lr=0.1)", FEDAVG])
def test_layers_inside_are_in_no_view(
    span: str, hidden: set[str], local: str, tmp_path: Path
) -> None:
    changes = {"model.name": "mlp(hidden=[8, 8])", "federation.local": local}
    ran = behind(tmp_path, f"emulated-ppfl({span})", {**changes, "federation.rounds": 2})
    assert len(ran.views) == 2
    for view in ran.views:
        assert view.received.keys() == view.sent.keys() - hidden
        assert all(not view.sent[name].any() for name in hidden)
        assert all(view.sent[name].any() for name in view.received if name.endswith("weight"))
    assert ran.federation["channel"]["hidden"] == ", ".join(sorted(hidden, key=_place))


def _place(name: str) -> tuple[str, bool]:
    return name.partition(".")[0], name.endswith("bias")


def test_an_attack_on_a_hidden_layer_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear inversion reads the first layer: behind ppfl there is none to divide."""

    def look(views: Any, knowledge: Any) -> Any:
        return [
            views[0].received.get("1.weight"),
            knowledge.model(views[0])[1].weight.abs().sum().item(),
        ]

    plug_in(monkeypatch, "attack", "watching", watching(look))
    assert told(behind(tmp_path / "look", "emulated-ppfl")) == [None, 0.0]
    common = {"federation.local": "fedsgd(batch_size=1, lr=0.1)", "attack": "linear-inversion"}
    ran = behind(tmp_path / "ran", "emulated-ppfl", common)
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    assert len(reconstructions.load(path)[0].examples) == 0


@pytest.mark.parametrize(
    ("channel", "attack", "why"),
    [
        ("emulated-ppfl(start=4, end=5)", "watching", "none of 2: 1, 3"),
        ("emulated-ppfl(end=-1)", "watching", "leave one outside"),
        ("emulated-ppfl", "meddling", "needs another channel"),
        ("emulated-ppfl", "secagg-unmasking", "needs another channel"),
    ],
)
def test_what_no_enclave_holds_is_refused(
    channel: str, attack: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "meddling", meddling(lambda arrays, knowledge: None))
    with pytest.raises(ScenarioError, match=why):
        behind(tmp_path, channel, {"attack": attack})
