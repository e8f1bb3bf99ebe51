"""Distributed noise: the size of a share, and an epsilon that is the sum's."""

import pytest
import torch

from clients.defenses.formal.distributed_dp import DistributedDP
from clients.defenses.formal.gaussian import epsilon_of
from clients.defenses.perturbation.clip import global_norm
from fedsim.defense import TrainingPlan, guarantees
from tests.clients.one_update import context

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
    said = guarantees((DistributedDP(norm=0.5, sigma=3.0, cohort=10, delta=1e-6),), plan)
    privacy = said["distributed-dp"]
    assert privacy.epsilon == pytest.approx(epsilon_of(1.5, 1.0, 4, 1e-6))
    assert (privacy.unit, privacy.relation, privacy.delta) == ("client", "replace-one", 1e-6)
    assert "10 honest clients" in privacy.mechanism
