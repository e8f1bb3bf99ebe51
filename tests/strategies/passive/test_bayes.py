"""The Bayes adversary: the likelihood that matches the noise wins, and says what it does."""

import dataclasses

import pytest
import torch

from fedsim.attack import Setting
from fedsim.errors import NotGranted, ScenarioError
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.beyond.bayes import Bayes, Clipped, Likelihood, Orthogonal
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.matching import Matching, minimize
from strategies.attacks.optimization.objectives import Objective, SquaredDistance
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import Candidate, Pixels
from strategies.attacks.optimization.rounds import Rounds, mean
from strategies.attacks.optimization.schedules import exponential
from tests.strategies.passive.honest import (
    Honest,
    batch,
    cifar10,
    floor_psnr,
    psnr,
    spec,
    tiles,
)
from tests.strategies.passive.test_engine import SMALL

STD = 1e-3


def normal(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def laplace(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Laplace numbers of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / 2**0.5


def error(objective: Objective, matching: Matching, truth: torch.Tensor) -> float:
    """Root mean square error of the nearest mode, found from the truth on."""
    problems = Matching(matching.operator, matching.parametrization, objective)
    adam = Adam(0.02, signed=False, schedule=exponential(1e-3))
    found = minimize(problems, truth.clone(), adam, iterations=100)
    return (found.variables - truth).square().mean().sqrt().item()


def tiny_problem(targets: int) -> tuple[Matching, torch.Tensor]:
    """One image behind each gradient of a small perceptron, and the variables of the truth."""
    client = Honest("mlp(hidden=[128])", SMALL, dtype=torch.float64)
    model = client.model()
    images, labels = normal(torch.empty(targets, 1, *SMALL.shape)), torch.arange(targets)[:, None]
    names = [name for name, _ in model.named_parameters()]
    gradients, _ = BatchGradients(model, names)(Candidate(images, labels % SMALL.num_classes))
    observed = torch.cat([g.detach().flatten(1) for g in gradients], dim=1)
    pixels = Pixels(SMALL, labels % SMALL.num_classes)
    operator = BatchGradients(client.model(), names)
    return Matching(operator, pixels, SquaredDistance(observed)), images.flatten(1)


def test_the_likelihood_that_matches_the_noise_wins():
    matching, truth = tiny_problem(targets=8)
    gradient = matching.objective.observed
    clipped = gradient * 0.5 + STD * normal(gradient)  # by an unknown factor
    observed = {
        f"gaussian(std={STD})": gradient + STD * normal(gradient),
        f"laplace(scale={STD / 2**0.5})": gradient + STD * laplace(gradient),
        "clip(norm=1)": clipped,
    }
    for right, seen in observed.items():
        errors = {name: error(Likelihood.of(name).objective(seen), matching, truth)
                  for name in observed}  # fmt: skip
        print(right, errors)
        assert min(errors, key=errors.get) == right, errors


@pytest.mark.parametrize(
    "defense",
    [
        "none",
        "gaussian(std=0.1)",
        "laplace(scale=0.1, at='update')",
        "clip(norm=0.5) | gaussian(std=0.1)",
        "clip(norm=0.5) | laplace(scale=0.1) | prune(ratio=0.5)",
        "clip(norm=1e3) | gaussian(std=0.1)",
        "prune",
        "censor",
    ],
)
def test_the_slope_is_the_derivative(defense):
    observed, at, along = (normal(torch.empty(3, 20), seed) for seed in range(3))
    observed[:, ::3] = 0.0
    objective, step = Likelihood.of(defense).objective(observed), 1e-6
    slope = (objective(at.clone())[1] * along).sum(dim=1)
    ahead, behind = objective(at + step * along)[0], objective(at - step * along)[0]
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    assert torch.allclose(objective.take(torch.tensor([2]))(at[2:].clone())[1], slope_row(
        objective, at, 2), atol=1e-12)  # fmt: skip


def slope_row(objective: Objective, at: torch.Tensor, row: int) -> torch.Tensor:
    return objective(at.clone())[1][row : row + 1]


def test_values_are_the_closed_forms():
    observed = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    at = torch.tensor([[3.0, 1.5, -2.0]], dtype=torch.float64)

    def value(defense: str) -> float:
        return Likelihood.of(defense).objective(observed)(at.clone())[0].item()

    assert value("gaussian(std=0.5)") == pytest.approx((9 + 0.25) / (2 * 0.25) / 3)
    assert value("laplace(scale=0.5)") == pytest.approx((3 + 0.5) / 0.5 / 3)
    assert value("gaussian(std=0.5) | prune(ratio=0.9)") == pytest.approx(0.25 / 0.5 / 2)
    assert value("clip(norm=1e9) | gaussian(std=0.5)") == pytest.approx(value("gaussian(std=0.5)"))
    shrunk = Likelihood.of("clip(norm=1) | gaussian(std=0.5)").objective(observed)
    assert isinstance(shrunk, Clipped)
    by_hand = (at / at.norm() - observed).square().sum().item() / 0.5 / 3
    assert shrunk(at.clone())[0].item() == pytest.approx(by_hand)


def test_censors_distance_is_zero_at_the_truth_and_there_only():
    truth, sizes = normal(torch.empty(2, 60)), [10, 45, 5]
    upload = torch.cat([orthogonal_to(layer) for layer in torch.split(truth, sizes, dim=1)], dim=1)
    objective = Likelihood.of("censor").objective(upload, sizes)
    assert isinstance(objective, Orthogonal)
    assert objective(truth.clone())[0].max() < 1e-20
    assert objective(upload.clone())[0] == pytest.approx([1.0, 1.0])  # cos 1, the length right
    doubled = truth.clone()
    doubled[:, :10] *= 2  # one layer of three: (2 - 1)^2 / 3
    assert objective(doubled)[0] == pytest.approx([1 / 3, 1 / 3])


def test_four_rounds_have_half_the_error_of_one():
    matching, truth = tiny_problem(targets=8)
    gradient, std = matching.objective.observed, 10 * STD
    likelihood = Likelihood.of(f"gaussian(std={std})")
    seen = [gradient + std * normal(gradient, seed) for seed in range(4)]
    one = error(likelihood.objective(seen[0]), matching, truth)
    each = [
        Matching(matching.operator, matching.parametrization, likelihood.objective(upload))
        for upload in seen
    ]
    adam = Adam(0.02, signed=False, schedule=exponential(1e-3))
    found = minimize(Rounds(each, mean, mean), truth.clone(), adam, iterations=100)
    four = (found.variables - truth).square().mean().sqrt().item()
    assert four == pytest.approx(one / 2, rel=0.15)


def test_all_rounds_of_a_client_are_one_problem_with_the_labels_of_most():
    client, images = Honest("lenet", spec()), batch(tiles(), 1, 0)[0]
    views = [
        dataclasses.replace(
            client.gradient(images, torch.tensor([label]), client=who), round=number
        )
        for number, labels in enumerate([(3, 5), (4, 5), (3, 6)])
        for who, label in enumerate(labels)
    ]
    counts = {view.label: 1 for view in views}
    knowledge = client.knowledge("C", counts)
    found = Bayes(iterations=2, rounds=True).reconstruct(views, knowledge)
    assert (found.views.tolist(), found.labels.tolist()) == ([0, 1], [3, 5])
    assert found.cost.gradient_evaluations == 2 * 3 * 3  # and once more each, for the last score
    training = TrainingDetails("gradient", 0.1, 4, 1, 0.0, 0.0)
    setting = Setting(client.model(), 2, 3, (8, 8), training, "frozen", channel=None)
    Bayes().check_setting(setting)
    with pytest.raises(ValueError, match="batch_size be what a client holds, 8"):
        Bayes(rounds=True).check_setting(setting)


def test_what_a_client_gets_does_not_hang_on_how_often_another_answered():
    client, counts = Honest("lenet", spec()), {}
    own, other = (client.gradient(*batch(tiles(), 1, 0), client=who) for who in range(2))
    often = [own, *(dataclasses.replace(other, round=number) for number in range(1, 4))]
    counts = {view.label: 1 for view in often}
    attack = Bayes(iterations=10, rounds=True, defense="gaussian(std=0.1)")
    alone, beside = (
        attack.reconstruct(views, client.knowledge("C", counts)).examples[0]
        for views in ([own], often)
    )
    assert torch.equal(alone, beside)


def test_a_layer_that_censor_left_at_zero_says_nothing():
    upload, at = normal(torch.empty(1, 12)), normal(torch.empty(1, 12), 1)
    upload[:, :4] = 0.0
    distance, slope = Orthogonal(upload, [4, 8])(at.clone())
    alone, of_it = Orthogonal(upload[:, 4:], [8])(at[:, 4:].clone())
    assert distance.item() == pytest.approx(alone.item() / 2)
    assert not slope[:, :4].any()
    assert torch.allclose(slope[:, 4:], of_it / 2)


def orthogonal_to(layer: torch.Tensor) -> torch.Tensor:
    """Return random rows of the lengths of ``layer [T, n]``, each orthogonal to its own."""
    drawn = normal(layer, 5)
    squares = layer.square().sum(dim=1, keepdim=True)
    drawn = drawn - (drawn * layer).sum(dim=1, keepdim=True) / squares * layer
    return drawn * layer.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("defense", "remedy"),
    [
        ("gaussian", "std"),
        ("gaussian(std=0)", "above 0"),
        ("precode", "prune"),
        ("gaussian(std=0.1) | clip(norm=1)", "as clients apply"),
        ("gaussian(std=0.1) | laplace(scale=0.1)", "gaussian or laplace"),
        ("clip(norm=1) | clip(norm=2)", "each once"),
        ("censor | censor", "each once|write it alone"),
        ("censor | gaussian(std=0.1)", "write it alone"),
    ],
)
def test_a_defense_without_a_likelihood_is_refused(defense, remedy):
    with pytest.raises(ScenarioError, match=remedy):
        Bayes(defense=defense)


def test_knowing_the_defense_is_a_grant():
    client = Honest("lenet", spec())
    view = client.gradient(*batch(tiles(), 1, 0))
    attack = Bayes(iterations=2, defense="gaussian(std=0.1)")
    with pytest.raises(NotGranted):
        attack.reconstruct([view], client.knowledge("B"))
    assert len(attack.reconstruct([view], client.knowledge("C")).examples) == 1
    assert len(Bayes(iterations=2).reconstruct([view], client.knowledge("B")).examples) == 1
    with pytest.raises(ValueError, match="inverting-gradients"):
        attack.check(client.model(), "weights")


# -- figures ---------------------------------------------------------------------------------------

DEFENSES = {
    "gaussian(std=1e-2)": lambda g: g + 1e-2 * normal(g),
    "gaussian(std=3e-2)": lambda g: g + 3e-2 * normal(g),
    "laplace(scale=1e-2)": lambda g: g + 2**0.5 * 1e-2 * laplace(g),
    "prune(ratio=0.95)": lambda g: torch.where(g.abs() >= g.abs().quantile(0.95), g, 0),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("defense", DEFENSES)
def test_the_right_likelihood_beats_the_cosine_but_for_heavy_noise(defense):
    client = Honest("convnet(stride=2)", spec())
    truth = [batch(cifar10(), 1, seed) for seed in range(8)]
    views = []
    for index, pair in enumerate(truth):
        view = client.gradient(*pair, client=index)
        names, tensors = list(view.received), list(view.received.values())
        parts = torch.cat([t.flatten() for t in tensors]).double()
        pieces = torch.split(DEFENSES[defense](parts).float(), [t.numel() for t in tensors])
        received = {n: p.view_as(t) for n, p, t in zip(names, pieces, tensors, strict=True)}
        views.append(dataclasses.replace(view, received=received))
    counts, reached = {view.label: 1 for view in views}, {}
    attacks = {name: Bayes(iterations=300, defense=name) for name in (defense, "none")}
    attacks |= {"inverting-gradients": InvertingGradients(iterations=300, tv=0.1)}
    for name, attack in attacks.items():
        found = attack.reconstruct(views, client.knowledge("C", counts))
        values = [psnr(pair[0], found.examples[i : i + 1]) for i, pair in enumerate(truth)]
        reached[name] = torch.cat(values).mean().item()
    print(defense, {name: round(value, 1) for name, value in reached.items()})
    floor = floor_psnr(torch.cat([images for images, _ in truth]), cifar10()).mean()
    assert reached[defense] > floor + 4
    if defense == "gaussian(std=3e-2)":
        assert abs(reached[defense] - reached["inverting-gradients"]) < 0.7
    else:
        assert reached[defense] > max(reached["none"], reached["inverting-gradients"]) + 1.5
