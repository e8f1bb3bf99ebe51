"""A server that names clients as living and as dropped gets their uploads, and nobody notices."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import client_app
from fedsim.engines.inline import run_inline
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.reattack import attack_again
from fedsim.scenario import Scenario
from fedsim.view import ServerView
from strategies.attacks.protocol.secagg_unmasking import SecAggUnmasking, Unmasking
from tests.fedsim.small import Ran, federated, plug_in, scenario, watching

ONE = "secagg-unmasking(victims=[0])"
ALL = "secagg-unmasking"
FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
SKEWED = {"data.partition": "dirichlet(alpha=1.0, min_partition_size=5)"}
PLAIN = {"channel": "secagg(max_weight=2)"}


def unmasked(ran: Ran) -> dict[tuple[int, int], ServerView]:
    """Return the views of single clients, by client and round."""
    return {(v.senders[0], v.round): v for v in ran.views if len(v.senders) == 1}


def sums(ran: Ran) -> list[ServerView]:
    return [view for view in ran.views if len(view.senders) > 1]


KINDS: dict[str, dict[str, Any]] = {
    "gradients": PLAIN,
    "gradients of few examples": {"channel": "secagg"},
    "unequal weights": {"channel": "secagg", "federation.local": FEDAVG, **SKEWED},
    "coarse": {"channel": "secagg(max_weight=2, quantization_range=4096)"},
    "few shares": {"channel": "secagg(max_weight=2, num_shares=0.5)", "federation.clients": 7},
    "two clients": {**PLAIN, "federation.clients": 2},
    "double precision": {**PLAIN, "federation.precision": "float64"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_the_upload_to_the_quantization(kind: str, tmp_path: Path) -> None:
    ran = federated(tmp_path, {"attack": ALL, **KINDS[kind]})
    told, found = ran.federation["channel"], unmasked(ran)
    assert ran.failures == []
    assert sorted(found) == [(c, 1) for c in range(ran.parts.scenario.federation.clients)]
    # Stochastic rounding moves a value by less than a step; single precision, which Flower
    # quantizes in, has the values near 8 to an eighth of a step of 2^-18.
    steps = 1.0 if ran.parts.dtype == torch.float64 else 1.125
    for (client, server_round), view in found.items():
        record = ran.vault.record(client, server_round)
        assert record is not None
        assert record.upload is not None
        assert view.num_examples == len(record.labels)
        step = told["quantization_step"] * told["max_weight"] / len(record.labels)
        for name, sent in record.upload.items():
            error = (view.received[name] - sent.double()).abs().max()
            assert view.received[name].shape == sent.shape
            assert float(error) <= steps * step * 1.000001, name


@pytest.mark.parametrize("attack", [
    ONE, ALL, "secagg-unmasking(victims=[0], lists='split')", "secagg-unmasking(lists='split')",
    "secagg-unmasking(victims=[1, 3])",
])  # fmt: skip
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_the_sum_is_bit_for_bit_what_an_honest_server_gets(
    attack: str, threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many victims: 1, 2 or all; with threshold 3 of 4 a split lowers what it tells."""
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))
    common = {"channel": f"secagg(max_weight=2, threshold={threshold})", "federation.rounds": 2}
    honest = federated(tmp_path / "honest", {"attack": "watching", **common})
    ran = federated(tmp_path / "attacked", {"attack": attack, **common})
    assert len(sums(ran)) == len(honest.views) == 2
    for mine, theirs in zip(sums(ran), honest.views, strict=True):
        assert mine.num_examples == theirs.num_examples
        for name, array in mine.received.items():
            assert torch.equal(array, theirs.received[name])
    victims = ran.parts.attack.victims or range(4)  # type: ignore[union-attr]
    assert sorted(unmasked(ran)) == sorted((v, r) for v in victims for r in (1, 2))
    assert ran.federation["accuracy"] == honest.federation["accuracy"]
    told = [line for line in ran.federation["receipts"] if line.startswith("unmasked")]
    assert told == [f"unmasked {len(victims)} uploads in round {r}" for r in (1, 2)]


def test_split_lists_show_no_client_the_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists: list[tuple[list[int], list[int]]] = []
    honest = Unmasking._misnamed

    def misnamed(self: Unmasking, messages: Any) -> Any:
        sent = honest(self, messages)
        lists.extend((alive, dead) for alive, dead, _ in self.asked.values())
        return sent

    monkeypatch.setattr(Unmasking, "_misnamed", misnamed)
    ran = federated(tmp_path, {"attack": "secagg-unmasking(victims=[0], lists='split')", **PLAIN})
    assert list(unmasked(ran)) == [(0, 1)]
    assert lists
    assert all(not set(alive) & set(dead) for alive, dead in lists)
    assert sum(1 in dead for _, dead in lists) == 2


def test_one_share_too_few_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets come from shares alone: 2 of 4 would recover the victim's key, and 1 came."""
    everybody = Unmasking._for
    monkeypatch.setattr(Unmasking, "_for", lambda *args: everybody(*args)[:1])
    ran = federated(tmp_path, {"attack": ONE, **PLAIN})
    assert unmasked(ran) == {}
    assert [view.label for view in ran.views] == ["round-1-aggregate-of-4"]


@pytest.mark.parametrize("gone", [0, 2])
def test_who_really_drops_out_is_recovered_and_not_unmasked(
    gone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = client_app._respond

    def respond(msg: Any, context: Any, *args: Any, **rest: Any) -> Any:
        if context.node_config["client"] == gone:
            raise ZeroDivisionError("gone")
        return honest(msg, context, *args, **rest)

    monkeypatch.setattr(client_app, "_respond", respond)
    ran = federated(tmp_path, {"attack": ALL, **PLAIN})
    rest = [client for client in range(4) if client != gone]
    assert sorted(unmasked(ran)) == [(client, 1) for client in rest]
    (total,) = sums(ran)
    assert total.senders == tuple(rest)
    for name, array in total.received.items():
        own = torch.stack([view.received[name] for view in unmasked(ran).values()])
        assert torch.allclose(array, own.mean(dim=0), atol=1e-12)


def test_a_round_without_its_victim_leaves_the_sum(tmp_path: Path) -> None:
    """Of 8 clients 4 train: where client 0 is not among them, the passive attack gets the sum."""
    half = {"federation.clients": 8, "federation.fraction": 0.5, "federation.rounds": 4}
    ran = federated(tmp_path, {"attack": ONE, **PLAIN, **half})
    there = {view.round for view in sums(ran) if 0 in view.senders}
    assert {r for _, r in unmasked(ran)} == there
    assert 0 < len(there) < 4
    lied = [line for line in ran.federation["receipts"] if line.startswith("lied")]
    assert lied == [f"lied to 4/4 clients in round {r}" for r in sorted(there)]


def test_another_passive_attack_works_on_the_capture_and_needs_its_letter(tmp_path: Path) -> None:
    one = {"federation.local": "fedsgd(batch_size=1, lr=0.1)", "channel": "secagg(max_weight=1)"}
    ran = federated(tmp_path, {"attack": ONE, **one})
    with pytest.raises(ScenarioError, match=r"made with .*manipulation; the least threat model"):
        attack_again(ran.folder, "linear-inversion", {"threat-model": "A"}, "a test")
    into = attack_again(ran.folder, "linear-inversion", {}, "a test")
    assert list((into.path / "reconstructions").glob("*.safetensors"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"channel": "plain"}, "breaks the protocol of secagg; use channel = 'secagg'"),
    "nobody": ({"attack": "secagg-unmasking(victims=[1, 4])"}, "victim 4 is none of the 4"),
    "no victim": ({"attack": "secagg-unmasking(victims=[])"}, r"victims"),
    "active": (
        {"attack": "secagg-unmasking(then='robbing-the-fed')", "threat-model": "G"},
        "must be passive",
    ),
    "unknown": ({"attack": "secagg-unmasking(then='nothing')"}, "no attack has this name"),
    "eavesdropper": ({"threat-model": "E"}, "needs manipulation; the least threat model is F"),
    "unfit": ({"model.name": "convnet"}, "no fully connected layer"),
    "nothing to split": (
        {"attack": "secagg-unmasking(lists='split')", "channel": "secagg(threshold=1.0)"},
        "none is left to tell",
    ),
    "nothing to split in the cohort": (
        {
            "attack": "secagg-unmasking(lists='split')",
            "federation.clients": 8,
            "federation.fraction": 0.25,
        },
        "all 2 shares of a seed",
    ),
    "oracle": ({"attack": "secagg-unmasking(then='inverting-gradients(labels=\"oracle\")')"},
               "needs the oracle"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_client_trains(case: str, tmp_path: Path) -> None:
    changes, remedy = REFUSED[case]
    with pytest.raises(ScenarioError, match=remedy):
        check(Parts(scenario(tmp_path, {"attack": ONE, "channel": "secagg", **changes})))


def test_it_needs_what_its_passive_attack_needs() -> None:
    assert "surrogate" not in SecAggUnmasking().required
    assert {"updates", "manipulation"} == SecAggUnmasking().required
    assert "basics" in SecAggUnmasking(then="inverting-gradients").required
    assert "details" in SecAggUnmasking(then="inverting-gradients(simulate=True)").required


def test_the_report_says_that_the_channel_was_broken(tmp_path: Path) -> None:
    page = run_inline(
        Scenario.from_flat({**SecAggUnmasking.toy.scenario, "output.dir": str(tmp_path)}), "a test"
    )
    report = json.loads((page.parent / "report.json").read_text())
    assert report["threat_model"]["used"] == ["updates", "manipulation"]
    assert "This server broke its protocol and read single clients" in page.read_text()
    assert "unmasked 3 uploads in round 1" in page.read_text()
