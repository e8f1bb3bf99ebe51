"""Distributed noise: the size of a share, and an epsilon that is the sum's."""

from pathlib import Path

import pytest
import torch

from clients.defenses.formal.distributed_dp import DistributedDP
from clients.defenses.formal.gaussian import epsilon_of
from clients.defenses.perturbation.clip import global_norm
from fedsim.defense import TrainingPlan, guarantees
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from tests.clients.one_update import context
from tests.fedsim.small import federated, scenario

SIZE = 100_000


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


@pytest.mark.parametrize(("channel", "told"), [("plain", 0), ("trusted-sum", 1)])
def test_a_run_tells_epsilon_behind_a_channel_that_sums(
    channel: str, told: int, tmp_path: Path
) -> None:
    changes = {"defenses": "distributed-dp(cohort=4)", "channel": channel}
    assert len(federated(tmp_path, changes).federation["privacy"]) == told


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
