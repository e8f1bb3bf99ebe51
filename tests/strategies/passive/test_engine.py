"""The gradient-matching engine: every fast path equals the slow, obvious way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fedsim.data import DataSpec, Split
from fedsim.penalized import Penalized
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.local_updates import LocalUpdates
from strategies.attacks.optimization.matching import Matching, minimize
from strategies.attacks.optimization.objectives import Cosine, SquaredDistance
from strategies.attacks.optimization.optimizers import LBFGS, Adam
from strategies.attacks.optimization.parametrizations import (
    Candidate,
    NormalizedPixels,
    PixelsAndLabels,
)
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import ig_steps
from strategies.attacks.optimization.surrogate_gradients import example_gradients
from tests.strategies.passive.honest import Honest, batch, spec, tiles

SMALL = DataSpec((2, 6, 6), 4, (0.4, 0.5), (0.2, 0.3))


def flat_gradient(model, images, labels):
    loss = cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([tensor.flatten() for tensor in found])


def small_problem(objective=Cosine, tv=0.0, targets=3, size=2):
    """T problems on a small smooth network in float64, and the variables of the truth."""
    client = Honest("lenet", SMALL, dtype=torch.float64)
    model, generator = client.model(), torch.Generator().manual_seed(0)
    images = torch.rand(targets, size, *SMALL.shape, generator=generator, dtype=torch.float64)
    labels = torch.stack([torch.randperm(4, generator=generator)[:size] for _ in range(targets)])
    observed = torch.stack([flat_gradient(model, *pair) for pair in zip(images, labels, strict=1)])
    names = [name for name, _ in model.named_parameters()]
    parametrization = NormalizedPixels(SMALL, labels, torch.float64, boxed=True)
    priors = [TotalVariation(tv, SMALL.std)] if tv else []
    matching = Matching(BatchGradients(model, names), parametrization, objective(observed), priors)
    truth = (images - parametrization.mean) / parametrization.std
    return matching, truth.flatten(1)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("expression", ["lenet", "convnet(width=8)", "resnet20(width=4)"])
@pytest.mark.parametrize("targets", [1, 3])
def test_gradients_of_many_batches_are_those_of_each(expression, targets, batchnorm):
    client = Honest(expression, spec(), dtype=torch.float64)
    model, reference = client.model(), client.model()
    if batchnorm == "train":
        model.train()
        reference.train()
    pairs = [batch(tiles(), 2, seed, torch.float64) for seed in range(targets)]
    images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    gradients = BatchGradients(model, [name for name, _ in model.named_parameters()])
    for told in (labels, one_hot(labels, 10).double()):
        found = [
            gradient.reshape(targets, -1) for gradient in gradients(Candidate(images, told))[0]
        ]
        for row, (image, label) in zip(torch.cat(found, dim=1), pairs, strict=True):
            assert torch.allclose(row, flat_gradient(reference, image, label), atol=1e-10)


class Ridge(Penalized):
    """Passes on what it is fed; the loss grows by half its weighted squares, and by its labels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, inputs):
        return inputs

    def penalty(self, inputs, labels):
        return self.weight.square() @ (0.5 * inputs.square().sum() + labels.sum()).reshape(1)


@pytest.mark.parametrize("targets", [1, 3])
def test_what_a_module_adds_to_the_loss_is_in_the_gradient_and_in_local_training(targets):
    """By hand, for one parameter that is in the penalty alone: dL/dw = w (|x|^2 + 2 sum y)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(targets, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(2 * targets).reshape(targets, 2) % 4
    expected = 0.5 * (images.square().sum(dim=(1, 2, 3, 4)) + 2 * labels.sum(dim=1))
    model = nn.Sequential(Ridge(), nn.Flatten(), nn.Linear(4, 4).double())
    names = [name for name, _ in model.named_parameters()]
    (gradient, *_), _ = BatchGradients(model, names)(Candidate(images, labels))
    assert torch.allclose(gradient.flatten(), expected, atol=1e-12)
    training = TrainingDetails("weights", 0.1, 2, 1, 0.0, 0.0)
    (moved, *_), _ = LocalUpdates(model, names, training, [torch.arange(2)])(
        Candidate(images, labels)
    )
    assert torch.allclose(moved.flatten(), 0.1 * expected, atol=1e-12)


def test_networks_that_learn_from_gradients_learn_from_those_of_the_whole_loss():
    images = torch.randint(256, (3, 1, 2, 2), dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1, 3]))
    model = nn.Sequential(Ridge(), nn.Flatten(), nn.Linear(4, 4).double())
    ((seen, found),) = example_gradients(model, ["0.weight"], split)
    expected = 0.5 * (seen.square().sum(dim=(1, 2, 3)) + 2 * split.labels)
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


@pytest.mark.parametrize("tv", [0.0, 0.1])
@pytest.mark.parametrize("objective", [Cosine, SquaredDistance])
def test_the_slope_is_the_derivative_of_the_cost(objective, tv):
    matching, truth = small_problem(objective, tv)
    generator = torch.Generator().manual_seed(1)
    at = truth + 0.3 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    along = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    slope = (matching.evaluate(at).gradient * along).sum(dim=1)
    step = 1e-5
    ahead, behind = matching.evaluate(at + step * along), matching.evaluate(at - step * along)
    assert torch.allclose(slope, (ahead.cost - behind.cost) / (2 * step), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("objective", [Cosine, SquaredDistance])
def test_the_distance_is_zero_at_the_truth_and_nowhere_near(objective):
    matching, truth = small_problem(objective)
    assert matching.evaluate(truth).distance.max() < 1e-20
    assert matching.evaluate(truth + 0.1).distance.min() > 1e-6


@pytest.mark.ladder(2)
@pytest.mark.parametrize("expression", ["lenet", "convnet"])
def test_cosine_is_zero_at_the_truth_in_single_precision(expression):
    client = Honest(expression, spec())
    images, labels = batch(tiles(), 4, 0)
    model = client.model()
    observed = flat_gradient(model, images, labels).unsqueeze(0)
    gradients = BatchGradients(model, [name for name, _ in model.named_parameters()])
    found, _ = gradients(Candidate(images.unsqueeze(0), labels.unsqueeze(0)))
    flat = torch.cat([gradient.flatten() for gradient in found]).unsqueeze(0)
    assert Cosine(observed)(flat.detach())[0].abs() < 2e-6


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_cosine_is_blind_to_scale_and_the_squared_distance_is_not(factor, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 1, 50, generator=generator, dtype=torch.float64)
    plain, scaled = Cosine(one)(other.clone())[0], Cosine(factor * one)(other.clone())[0]
    assert torch.allclose(plain, scaled)
    assert torch.allclose(plain, 1 - torch.nn.functional.cosine_similarity(one, other))
    apart = SquaredDistance(one)(other.clone())[0] - SquaredDistance(factor * one)(other.clone())[0]
    assert (apart.abs() < 1e-9) == (abs(factor - 1) < 1e-9)


@pytest.mark.ladder(2)
def test_cosine_knows_which_image_has_which_label_but_not_their_order():
    client = Honest("convnet", spec())
    model = client.model()
    images, labels = batch(tiles(), 4, 2)
    assert len(set(labels.tolist())) == 4
    observed = Cosine(flat_gradient(model, images, labels).unsqueeze(0))
    order = torch.tensor([2, 0, 3, 1])
    together = flat_gradient(model, images[order], labels[order])
    apart = flat_gradient(model, images[order], labels)
    assert observed(together.unsqueeze(0))[0] < 2e-6
    assert observed(apart.unsqueeze(0))[0] > 0.02


@pytest.mark.parametrize("shape", [(1, 2, 3, 8, 8), (3, 1, 1, 5, 7), (2, 1, 2, 1, 4)])
def test_total_variation_is_the_mean_absolute_step_of_standardized_images(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    std = [0.2, 0.3, 0.4][: shape[2]]
    standardized = images / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    steps = [standardized.diff(dim=dim).abs() for dim in (-1, -2) if shape[dim] > 1]
    expected = 0.7 * sum(step.flatten(1).mean(dim=1) for step in steps)
    penalty, pull = TotalVariation(0.7, std)(images.detach())
    assert torch.allclose(penalty, expected)
    assert torch.allclose(pull, torch.autograd.grad(expected.sum(), images)[0])


def test_signed_adam_is_torch_adam_on_the_sign_of_the_gradient():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 20, generator=generator)
    theirs = ours.clone().requires_grad_()
    optimizer, reference = Adam(0.1, signed=True), torch.optim.Adam([theirs], lr=0.1)
    for step in range(20):
        gradient = torch.randn(3, 20, generator=generator)
        theirs.grad = gradient.sign()
        reference.step()
        optimizer.step(ours, gradient, step / 20)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_lbfgs_walks_as_torch_lbfgs_does_on_each_problem():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    bend = torch.rand(3, 12, generator=generator, dtype=torch.float64) + 0.1

    def cost(x, b):
        return (b * x.square() + 0.1 * (x - 1) ** 4).sum(-1)

    ours = start.clone()
    optimizer = LBFGS(history=5)
    for _ in range(15):
        leaf = ours.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cost(leaf, bend).sum(), leaf)
        optimizer.step(ours, gradient, 0.0)
    for row in range(3):
        x = start[row].clone().requires_grad_()
        reference = torch.optim.LBFGS(
            [x], max_iter=15, history_size=5, tolerance_grad=0, tolerance_change=0
        )

        def closure(x=x, row=row, reference=reference):
            reference.zero_grad()
            value = cost(x, bend[row])
            value.backward()
            return value

        reference.step(closure)
        assert torch.allclose(ours[row], x.detach(), atol=1e-9)


def test_the_rate_falls_to_a_tenth_three_times():
    marks = [0.0, 0.374, 0.376, 0.624, 0.626, 0.874, 0.876, 0.999]
    expected = [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [ig_steps(mark) for mark in marks] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", [lambda: Adam(0.1, signed=True), LBFGS])
def test_a_problem_that_goes_astray_leaves_its_neighbors_alone(optimizer):
    matching, truth = small_problem(SquaredDistance)
    start = truth + 0.2
    alone = minimize(matching, start.clone(), optimizer(), iterations=20)
    start[1] = torch.nan
    beside = minimize(matching, start, optimizer(), iterations=20)
    assert beside.last.isfinite().tolist() == [True, False, True]
    assert beside.cost[1] == torch.inf
    assert torch.allclose(beside.variables[[0, 2]], alone.variables[[0, 2]], atol=1e-6)


def test_the_best_point_seen_is_returned_not_the_last():
    matching, truth = small_problem(tv=0.01)
    seen = []
    evaluate = matching.evaluate

    def watched(variables, progress):
        seen.append(evaluate(variables, progress))
        return seen[-1]

    matching.evaluate = watched
    best = minimize(matching, truth + 0.5, Adam(0.5, signed=True), iterations=30)
    costs = torch.stack([now.cost for now in seen])
    assert torch.equal(best.cost, costs.min(dim=0).values)
    assert best.evaluations == costs.numel() == 31 * 3
    assert torch.allclose(evaluate(best.variables).cost, best.cost)


def test_problems_that_go_nowhere_are_dropped_and_keep_their_best():
    matching, truth = small_problem(SquaredDistance)
    start = truth + torch.tensor([[0.0], [0.3], [0.3]])
    early = minimize(matching, start.clone(), LBFGS(), iterations=300, patience=20)
    every = minimize(matching, start, LBFGS(), iterations=300)
    assert early.evaluations < every.evaluations
    assert early.distance[0] < 1e-20
    assert (early.distance < 1e-6).all()


def test_images_are_boxed_and_labels_searched_with_them():
    boxed = NormalizedPixels(SMALL, torch.tensor([[1, 2]]), torch.float32, boxed=True)
    variables = 50 * boxed.start(torch.Generator().manual_seed(0)).unsqueeze(0)
    boxed.box(variables)
    images, labels, _ = boxed.decode(variables)
    assert images.shape == (1, 2, 2, 6, 6)
    assert images.min() >= -1e-6
    assert images.max() <= 1 + 1e-6
    assert labels.tolist() == [[1, 2]]
    searched = PixelsAndLabels(SMALL, 3)
    images, labels, _ = searched.decode(searched.start(torch.Generator()).unsqueeze(0))
    assert images.shape == (1, 3, 2, 6, 6)
    assert torch.allclose(labels.sum(-1), torch.ones(1, 3))
