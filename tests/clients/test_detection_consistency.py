"""Clients that compare what they received: hashes, the board, and who cannot know."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clients.defenses.detection.consistency import Consistency, digest, disagreement, post, posted
from fedsim.attack import ModelToSend
from fedsim.defense import Tensors, Verdict
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts, check
from tests.clients.one_update import context
from tests.fedsim.small import Meddling, federated, meddling, plug_in, scenario
from tests.fedsim.test_manipulation import Tailoring

MODEL: Tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}


def asked(
    board: Path, client: int, model: Tensors = MODEL, round: int = 1, **settings: int
) -> Verdict:
    ctx = dataclasses.replace(context(round=round), client=client, model="mlp", run_id=9)
    defense = Consistency(board=str(board), **settings)
    return defense.inspect(torch.nn.Identity(), model, (torch.ones(1), torch.ones(1)), ctx)


def other() -> Tensors:
    return {**MODEL, "b": MODEL["b"] + 1e-6}


def test_the_hash_is_of_every_bit_and_of_nothing_else() -> None:
    one = digest(1, "mlp", MODEL, {})
    assert one == digest(1, "mlp", dict(reversed(MODEL.items())), {})
    assert one == digest(1, "mlp", {n: t.clone().T.contiguous().T for n, t in MODEL.items()}, {})
    changed = [
        digest(2, "mlp", MODEL, {}),
        digest(1, "lenet", MODEL, {}),
        digest(1, "mlp", other(), {}),
        digest(1, "mlp", {n: t.double() for n, t in MODEL.items()}, {}),
        digest(1, "mlp", MODEL, {next(iter(MODEL)): (1, 4)}),
        digest(1, "mlp", {**MODEL, "a": torch.ones(4)}, {}),
        digest(1, "mlp", {"b": MODEL["b"], "c": MODEL["a"]}, {}),
    ]
    assert len({one, *changed}) == 8


def test_the_hash_is_the_same_on_every_machine() -> None:
    """Little-endian float32, names sorted: made with nothing but hashlib and struct."""
    import hashlib
    import struct

    told = b"1\nmlp\n[]\n"
    told += b"a\nf4\n[2, 2]\n" + struct.pack("<4f", 1, 1, 1, 1)
    told += b"b\nf4\n[3]\n" + struct.pack("<3f", 0, 1, 2)
    assert digest(1, "mlp", MODEL, {}) == hashlib.sha256(told).hexdigest()


def test_equal_models_agree_and_the_first_cannot_know(tmp_path: Path) -> None:
    first = asked(tmp_path, 0, refuse_above=0)
    assert first.accept
    assert "consistency" not in first.checks
    assert asked(tmp_path, 1, refuse_above=0).checks == {"consistency": 0.0}


def test_a_client_with_another_model_knows(tmp_path: Path) -> None:
    asked(tmp_path, 0)
    asked(tmp_path, 1)
    verdict = asked(tmp_path, 2, other(), refuse_above=0)
    assert not verdict.accept
    assert verdict.checks["consistency"] == 1
    assert asked(tmp_path, 3).checks["consistency"] == pytest.approx(1 / 3)


def test_a_round_later_the_first_knows_too(tmp_path: Path) -> None:
    for client, model in enumerate([MODEL, other(), other()]):
        asked(tmp_path, client, model)
    verdict = asked(tmp_path, 0, round=2, refuse_above=0)
    assert not verdict.accept
    assert verdict.checks == {"consistency/before": pytest.approx(1 / 3)}


def test_with_witnesses_nobody_is_first(tmp_path: Path) -> None:
    assert [asked(tmp_path, k, witnesses=2).accept for k in range(4)] == [False, False, True, True]


def test_the_reason_tells_the_server_no_count(tmp_path: Path) -> None:
    reasons = {asked(tmp_path, client, witnesses=3).reason for client in range(3)}
    assert reasons == {"too few others are known to have received the same"}


def test_more_witnesses_than_a_round_has_are_refused(tmp_path: Path) -> None:
    check(Parts(scenario(tmp_path, {"defenses": "consistency(witnesses=3)"})))
    with pytest.raises(ScenarioError, match="4 clients train in a round: all would refuse"):
        check(Parts(scenario(tmp_path, {"defenses": "consistency(witnesses=4)"})))


def test_a_board_that_cannot_be_is_refused(tmp_path: Path) -> None:
    parts = Parts(scenario(tmp_path, {"defenses": "consistency(board='/proc/nope')"}))
    with pytest.raises(ScenarioError, match="board /proc/nope cannot be written to"):
        check(parts)
    check(parts, here=False)  # the clients' machines may well have it
    with pytest.raises(RuntimeError, match="board /proc/nope cannot be written to"):
        asked(Path("/proc/nope"), 0)


def test_a_client_that_asks_again_does_not_witness_for_itself(tmp_path: Path) -> None:
    asked(tmp_path, 0, witnesses=1)
    assert not asked(tmp_path, 0, witnesses=1).accept


def test_the_board_holds_what_was_posted(tmp_path: Path) -> None:
    post(tmp_path, 3, 11, "x")
    post(tmp_path, 3, 2, "y")
    (tmp_path / "round-3" / "client-2.partial").write_text("half")
    assert posted(tmp_path, 3) == {11: "x", 2: "y"}
    assert posted(tmp_path, 4) == {}
    assert torch.tensor(disagreement({1: "x"})).isnan()


def test_a_server_that_tailors_reaches_the_first_client_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    ran = federated(tmp_path, {"attack": "tailoring", "defenses": "consistency(refuse_above=0.0)"})
    assert [view.senders for view in ran.views] == [(0,)]
    assert {client for _, client, _ in ran.failures} == {1, 2, 3}


def test_with_a_witness_a_server_that_tailors_learns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    wanted = scenario(tmp_path, {"attack": "tailoring", "defenses": "consistency(witnesses=1)"})
    page = run_inline(wanted, "a test")
    report = json.loads(page.with_suffix(".json").read_text())
    assert "every client refused" in report["verdict"]
    assert not list((page.parent / "views").glob("*.safetensors"))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("deed", ["forge", "read"])
def test_attack_code_cannot_reach_the_board(
    deed: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that the scenario names lies out of the run and of ``$FEDSIM_HOME``."""
    board = tmp_path / "shared" if named else tmp_path / "home" / "boards"
    post(board / "7", 1, 0, "there already")

    def forge(arrays: Tensors, knowledge: object) -> None:
        if deed == "forge":
            (board / "7" / "round-1" / "client-3").write_text("forged")
        else:
            posted(board / "7", 1)

    plug_in(monkeypatch, "attack", "forging", meddling(forge))
    defense = f"consistency(board={str(board)!r})" if named else "consistency"
    with pytest.raises(RunFailed, match=f"touch a sealed path .*{board}"):
        federated(tmp_path / "range", {"attack": "forging", "defenses": defense})
    assert not (board / "7").exists()


def test_a_runs_board_goes_when_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    board = tmp_path / "shared"
    post(board / "8", 1, 0, "another run's")
    for named in (board, tmp_path / "home" / "boards"):
        changes = {"attack": "tailoring", "defenses": f"consistency(board={str(named)!r})"}
        ran = federated(tmp_path / "range", changes)
        assert len(ran.vault) == 4
        assert not (named / "7").exists()
    assert posted(board / "8", 1) == {0: "another run's"}


def test_the_same_malicious_model_for_all_is_consistent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same(Meddling):
        def craft(self, expression: str, arrays: Tensors, knowledge: object) -> ModelToSend:  # type: ignore[override]
            return ModelToSend(expression, {n: torch.zeros_like(t) for n, t in arrays.items()})

    plug_in(monkeypatch, "attack", "same", Same)
    ran = federated(tmp_path, {"attack": "same", "defenses": "consistency(refuse_above=0.0)"})
    assert not ran.failures
