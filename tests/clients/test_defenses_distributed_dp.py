"""Distributed noise: the size of a share, and an epsilon that is the sum's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from clients.defenses.formal.distributed_dp import DistributedDP
from clients.defenses.formal.gaussian import epsilon_of
from clients.defenses.perturbation.clip import global_norm
from fedsim.audit.receipts import defense_parts
from fedsim.audit.schema import DefensePart
from fedsim.audit.verdict import judge
from fedsim.defense import ClientContext, Defense, Refusal, Tensors, TrainingPlan, guarantees
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from tests.clients.one_update import context
from tests.fedsim.small import federated, plug_in, scenario

SIZE = 100_000


@dataclass(frozen=True, kw_only=True)
class Leaving(Defense):
    """The first client sends nothing."""

    changes_upload: ClassVar[bool] = False

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        if ctx.client == 0:
            raise Refusal("it leaves")
        return update


def sent(defense: DistributedDP, update: torch.Tensor, **where: int) -> torch.Tensor:
    return defense.transform_update({"a": update}, context(**where))["a"]


@pytest.mark.parametrize(("norm", "sigma", "cohort"), [(1.0, 0.1, 2), (0.5, 1.0, 101)])
def test_a_share_is_the_sums_noise_over_all_others(norm: float, sigma: float, cohort: int) -> None:
    defense = DistributedDP(norm=norm, sigma=sigma, cohort=cohort)
    drawn = sent(defense, torch.zeros(SIZE))
    assert float(drawn.std()) == pytest.approx(sigma * norm / (cohort - 1) ** 0.5, rel=0.02)


def test_what_is_noised_was_clipped() -> None:
    defense = DistributedDP(norm=2.0, sigma=1e-9)
    assert global_norm({"a": sent(defense, torch.ones(SIZE))}) == pytest.approx(2.0, rel=1e-5)
    small = torch.full((SIZE,), 1e-3)
    assert torch.allclose(sent(defense, small), small, atol=1e-6)


def test_rounds_have_noise_of_their_own() -> None:
    defense, zeros = DistributedDP(), torch.zeros(SIZE)
    both = torch.stack([sent(defense, zeros), sent(defense, zeros, round=2)])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / SIZE**0.5


def test_epsilon_is_that_of_the_sum_and_says_so() -> None:
    plan = TrainingPlan("gradient", 0.1, 8, 64, 1, 4)
    chain = (DistributedDP(norm=0.5, sigma=3.0, cohort=10, delta=1e-6),)
    said = guarantees(chain, plan, sums=True)
    privacy = said["distributed-dp"]
    assert privacy.epsilon == pytest.approx(epsilon_of(1.5, 1.0, 4, 1e-6))
    assert (privacy.unit, privacy.relation, privacy.delta) == ("client", "replace-one", 1e-6)
    assert "10 honest clients" in privacy.mechanism


def test_there_is_no_epsilon_where_single_uploads_are_read() -> None:
    plan = TrainingPlan("gradient", 0.1, 8, 64, 1, 4)
    assert guarantees((DistributedDP(),), plan) == {}


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ("clip(norm=0.1)", 0),
        ("prune", 0),
        ("quantize(kind='sign')", 0),
        ("gaussian", 0),
        ("lr-perturbation", 1),
    ],
)
def test_there_is_no_epsilon_of_a_sum_whose_shares_are_changed_after_their_noise(
    later: str, told: int, tmp_path: Path
) -> None:
    chain = Parts(scenario(tmp_path, {"defenses": f"distributed-dp | {later}"})).defenses
    plan = TrainingPlan("gradient", 0.1, 8, 64, 1, 4)
    assert len(guarantees(chain, plan, sums=True)) == told


@pytest.mark.parametrize(
    ("noise", "channel", "local", "refused"),
    [
        ("sigma=40.0", "max_weight=2, clipping_range=0.001", "fedsgd(batch_size=2)", True),
        ("sigma=1.0", "max_weight=2, clipping_range=3.8", "fedsgd(batch_size=2)", True),
        ("sigma=1.0", "max_weight=2, clipping_range=3.9", "fedsgd(batch_size=2)", False),
        ("sigma=1.0", "max_weight=4, clipping_range=2.0", "fedsgd(batch_size=2)", False),
        # FedAvg's weights, of up to 1 / sqrt(8) here, come on top.
        ("sigma=1.0", "max_weight=4, clipping_range=3.9", "fedavg(batch_size=4)", True),
        ("sigma=1.0", "max_weight=4, clipping_range=4.3", "fedavg(batch_size=4)", False),
    ],
)
def test_a_protocol_that_cuts_the_noise_off_is_refused(
    noise: str, channel: str, local: str, refused: bool, tmp_path: Path
) -> None:
    changes = {"defenses": f"distributed-dp(cohort=4, {noise})", "channel": f"secagg({channel})"}
    changes |= {"federation.local": local, "data.partition": "size(partition_sizes=[4, 4, 4, 4])"}
    parts = Parts(scenario(tmp_path, changes))
    if not refused:
        check(parts)
        return
    with pytest.raises(ScenarioError, match="secagg cuts each client's values off at"):
        check(parts)


@pytest.mark.parametrize(("channel", "told"), [("plain", 0), ("trusted-sum", 1)])
def test_a_run_tells_epsilon_behind_a_channel_that_sums(
    channel: str, told: int, tmp_path: Path
) -> None:
    changes = {"defenses": "distributed-dp(cohort=4)", "channel": channel}
    assert len(federated(tmp_path, changes).federation["privacy"]) == told


def told_of(folder: Path, changes: dict[str, Any]) -> DefensePart:
    ran = federated(folder, {"channel": "trusted-sum", **changes})
    assert len(ran.federation["privacy"]) == 1
    return defense_parts(list(ran.vault), ran.federation)[-1]


def test_a_sum_of_fewer_clients_than_counted_on_withholds_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised = {"defenses": "distributed-dp(cohort=4)", "federation.rounds": 2}
    whole = told_of(tmp_path / "whole", promised)
    assert whole.epsilon is not None
    assert whole.epsilon.epsilon is not None
    assert not whole.epsilon.withheld
    assert len(whole.spent) == 4
    plug_in(monkeypatch, "defense", "leaving", Leaving)
    short = told_of(tmp_path / "short", {"defenses": "leaving | distributed-dp(cohort=4)"})
    assert short.epsilon is not None
    assert short.epsilon.epsilon is None
    assert "the sum of round 1 held the noise of 3 of the 4 clients" in short.epsilon.withheld
    assert short.spent == []


def test_a_server_s_own_devices_add_no_noise_and_withhold_epsilon(tmp_path: Path) -> None:
    changes = {
        "threat-model": "H",
        "attack": "sybil-sa-dp(cohort=4)",
        "defenses": "distributed-dp(cohort=4)",
        "federation.local": "fedsgd(batch_size=1)",
    }
    told = told_of(tmp_path, changes).epsilon
    assert told is not None
    assert told.epsilon is None
    assert "held the noise of 1 of the 4 clients" in told.withheld


def test_single_uploads_that_were_read_withhold_epsilon(tmp_path: Path) -> None:
    changes = {
        "threat-model": "F",
        "attack": "secagg-unmasking(victims=[2])",
        "channel": "secagg(max_weight=2)",
        "defenses": "distributed-dp(cohort=4, sigma=1.0)",
    }
    ran = federated(tmp_path, changes)
    (told,) = judge(ran.folder.path).defenses
    assert told.epsilon is not None
    assert told.epsilon.epsilon is None
    assert "the server read round-1-client-2, and single uploads" in told.epsilon.withheld
    assert told.spent == []


@pytest.mark.parametrize(("clipping_range", "cut_off"), [(4.3, False), (2.0, True)])
def test_noise_that_the_protocol_cut_off_withholds_epsilon(
    clipping_range: float, cut_off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights grow in training: what was refused nowhere may come to be cut off, by any server."""
    monkeypatch.setattr(DistributedDP, "_check_range", lambda *_: None)
    changes = {
        "channel": f"secagg(max_weight=4, clipping_range={clipping_range})",
        "defenses": "distributed-dp(cohort=4, sigma=1.0)",
        "federation.local": "fedavg(batch_size=4)",
        "data.partition": "size(partition_sizes=[4, 4, 4, 4])",
    }
    ran = federated(tmp_path, changes)
    (told,) = defense_parts(list(ran.vault), ran.federation)
    assert told.epsilon is not None
    assert bool(told.epsilon.withheld) == (told.epsilon.epsilon is None) == cut_off
    assert ("the channel cut off" in told.epsilon.withheld) == cut_off
    assert (told.spent == []) == cut_off


@pytest.mark.parametrize(
    ("channel", "local", "refused"),
    [
        ("trusted-sum", "fedavg(batch_size=4)", True),
        ("trusted-sum", "fedsgd(batch_size=300)", True),
        ("trusted-sum", "fedsgd(batch_size=2)", False),
        ("plain", "fedavg(batch_size=4)", False),  # no epsilon is told there
    ],
)
def test_unequal_weights_in_the_sum_are_refused(
    channel: str, local: str, refused: bool, tmp_path: Path
) -> None:
    changes = {"defenses": "distributed-dp(cohort=4)", "channel": channel}
    changes |= {"federation.local": local, "data.partition": "linear"}
    parts = Parts(scenario(tmp_path, changes))
    if not refused:
        check(parts)
        return
    with pytest.raises(ScenarioError, match="examples in the sum, and its noise is that of equal"):
        check(parts)


def test_a_cohort_of_more_than_take_part_is_refused(tmp_path: Path) -> None:
    changes = {"federation.clients": 2, "defenses": "distributed-dp(cohort=1000, sigma=4.0)"}
    with pytest.raises(ScenarioError, match="cohort=1000 is more than the 2 that take part"):
        check(Parts(scenario(tmp_path, changes)))
    sybils = {
        "threat-model": "H",
        "attack": "sybil-sa-dp(cohort=8)",
        "channel": "secagg(max_weight=2)",
        "defenses": "distributed-dp(cohort=11)",
        "federation.local": "fedsgd(batch_size=1)",
    }
    check(Parts(scenario(tmp_path, sybils)))  # four clients and seven sybils
