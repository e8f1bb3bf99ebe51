"""Local differential privacy: the noise that an epsilon asks for, on what was clipped."""

import pytest
import torch

from clients.defenses.formal.local_dp import LocalDP
from clients.defenses.perturbation.clip import global_norm
from fedsim.accounting import gaussian_multiplier
from fedsim.defense import TrainingPlan, guarantees
from tests.clients.one_update import context, cosine, gradient, smooth_image

SIZE = 200_000
DELTA = 1e-5


def plan(rounds: int) -> TrainingPlan:
    return TrainingPlan("gradient", 0.1, 8, 64, 1, rounds)


@pytest.mark.parametrize(
    ("epsilon", "std"),
    [(0.5, 7.032), (1, 3.731), (2, 1.994), (5, 0.892), (8, 0.600), (10, 0.4999), (20, 0.290)],
)
def test_the_noise_is_the_least_that_epsilon_allows(epsilon: float, std: float) -> None:
    defense = LocalDP(norm=0.5, epsilon=epsilon)  # replacing all of a client's data moves it by 1
    assert defense.std(plan(1)) == pytest.approx(std, rel=2e-3)
    drawn = defense.transform_update({"a": torch.zeros(SIZE)}, context())["a"]
    assert float(drawn.std()) == pytest.approx(std, rel=0.02)


def test_replacing_a_clients_data_moves_the_upload_by_twice_the_norm() -> None:
    defense = LocalDP(norm=1.0, epsilon=1.0)
    update = {"a": torch.full((SIZE,), 3.0), "b": torch.full((7,), -1.0)}
    opposite = {name: -tensor for name, tensor in update.items()}
    one, other = (defense.transform_update(u, context()) for u in (update, opposite))
    moved = global_norm({name: one[name] - other[name] for name in one})  # the noise is the same
    assert moved == pytest.approx(2.0, rel=1e-3)
    assert defense.std(plan(1)) == pytest.approx(2 * gaussian_multiplier(1.0, DELTA))


def test_the_cosine_to_the_clean_update_is_that_of_the_norms() -> None:
    clean = gradient(smooth_image())
    size = sum(tensor.numel() for tensor in clean.values())
    defense = LocalDP(norm=1.0, epsilon=500.0)
    expected = 1 / (1 + defense.std(plan(1)) ** 2 * size) ** 0.5
    got = cosine(defense.transform_update(clean, context()), clean)
    assert got == pytest.approx(expected, abs=5 / size**0.5)


def test_epsilon_of_the_run_or_of_each_round() -> None:
    whole, each = LocalDP(epsilon=2.0), LocalDP(epsilon=2.0, over="round")
    assert guarantees((whole,), plan(9))["local-dp"].epsilon == pytest.approx(2.0, rel=1e-3)
    assert guarantees((each,), plan(1))["local-dp"].epsilon == pytest.approx(2.0, rel=1e-3)
    assert guarantees((each,), plan(9))["local-dp"].epsilon > 6
    assert whole.std(plan(9)) == pytest.approx(3 * each.std(plan(9)))


def test_what_it_promises() -> None:
    said = guarantees((LocalDP(delta=1e-6),), plan(2))["local-dp"]
    assert (said.unit, said.relation, said.delta) == ("client", "replace-one", 1e-6)
    assert "sensitivity 2 (2 x clip)" in said.mechanism
