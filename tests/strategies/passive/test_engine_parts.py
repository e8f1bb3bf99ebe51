"""What the gradient-matching engine is put together from: each part against the plain way."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.scenario import Scenario
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.activations import BatchNormDistance
from strategies.attacks.optimization.engine import _choose
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.local_updates import LocalUpdates, in_order
from strategies.attacks.optimization.matching import (
    Best,
    Evaluation,
    Matching,
    Run,
    Watch,
    minimize,
)
from strategies.attacks.optimization.objectives import (
    AbsoluteDistance,
    Cosine,
    LayerDistances,
    SquaredDistance,
    Weighted,
    for_each_layer,
)
from strategies.attacks.optimization.optimizers import LBFGS, Adam, Langevin
from strategies.attacks.optimization.parametrizations import Candidate, NormalizedPixels
from strategies.attacks.optimization.priors import (
    Consensus,
    Norm,
    PatchBorders,
    Scheduled,
    TotalVariation,
    shifted,
)
from strategies.attacks.optimization.rounds import Rounds, mean, median, trimmed_mean
from strategies.attacks.optimization.schedules import cosine, exponential
from tests.strategies.passive.honest import Honest, batch, spec, tiles
from tests.strategies.passive.test_engine import SMALL, flat_gradient, small_problem


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OBJECTIVES = {
    "layers": lambda g: LayerDistances(g, [10, 20, 20]),
    "layers, weighed": lambda g: LayerDistances(g, [10, 20, 20], [1.0, 0.5, 3.0]),
    "absolute": AbsoluteDistance,
    "weighed cosine": lambda g: Weighted(
        Cosine, g, for_each_layer([1.0, 2.0, 0.5], [10, 20, 20], g)
    ),
    "masked": lambda g: Weighted(SquaredDistance, g, (g > 0.5).to(g)),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_distance_returns_its_derivative(make):
    observed, at, along = (rand(3, 50, seed=seed) for seed in range(3))
    objective, step = make(observed), 1e-6
    slope = (objective(at.clone())[1] * along).sum(dim=1)
    ahead, behind = objective(at + step * along)[0], objective(at - step * along)[0]
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    assert objective(observed.clone())[0].abs().max() < 1e-12
    some = objective.take(torch.tensor([2, 0]))
    assert torch.allclose(some(at[[2, 0]])[0], objective(at.clone())[0][[2, 0]])


PRIORS = {
    "norm": Norm(0.3, SMALL.mean, SMALL.std),
    "patches": PatchBorders(0.3, 2),
    "scheduled": Scheduled(TotalVariation(0.3, SMALL.std), lambda progress: 2 * progress),
    "consensus": Consensus(0.3, 1, begins=0.0, every=1.0, registered=True),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_returns_its_derivative(name):
    images, along = rand(3, 2, *SMALL.shape), rand(3, 2, *SMALL.shape, seed=1)
    prior, step = PRIORS[name].take(torch.zeros(3, dtype=torch.int64)), 1e-6
    penalty, pull = prior(images, 0.7)
    ahead, behind = prior(images + step * along, 0.7)[0], prior(images - step * along, 0.7)[0]
    assert penalty.shape == (3,)
    slope = (pull * along).flatten(1).sum(dim=1)
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7)


def test_patch_borders_see_shuffled_patches_and_nothing_in_a_constant_image():
    prior = PatchBorders(1.0, 4)
    assert prior(torch.full((1, 1, 3, 8, 8), 0.3))[0].abs().max() < 1e-6
    images, _ = batch(tiles(), 1, 0, torch.float64)
    image = images.unsqueeze(0)
    pieces = image.unfold(3, 4, 4).unfold(4, 4, 4).flatten(3, 4)
    order = torch.randperm(pieces.shape[3], generator=torch.Generator().manual_seed(0))
    shuffled = pieces[:, :, :, order].unflatten(3, (8, 8)).transpose(4, 5).reshape(image.shape)
    assert prior(shuffled)[0] > 1.5 * prior(image)[0]


def test_a_shifted_image_is_found_again_and_restarts_agree_within_their_view():
    images, _ = batch(tiles(), 2, 0)
    for down, across in ((3, -2), (0, 4), (-1, 0)):
        moved = images.roll((down, across), dims=(-2, -1))
        assert torch.equal(shifted(moved.unsqueeze(0), images.unsqueeze(0))[0], images)
    whose = torch.tensor([0, 0, 1])
    prior = Consensus(1.0, 2, begins=0.5, every=0.1, registered=False).take(whose)
    candidates = rand(3, 2, *SMALL.shape)
    assert prior(candidates, 0.4)[0].tolist() == [0, 0, 0]
    penalty, _ = prior(candidates, 0.5)
    half = (candidates[0] - candidates[1]).flatten().norm() / 2
    assert torch.allclose(penalty, torch.tensor([half, half, 0.0], dtype=torch.float64))


def test_batchnorm_distance_is_nothing_at_the_batch_itself_and_its_slope_is_right():
    client = Honest("resnet20(width=4)", spec(), dtype=torch.float64)
    model = client.model()
    pairs = [batch(tiles(), 3, seed, torch.float64) for seed in (0, 1)]
    images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    names = [name for name, _ in model.named_parameters()]
    seen = BatchGradients(model, names, layers)(Candidate(images, labels))[1]
    wanted = [
        {
            name: (
                x[target].detach().transpose(0, 1).flatten(1).mean(1),
                x[target].detach().transpose(0, 1).flatten(1).var(1, correction=0),
            )
            for name, x in zip(layers, seen, strict=True)
        }
        for target in (0, 1)
    ]
    prior = BatchNormDistance(0.7, wanted, {layers[0]: 10.0})
    assert prior(seen).max() < 1e-12
    parametrization = NormalizedPixels(spec(), labels, torch.float64, boxed=True)
    observed = torch.stack([flat_gradient(client.model(), *pair) for pair in pairs])
    matching = Matching(
        BatchGradients(client.model(), names, prior.layers),
        parametrization,
        Cosine(observed),
        activations=[prior],
    )
    at = torch.randn(2, 3 * 3072, generator=torch.Generator().manual_seed(0)).double()
    along = torch.randn(2, 3 * 3072, generator=torch.Generator().manual_seed(1)).double()
    together, step = matching.evaluate(at), 1e-6
    ahead, behind = matching.evaluate(at + step * along), matching.evaluate(at - step * along)
    slope = (together.gradient * along).sum(dim=1)
    assert torch.allclose(slope, (ahead.cost - behind.cost) / (2 * step), rtol=1e-4)
    alone = matching.take(torch.tensor([1])).evaluate(at[1:])
    assert torch.allclose(alone.cost, together.cost[1:])
    assert torch.allclose(alone.gradient, together.gradient[1:])


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_local_updates_are_what_sgd_does(momentum, decay):
    client = Honest("lenet", SMALL, dtype=torch.float64)
    images, labels = rand(1, 5, *SMALL.shape), torch.tensor([[0, 1, 2, 3, 1]])
    training = TrainingDetails("weights", 0.1, 2, 3, momentum, decay)
    model = client.model()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum, weight_decay=decay)
    for _ in range(3):
        for place in torch.arange(5).split(2):
            optimizer.zero_grad()
            cross_entropy(model(images[0, place]), labels[0, place]).backward()
            optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    operator = LocalUpdates(client.model(), names, training, in_order(5, training))
    assert operator.evaluations == 9
    found, _ = operator(Candidate(images, labels))
    for update, before, after in zip(found, start, model.parameters(), strict=True):
        assert torch.allclose(update[0], before - after, atol=1e-12)
    assert [len(step) for step in in_order(5, training, sets=3)] == [2, 2, 1] * 3
    assert int(torch.cat(in_order(5, training, sets=3)).max()) == 14


def test_the_slope_through_fifty_steps_is_the_finite_difference():
    client = Honest("lenet", SMALL, dtype=torch.float64)
    training = TrainingDetails("weights", 0.05, 2, 10, 0.0, 0.0)
    names = [name for name, _ in client.model().named_parameters()]
    images, labels = rand(2, 10, *SMALL.shape), torch.arange(10).remainder(4).repeat(2, 1)
    operator = LocalUpdates(client.model(), names, training, in_order(10, training))
    observed = torch.cat([u.flatten(1) for u in operator(Candidate(images, labels))[0]], dim=1)
    parametrization = NormalizedPixels(SMALL, labels, torch.float64, boxed=True)
    matching = Matching(operator, parametrization, SquaredDistance(observed.detach()))
    assert matching.evaluations == 50
    at = rand(2, 10 * 72, seed=3)
    along, step = rand(2, 10 * 72, seed=4), 1e-5
    slope = (matching.evaluate(at).gradient * along).sum(dim=1)
    ahead, behind = matching.evaluate(at + step * along), matching.evaluate(at - step * along)
    assert torch.allclose(slope, (ahead.cost - behind.cost) / (2 * step), rtol=1e-4)


class CutOff(Watch):
    """Keeps the state at one iteration, and may end the run there."""

    def __init__(self, at):
        self.at, self.state = at, {}

    def __call__(self, run: Run):
        if run.iteration == self.at:
            self.state = {name: tensor.clone() for name, tensor in run.state().items()}
            return True
        return False


OPTIMIZERS = {
    "adam": lambda: Adam(0.1, signed=True, schedule=cosine(0.1)),
    "adamw": lambda: Adam(0.1, signed=False, decay=0.1, schedule=exponential(0.1)),
    "lbfgs": LBFGS,
    "langevin": lambda: Langevin(
        Adam(0.1, signed=True),
        lambda _: 0.01,
        [torch.Generator().manual_seed(seed) for seed in range(3)],
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(make):
    matching, truth = small_problem(SquaredDistance, tv=0.01)
    start = truth + 0.3
    whole = minimize(matching, start.clone(), make(), iterations=80)
    cut = CutOff(50)
    minimize(matching, start.clone(), make(), iterations=80, watch=cut)
    rest = minimize(matching, torch.zeros_like(start), make(), iterations=80, earlier=cut.state)
    assert torch.equal(rest.variables, whole.variables)
    assert torch.equal(rest.cost, whole.cost)
    assert rest.evaluations == whole.evaluations


def test_adamw_is_torchs():
    ours = rand(3, 20)
    theirs = ours.clone().requires_grad_()
    optimizer = Adam(0.1, signed=False, betas=(0.9, 0.9), decay=0.2)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.9), weight_decay=0.2)
    for step in range(10):
        gradient = rand(3, 20, seed=step)
        theirs.grad = gradient.clone()
        reference.step()
        optimizer.step(ours, gradient, 0.0)
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_only_points_after_the_schedule_has_settled_are_kept():
    matching, truth = small_problem(SquaredDistance)
    best = minimize(matching, truth.clone(), Adam(0.5, signed=True), iterations=20, settled=0.5)
    assert best.distance.min() > 1e-6  # the truth was where it started, before costs counted
    assert minimize(matching, truth.clone(), LBFGS(), iterations=2).distance.max() < 1e-20


class Later:
    """Problems whose distance is another from half way on."""

    def __init__(self, inner: Matching, then):
        self.inner, self.then = inner, then
        self.parametrization, self.evaluations = inner.parametrization, inner.evaluations

    def evaluate(self, variables, progress=1.0):
        now = self.inner.evaluate(variables, progress)
        if progress < 0.5:
            return now
        return Evaluation(self.then(now.distance), self.then(now.cost), now.gradient)

    def take(self, rows):
        return Later(self.inner.take(rows), self.then)


def test_where_nothing_is_finite_after_the_switch_the_best_from_before_is_kept():
    matching, truth = small_problem()
    lost = Later(matching, lambda cost: torch.where(torch.arange(len(cost)) == 0, torch.nan, cost))
    start = truth + 0.3
    best = minimize(lost, start.clone(), Adam(0.01, signed=True), iterations=20, settled=0.5)
    early = minimize(matching, start.clone(), Adam(0.01, signed=True), iterations=9)
    assert torch.equal(best.variables[0], early.variables[0])
    assert best.distance[0] == early.distance[0]
    assert best.cost.isfinite().tolist() == [False, True, True]


def test_a_restart_that_settled_comes_before_a_nearer_one_that_did_not():
    variables = torch.arange(3.0).unsqueeze(1)
    ended = Best.start(variables)
    ended.distance, ended.cost = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([torch.inf, 0.3, 0.2])
    for rows, wanted in (([0, 1, 2], 2), ([0], 0), ([0, 1], 1), ([1, 0], 1)):
        best = Best.start(torch.full((1, 1), -1.0))
        _choose(best, torch.zeros(len(rows), dtype=torch.int64), ended.take(torch.tensor(rows)))
        assert best.variables.item() == wanted


def test_patience_does_not_take_the_switch_for_a_plateau():
    """A cost that begins anew ten times as high is not one that has stopped falling."""
    matching, truth = small_problem(SquaredDistance)
    start, plain = truth + 0.3, {"iterations": 40, "patience": 10, "settled": 0.5}
    higher = Later(matching, lambda cost: 10 * cost)
    for problems in (matching, higher):
        best = minimize(problems, start.clone(), Adam(0.01, signed=True), **plain)
        print(best.ended)
        assert (best.ended > 30).all()


def test_one_round_is_the_plain_problem_and_a_median_shrugs_off_a_wrong_round():
    matching, truth = small_problem(Cosine, tv=0.01)
    at = truth + 0.2
    plain, one = matching.evaluate(at), Rounds([matching], median, mean).evaluate(at)
    assert torch.equal(plain.gradient, one.gradient)
    assert torch.equal(plain.cost, one.cost)
    wrong = replace(matching, objective=Cosine(-matching.objective.observed.flip(1)))
    many = [matching] * 9 + [wrong]
    right = plain.gradient
    for combine, near in ((median, 1e-6), (trimmed_mean, 0.5)):
        off = (Rounds(many, combine, mean).evaluate(at).gradient - right).norm() / right.norm()
        assert off < near
    assert (Rounds(many, mean, mean).evaluate(at).gradient - right).norm() > 0.05 * right.norm()
    assert torch.equal(median(torch.tensor([[1.0], [5.0], [2.0], [3.0]])), torch.tensor([2.5]))


def test_schedules():
    warm = cosine(0.25, lowest=0.1)
    assert [warm(p) for p in (0.0, 0.125, 0.25, 1.0)] == pytest.approx([0, 0.5, 1, 0.1])
    assert exponential(0.01)(0.5) == pytest.approx(0.1)


def test_a_sum_is_no_clients_local_training():
    for attack in ("fedavg-leakage", "inverting-gradients(simulate=True)"):
        flat = {
            "threat-model": "C",
            "attack": attack,
            "channel": "trusted-sum",
            "data.dataset": "digits",
            "model.name": "lenet",
            "federation.local": "fedavg(epochs=1, batch_size=8, lr=0.1)",
        }
        with pytest.raises(ScenarioError, match="no client's local training"):
            check(Parts(Scenario.from_flat(flat)))
