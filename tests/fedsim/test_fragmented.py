"""Fragmented learning: uploads of two clients mixed, their sum as ever, fragments unreadable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.registry import build
from strategies.channels.fragmented import (
    RECORD,
    Fragmented,
    FragmentedGrid,
    _public_key,
    mask,
    seal,
    unseal,
)
from tests.fedsim.small import Ran, federated, plug_in, watching

FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
SKEWED = {"data.partition": "dirichlet(alpha=1.0, min_partition_size=5)"}
SECRET = b"s" * 32


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


def mixed(folder: Path, changes: dict[str, Any] | None = None) -> Ran:
    return federated(folder, {"attack": "watching", "channel": "fragmented", **(changes or {})})


def flat(arrays: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> Tensor:
    return torch.cat(
        [(t.double() - (start[n].double() if start else 0)).flatten() for n, t in arrays.items()]
    )


@pytest.mark.parametrize("share", [0.5, 0.309, 0.9])
def test_the_expected_share_of_coordinates_is_exchanged(share: float) -> None:
    drawn = mask(SECRET, 1_000_000, share)
    assert drawn.mean() == pytest.approx(share, abs=0.002)  # four standard deviations
    assert (drawn == mask(SECRET, 1_000_000, share)).all()
    assert (drawn != mask(b"t" * 32, 1_000_000, share)).mean() == pytest.approx(
        2 * share * (1 - share), abs=0.002
    )


def test_a_fragment_opens_for_the_partner_alone() -> None:
    sealed = seal(SECRET, 1, 2, b"a fragment")
    assert b"fragment" not in sealed
    assert unseal(SECRET, 1, 2, sealed) == b"a fragment"
    for wrong in ((b"t" * 32, 1, 2), (SECRET, 2, 1), (SECRET, 1, 3)):
        with pytest.raises(RuntimeError, match="not what the partner encrypted"):
            unseal(*wrong, sealed)


@pytest.mark.parametrize("local", ["fedsgd(batch_size=2, lr=0.1)", FEDAVG])
def test_two_clients_uploads_are_mixed_and_add_up(local: str, tmp_path: Path) -> None:
    """u_k + u_j = w_k + w_j to 1e-6, each coordinate of either is one of the two true values."""
    two = {
        "federation.clients": 2, "federation.local": local, "federation.precision": "float64",
        "model.name": "mlp(hidden=[32])",
    }  # fmt: skip
    ran, clear = mixed(tmp_path / "m", two), mixed(tmp_path / "c", {**two, "channel": "plain"})
    start = None if "sgd" in local else ran.views[0].sent
    (u_k, u_j), (w_k, w_j) = ([flat(v.received, start) for v in r.views] for r in (ran, clear))
    n_k, n_j = (view.num_examples or 0 for view in clear.views)
    mean = (n_k + n_j) / 2
    w_k, w_j = w_k * n_k / mean, w_j * n_j / mean
    assert (u_k + u_j - w_k - w_j).abs().max() < 1e-6
    own, others = (u_k - w_k).abs() < 1e-9, (u_k - w_j).abs() < 1e-9
    assert (own | others).all()
    apart = (w_k - w_j).abs() > 1e-9
    assert float(others[apart].double().mean()) == pytest.approx(0.5, abs=0.06)


KINDS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "weights": {"federation.local": FEDAVG},
    "unequal weights": {"federation.local": FEDAVG, **SKEWED},
    "statistics": {
        "model.name": "resnet20(width=4)",
        "model.batchnorm": "shared",
        "federation.local": "fedsgd(batch_size=4)",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_comes_of_it_is_what_it_would_have_been(kind: str, tmp_path: Path) -> None:
    changes = {**KINDS[kind], "federation.rounds": 2}
    ran = mixed(tmp_path / "m", changes)
    clear = mixed(tmp_path / "c", {**changes, "channel": "plain"})
    assert [view.senders for view in ran.views] == [(0,), (1,), (2,), (3,)] * 2
    assert (flat(ran.views[0].received) - flat(clear.views[0].received)).abs().max() > 1e-4
    after, expected = (flat(one.views[-1].sent) for one in (ran, clear))
    assert (after - expected).abs().max() < 1e-6
    assert ran.federation["channel"]["pairs"] == 4


def test_pairs_and_keys_are_new_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, pairs = [], []
    told, paired = FragmentedGrid._told, FragmentedGrid._paired

    def telling(self: FragmentedGrid, what: str, replies: list[Message]) -> dict[int, bytes]:
        found = told(self, what, replies)
        keys.extend(found.values() if what == "key" else [])
        return found

    def pairing(self: FragmentedGrid, nodes: list[int], server_round: int) -> dict[int, int]:
        pairs.append(paired(self, nodes, server_round))
        return pairs[-1]

    monkeypatch.setattr(FragmentedGrid, "_told", telling)
    monkeypatch.setattr(FragmentedGrid, "_paired", pairing)
    ran = mixed(tmp_path, {"federation.rounds": 4, "federation.local": FEDAVG})
    assert ran.failures == []
    assert len(ran.views) == 16
    assert len(set(keys)) == 16
    assert len({tuple(sorted(one.items())) for one in pairs}) > 1
    assert ran.federation["accuracy"]["after"] > ran.federation["accuracy"]["before"]


def test_a_run_repeats_and_another_secret_key_mixes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name, key in (("a", "11"), ("b", "11"), ("c", "22")):
        monkeypatch.setenv("FEDSIM_SECRET_KEY", key * 32)
        runs.append(flat(mixed(tmp_path / name).views[0].received))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_what_the_server_relays_holds_no_value_of_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relayed: list[bytes] = []
    told = FragmentedGrid._told

    def telling(self: FragmentedGrid, what: str, replies: list[Message]) -> dict[int, bytes]:
        relayed.extend(told(self, what, replies).values() if what == "fragment" else [])
        return told(self, what, replies)

    monkeypatch.setattr(FragmentedGrid, "_told", telling)
    mixed(tmp_path, {"model.name": "mlp(hidden=[64])"})
    for one in relayed:
        counts = np.bincount(np.frombuffer(one, dtype=np.uint8), minlength=256)
        chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 160 < chi_square < 370  # 255 degrees of freedom: 255 ± 4.5 standard deviations


def failing(monkeypatch: pytest.MonkeyPatch, victims: set[int], stage: str) -> None:
    honest = Fragmented.client

    def client(self: Fragmented, msg: Message, context: Any, call_next: Any) -> Message:
        if (
            context.node_config["client"] in victims
            and msg.content.config_records[RECORD]["stage"] == stage
        ):
            raise ZeroDivisionError("gone")
        return honest(self, msg, context, call_next)

    monkeypatch.setattr(Fragmented, "client", client)


def test_without_a_partner_a_client_sits_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = mixed(tmp_path / "odd", {"federation.clients": 5})
    assert len(odd.views) == 4
    assert [reason for *_, reason in odd.failures] == [
        "nobody was left to pair it with in this round"
    ]
    failing(monkeypatch, {1}, "fragment")
    ran = mixed(tmp_path / "dropped")
    assert len(ran.views) == 2
    reasons = {client: reason for _, client, reason in ran.failures}
    assert len(reasons) == 2
    assert "gone" in reasons.pop(1)
    assert next(iter(reasons.values())).startswith("its partner dropped out")


@pytest.mark.parametrize(
    ("stage", "change", "why"),
    [
        ("mix", {"fragment": b"x" * 100}, "not what the partner encrypted"),
        ("mix", {"round": 9}, "does not answer 'mix' now"),
        ("fragment", {"stage": "mix"}, "does not answer 'mix' now"),
        ("keys", {"stage": "fragment"}, "does not answer 'fragment' now"),
    ],
)
def test_a_client_keeps_to_the_protocol(
    stage: str, change: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Fragmented.client

    def client(self: Fragmented, msg: Message, context: Any, call_next: Any) -> Message:
        if (asked := msg.content.config_records[RECORD])["stage"] == stage:
            asked.update(change)
        return honest(self, msg, context, call_next)

    monkeypatch.setattr(Fragmented, "client", client)
    with pytest.raises(RunFailed, match=why):
        mixed(tmp_path)


def test_a_client_has_one_partner_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked a second time in a round, for a fragment or a mix, it does not answer."""
    refused: list[str] = []
    honest = Fragmented.client

    def client(self: Fragmented, msg: Message, context: Any, call_next: Any) -> Message:
        reply = honest(self, msg, context, call_next)
        if (stage := str(msg.content.config_records[RECORD]["stage"])) != "keys":
            with pytest.raises(RuntimeError, match="one partner, once a round"):
                honest(self, msg, context, call_next)
            refused.append(stage)
        return reply

    monkeypatch.setattr(Fragmented, "client", client)
    assert mixed(tmp_path).failures == []
    assert sorted(refused) == ["fragment"] * 4 + ["mix"] * 4


def test_a_server_that_goes_back_to_a_round_gets_another_key() -> None:
    """Or two messages would lie under one key and one nonce."""
    context = Context(7, 1, {}, RecordDict(), {"seed": 3})
    keys = []
    for server_round in (1, 1, 2, 1, 2):
        asked = ConfigRecord({"stage": "keys", "round": server_round})
        memory = context.state.config_records.get(RECORD, ConfigRecord())
        told = _public_key(asked, memory, context)
        keys.append(told.config_records[RECORD]["key"])
    assert keys[0] == keys[1]  # asked twice in a round
    assert len(set(keys)) == 4


def test_a_client_started_anew_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has lost its count of keys; under FEDSIM_SECRET_KEY it must repeat all the same."""

    def key(process: int) -> object:
        monkeypatch.setattr("os.getpid", lambda: process)
        context = Context(7, 1, {}, RecordDict(), {"seed": 3})
        asked = ConfigRecord({"stage": "keys", "round": 1})
        return _public_key(asked, ConfigRecord(), context).config_records[RECORD]["key"]

    monkeypatch.delenv("FEDSIM_SECRET_KEY", raising=False)
    assert key(11) != key(12)
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    assert key(11) == key(12)


def test_a_cohort_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no pair"):
        build("channel", "fragmented", "channel").check(1, 8)
