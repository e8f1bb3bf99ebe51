"""Noise: its size, its secrecy, and an epsilon only where a clip bounds what it hides."""

import math

import dp_accounting
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant

from clients.defenses.formal.gaussian import Gaussian, epsilon_of
from clients.defenses.perturbation.clip import Clip
from clients.defenses.perturbation.prune import Prune
from fedsim import seeds
from fedsim.defense import Defense, TrainingPlan, guarantees
from tests.clients.one_update import context

SIZE = 200_000


def noise(defense: Gaussian, **where: int) -> torch.Tensor:
    sent = defense.transform_update({"a": torch.zeros(SIZE)}, context(**where))
    return sent["a"]


@pytest.mark.parametrize("std", [1e-4, 1e-2, 3.0])
def test_its_standard_deviation_is_the_one_asked_for(std: float) -> None:
    drawn = noise(Gaussian(std=std))
    assert float(drawn.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(drawn.mean())) < 5 * std / SIZE**0.5


def test_coordinates_tensors_steps_and_rounds_get_noise_of_their_own() -> None:
    zeros = {"a": torch.zeros(SIZE), "b": torch.zeros(SIZE)}
    sent = Gaussian(std=1.0).transform_update(zeros, context())
    drawn = [
        sent["a"],
        sent["b"],
        noise(Gaussian(std=1.0), round=2),
        noise(Gaussian(std=1.0), step=1),
    ]
    correlation = torch.corrcoef(torch.stack([*drawn, sent["a"].roll(1)]))
    assert float((correlation - torch.eye(5)).abs().max()) < 5 / SIZE**0.5


def test_who_holds_every_public_seed_cannot_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    theirs = noise(Gaussian(std=1.0))
    assert torch.equal(theirs, noise(Gaussian(std=1.0)))
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "22" * 32)
    guesses = [noise(Gaussian(std=1.0))]
    for names in (("gaussian", 1, 0), ("client", 0, "gaussian", 1, 0)):
        guesses.append(torch.randn(SIZE, generator=seeds.generator(0, *names)))
    for guess in guesses:
        assert abs(float(torch.corrcoef(torch.stack([theirs, guess]))[0, 1])) < 5 / SIZE**0.5


# -- the formal part -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("epsilon", "std"),
    [(0.5, 7.032), (1, 3.731), (2, 1.994), (5, 0.892), (8, 0.600), (10, 0.4999), (20, 0.290)],
)
def test_the_optimal_gaussian_mechanism(epsilon: float, std: float) -> None:
    assert epsilon_of(std, 1.0, 1, 1e-5) == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize(
    ("epsilon", "true"),
    [(0.5, 0.353), (1, 0.751), (2, 1.610), (5, 4.54), (8, 7.91), (10, 10.39), (20, 25.4)],
)
def test_the_textbook_noise_is_not_what_it_says_above_eight(epsilon: float, true: float) -> None:
    textbook = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
    assert epsilon_of(textbook, 1.0, 1, 1e-5) == pytest.approx(true, rel=2e-3)


def test_a_hundred_rounds_of_sigma_ten_are_one_of_sigma_one() -> None:
    ours = epsilon_of(10.0, 1.0, 100, 1e-5)
    assert ours == pytest.approx(4.377, abs=2e-3)
    assert ours == pytest.approx(epsilon_of(1.0, 1.0, 1, 1e-5), rel=1e-9)


def test_other_accountants_agree() -> None:
    ours = epsilon_of(10.0, 1.0, 100, 1e-5)
    losses = privacy_loss_distribution.from_gaussian_mechanism(10.0).self_compose(100)
    assert ours == pytest.approx(losses.get_epsilon_for_delta(1e-5), abs=2e-3)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(10.0), 100)
    renyi = RdpAccountant().compose(event).get_epsilon(1e-5)
    assert renyi == pytest.approx(4.729, abs=5e-3)
    assert ours < renyi


FEDSGD = TrainingPlan("gradient", 0.1, 8, 64, 1, 4)
FEDAVG = TrainingPlan("weights", 0.1, 8, 64, 8, 4)


def epsilon(plan: TrainingPlan, *chain: Defense) -> float | None:
    found = guarantees(chain, plan)
    assert found.keys() <= {"gaussian"}
    return found["gaussian"].epsilon if found else None


def test_noise_alone_has_no_epsilon() -> None:
    assert epsilon(FEDSGD, Gaussian(std=100.0)) is None
    assert epsilon(FEDAVG, Gaussian(std=100.0, at="gradient")) is None


def test_clip_then_noise_is_the_gaussian_mechanism_of_twice_the_norm() -> None:
    chain = Clip(norm=0.5), Gaussian(std=4.0)
    for plan in (FEDSGD, FEDAVG):
        assert epsilon(plan, *chain) == pytest.approx(epsilon_of(4.0, 1.0, 4, 1e-5))
    said = guarantees(chain, FEDAVG)["gaussian"]
    assert (said.unit, said.relation, said.delta) == ("client", "replace-one", 1e-5)


def test_noise_then_clip_has_none() -> None:
    assert epsilon(FEDSGD, Gaussian(std=4.0), Clip(norm=0.5)) is None


def test_at_the_gradient_every_local_step_counts() -> None:
    chain = Clip(norm=0.5, at="gradient"), Gaussian(std=4.0, at="gradient")
    assert epsilon(FEDAVG, *chain) == pytest.approx(epsilon_of(4.0, 1.0, 4 * 8, 1e-5))
    assert epsilon(FEDSGD, *chain) == pytest.approx(epsilon_of(4.0, 1.0, 4, 1e-5))


def test_a_clipped_gradient_bounds_an_upload_of_gradients_and_not_one_of_weights() -> None:
    chain = Clip(norm=0.5, at="gradient"), Gaussian(std=4.0, at="update")
    assert epsilon(FEDSGD, *chain) == pytest.approx(epsilon_of(4.0, 1.0, 4, 1e-5))
    assert epsilon(FEDAVG, *chain) is None


def test_pruning_in_between_keeps_the_bound_and_something_unknown_voids_it() -> None:
    class Unknown(Defense):
        name = "unknown"

        def transform_update(self, update, ctx):
            return {name: 2 * tensor for name, tensor in update.items()}

    clip, noise = Clip(norm=0.5), Gaussian(std=4.0)
    assert epsilon(FEDSGD, clip, Prune(), noise) == epsilon(FEDSGD, clip, noise)
    assert epsilon(FEDSGD, clip, Unknown(), noise) is None
    assert epsilon(FEDSGD, clip, noise, Unknown()) == epsilon(FEDSGD, clip, noise)


def test_the_order_is_clip_noise_sparsify() -> None:
    assert Clip.rank < Gaussian.rank < Prune.rank
