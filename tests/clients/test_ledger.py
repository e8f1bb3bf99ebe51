"""The ledger: what a client spent survives, adds up, and stops it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.defenses.formal.dp_sgd import DPSGD
from clients.defenses.formal.local_dp import LocalDP
from clients.defenses.perturbation.soteriafl import SoteriaFL
from clients.ledger import record, released, rounds_done
from fedsim.accounting import Release, epsilon
from fedsim.audit import judge
from fedsim.audit.receipts import defense_parts
from fedsim.defense import guarantees
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed
from tests.clients.one_update import context
from tests.fedsim.small import federated, scenario
from tests.fedsim.test_determinism import Asker

DELTA = 1e-5
NOBODY, NOTHING = torch.nn.Identity(), (torch.zeros(0), torch.zeros(0))


def test_two_rounds_with_restored_state_are_one_long_run() -> None:
    first, second = context(), context(round=2)
    record(first, "x", (Release(1.0, 0.1, 60),))
    second.store = {name: tensor.clone() for name, tensor in first.store.items()}
    record(second, "x", (Release(1.0, 0.1, 40), Release(5.0)))
    assert released(second, "x") == (Release(1.0, 0.1, 100), Release(5.0))
    assert epsilon(released(second, "x"), DELTA) > epsilon((Release(1.0, 0.1, 100),), DELTA)
    assert released(second, "y") == ()


def test_each_round_spends_and_tells_the_auditor() -> None:
    ctx, defense = context(), LocalDP(epsilon=1.0, over="round")
    for done in range(3):
        assert rounds_done(ctx, "local-dp") == done
        defense.transform_update({"a": torch.ones(4)}, ctx)
    assert sum(r.count for r in ctx.effect(defense).releases) == 3
    assert ctx.effect(defense).receipt()["releases"][0][2] == 3


def test_a_server_that_repeats_a_rounds_number_gets_other_noise() -> None:
    ctx, zeros = context(), {"a": torch.zeros(10_000)}
    once = LocalDP().transform_update(zeros, ctx)["a"]
    again = LocalDP().transform_update(zeros, ctx)["a"]
    assert abs(float(torch.corrcoef(torch.stack([once, again]))[0, 1])) < 0.05


BUDGETED: dict[str, Any] = {
    # Two rounds at 1 each come to 1.47, three to 1.83.
    "defenses": "local-dp(epsilon=1.0, over='round', budget=1.5)",
    "federation.rounds": 4,
}


def test_a_budget_is_told_with_what_ends_it() -> None:
    """A SuperNode holds the ledger in memory, unless it has a folder for it."""
    for defense in (LocalDP(), DPSGD(), SoteriaFL()):
        without, limited = (
            guarantees((one,), context().plan)[one.name]
            for one in (defense, dataclasses.replace(defense, budget=8.0))
        )
        assert "started anew" not in without.mechanism
        assert limited.mechanism.endswith("keeps what was spent")
        assert limited.epsilon == without.epsilon


def test_a_spent_budget_stops_a_client_and_nothing_more_is_told(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**BUDGETED, "attack": "linear-inversion"})
    assert {view.round for view in ran.views} == {1, 2}
    refusals = [(f["round"], f["client"], f["refused"]) for f in ran.federation["failures"]]
    assert refusals == [(r, c, True) for r in (3, 4) for c in range(4)]
    reasons = {f["reason"] for f in ran.federation["failures"]}
    assert reasons == {"local-dp refused the model: its privacy budget is spent (epsilon 1.5)"}


@pytest.mark.parametrize(("epsilon", "rounds"), [(0.5, 7), (8.0, 1), (8.0, 3), (1000.0, 10)])
def test_local_dp_of_a_run_ends_where_its_noise_was_sized_for(epsilon: float, rounds: int) -> None:
    ctx, defense = context(), LocalDP(epsilon=epsilon)
    ctx.plan = dataclasses.replace(ctx.plan, rounds=rounds)
    for _ in range(rounds):
        assert defense.inspect(NOBODY, {}, NOTHING, ctx).accept
        defense.transform_update({"a": torch.ones(4)}, ctx)
    refused = defense.inspect(NOBODY, {}, NOTHING, ctx)
    assert not refused.accept
    assert refused.reason == f"its privacy budget is spent (epsilon {epsilon:g})"
    wider = dataclasses.replace(defense, budget=2.0 * epsilon + 1)
    assert wider.inspect(NOBODY, {}, NOTHING, ctx).accept
    assert dataclasses.replace(defense, over="round").inspect(NOBODY, {}, NOTHING, ctx).accept


def test_what_was_spent_stands_in_the_report_beside_what_was_promised(tmp_path: Path) -> None:
    page = run_inline(scenario(tmp_path, {**BUDGETED, "attack": "linear-inversion"}), "a test")
    report = json.loads((page.parent / "report.json").read_text())
    (defense,) = report["defenses"]
    assert [s["client"] for s in defense["spent"]] == [0, 1, 2, 3]
    assert {(s["round"], s["releases"]) for s in defense["spent"]} == {(2, 2)}
    assert defense["spent"][0]["epsilon"] == pytest.approx(1.465, abs=2e-3)
    assert defense["epsilon"]["epsilon"] == pytest.approx(2.155, abs=2e-3)  # of all four rounds
    text = page.read_text()
    assert "What local-dp spent" in text
    assert "spent: ε = 1.47 at most" in text


@pytest.mark.parametrize(
    ("defenses", "local", "count"),
    [
        ("clip(norm=0.5) | gaussian(std=2.0)", "fedavg(batch_size=200)", 2),
        ("clip(norm=0.5, at='gradient') | gaussian(std=2.0, at='gradient')", None, 2),
        ("soteriafl(norm=0.5, std=2.0, delta=1e-5)", "fedavg(batch_size=200)", 2),
    ],
)
def test_other_noise_behind_a_clip_is_in_a_ledger_too(
    defenses: str, local: str | None, count: int, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"defenses": defenses, "federation.rounds": 2}
    ran = federated(tmp_path, {**changes, **({"federation.local": local} if local else {})})
    part = defense_parts(list(ran.vault), ran.federation)[-1]
    assert [spent.releases for spent in part.spent] == [count] * 4
    assert part.epsilon is not None
    assert part.spent[0].epsilon == part.epsilon.epsilon
    assert part.epsilon.epsilon == pytest.approx(epsilon((Release(2.0, count=2),), DELTA))


def test_laplace_noise_for_whole_vectors_is_in_a_ledger_too(tmp_path: Path) -> None:
    defense = "dpfl(epsilon=10.0, sensitivity='vector', activity='public')"
    ran = federated(tmp_path, {"defenses": defense, "federation.rounds": 2})
    (part,) = defense_parts(list(ran.vault), ran.federation)
    assert [(spent.releases, spent.epsilon) for spent in part.spent] == [(2, 20.0)] * 4
    assert part.epsilon is not None
    assert (part.epsilon.epsilon, part.epsilon.delta) == (20.0, 0.0)


def test_every_local_step_of_noise_is_a_release(tmp_path: Path) -> None:
    defenses = "clip(norm=0.5, at='gradient') | gaussian(std=2.0, at='gradient')"
    changes = {"defenses": defenses, "federation.local": "fedavg(batch_size=100, epochs=2)"}
    ran = federated(tmp_path, changes)
    part = defense_parts(list(ran.vault), ran.federation)[-1]
    most = max(map(len, ran.parts.partitions))
    assert max(spent.releases for spent in part.spent) == 2 * -(-most // 100)
    assert part.epsilon is not None
    assert part.spent[0].epsilon == part.epsilon.epsilon


def test_noise_without_a_bound_before_it_is_in_no_ledger(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"defenses": "gaussian(std=2.0)"})
    assert defense_parts(list(ran.vault), ran.federation)[-1].spent == []
    assert all("releases" not in record.receipts[0] for record in ran.vault)


def test_a_budget_stops_soteriafl(tmp_path: Path) -> None:
    defense = "soteriafl(norm=0.5, std=1.0, budget=1.0)"
    ran = federated(tmp_path, {"defenses": defense})
    assert all(failure["refused"] for failure in ran.federation["failures"])


def test_a_budget_that_the_first_round_exceeds_uploads_nothing_at_all(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"defenses": "local-dp(epsilon=2.0, budget=1.0)"})
    assert all(failure["refused"] for failure in ran.federation["failures"])
    assert judge(ran.folder.path).defenses[0].spent == []


def test_a_client_goes_on_refusing_after_its_supernode_is_started_anew(tmp_path: Path) -> None:
    """Flower keeps a SuperNode's state in memory: what must outlive it is on disk."""
    changes = {**BUDGETED, "federation.rounds": 2}
    state = tmp_path / "state"
    before = Asker(tmp_path / "before", changes)
    before.context.node_config["state"] = str(state)
    before.ask(1, 1)
    before.ask(1, 2)
    after = Asker(tmp_path / "after", changes)
    after.context.node_config["state"] = str(state)
    with pytest.raises(AssertionError, match="its privacy budget is spent"):
        after.ask(1, 3)
    after.ask(0, 3)  # another client has its own
    (copy,) = state.glob("7/client-1.safetensors")
    assert (copy.parent.stat().st_mode & 0o777) == 0o700
    copy.write_bytes(b"damaged")
    again = Asker(tmp_path / "again", changes)
    again.context.node_config["state"] = str(state)
    with pytest.raises(AssertionError, match="this client's state is damaged"):
        again.ask(1, 3)


def test_without_a_folder_of_its_own_a_new_supernode_has_forgotten(tmp_path: Path) -> None:
    before = Asker(tmp_path / "before", BUDGETED)
    before.ask(1, 1)
    before.ask(1, 2)
    with pytest.raises(AssertionError, match="budget is spent"):
        before.ask(1, 3)
    assert list(Asker(tmp_path / "after", BUDGETED).ask(1, 3))  # and it answers


def test_a_run_in_which_every_client_is_out_of_budget_is_not_one_that_failed(
    tmp_path: Path,
) -> None:
    exhausted = {"defenses": "local-dp(epsilon=2.0, budget=1.0)", "attack": "linear-inversion"}
    try:
        page = run_inline(scenario(tmp_path, exhausted), "a test")
    except RunFailed as failure:  # pragma: no cover - what must not happen
        pytest.fail(str(failure))
    report = json.loads((page.parent / "report.json").read_text())
    assert "refused" in report["leak_reason"]
