"""DLF: what its parts are without epochs, and what it makes of several."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fedsim.errors import NotGranted, ScenarioError
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.basic.fedavg_leakage import (
    UPDATE_WEIGHT,
    FedAvgLeakage,
    OutOfRange,
    SameInEveryEpoch,
    SetForEachEpoch,
    SquaredVariation,
    aligned,
    layer_weights,
)
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.local_updates import LocalUpdates, in_order
from strategies.attacks.optimization.matching import Matching
from strategies.attacks.optimization.objectives import SquaredDistance, Weighted, for_each_layer
from tests.strategies.passive.honest import Honest, batch, spec, tiles
from tests.strategies.passive.test_engine import SMALL


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KERNELS = torch.randn(96, 2, 3, 3, generator=torch.Generator().manual_seed(3)).double()
PRIORS = {
    "mean": SameInEveryEpoch(0.3, SMALL, 3),
    "max": SameInEveryEpoch(0.3, SMALL, 3, KERNELS),
    "variation": SquaredVariation(0.3, SMALL),
    "out of range": OutOfRange(0.3),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_returns_its_derivative(name):
    images, along = (3 * rand(2, 6, *SMALL.shape, seed=seed) - 1 for seed in (0, 1))
    prior, step = PRIORS[name], 1e-6
    penalty, pull = prior(images)
    ahead, behind = prior(images + step * along)[0], prior(images - step * along)[0]
    assert penalty.shape == (2,)
    slope = (pull * along).flatten(1).sum(dim=1)
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_sets_that_are_permutations_of_one_cost_nothing(name):
    one = rand(4, *SMALL.shape)
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sets = torch.cat([one[order] for order in orders]).unsqueeze(0)
    prior = PRIORS[name]
    assert prior(sets)[0].abs().max() < 1e-12
    told = sets.clone()
    told[0, 5] = 0.5
    assert prior(told)[0] > 1e-5
    assert prior(told.flip(1))[0] == pytest.approx(prior(told)[0].item())


def test_the_mean_over_pairs_of_epochs_is_what_the_variance_says():
    images = rand(1, 6, *SMALL.shape)
    std = torch.tensor(SMALL.std).double().view(-1, 1, 1)
    means = (images[0] / std).unflatten(0, (3, 2)).mean(dim=1)
    pairs = [(means[a] - means[b]).square().mean() for a in range(3) for b in range(3)]
    assert PRIORS["mean"](images)[0].item() == pytest.approx(0.3 * sum(pairs).item() / 9)


def test_sets_are_brought_into_the_order_of_the_first():
    one = rand(4, *SMALL.shape)
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sets = torch.stack([one] + [one[order] for order in orders])
    noisy = sets + 0.01 * rand(*sets.shape, seed=5)
    assert (aligned(noisy) - one).abs().max() < 0.02
    labels = torch.tensor([[0, 1, 2, 3]])
    searched = SetForEachEpoch(SMALL, labels, torch.float64, 4)
    assert searched.start(torch.Generator()).shape == (4 * 4 * 72,)
    variables = ((noisy - searched.mean) / searched.std).reshape(1, -1)
    images, told = searched.take(torch.tensor([0])).finish(variables)
    assert images.shape == (1, 4, *SMALL.shape)
    assert (images[0] - one).abs().max() < 0.02
    assert torch.equal(told, labels)


def test_one_epoch_of_one_step_is_plain_squared_distance():
    client = Honest("lenet", SMALL, dtype=torch.float64)
    training = TrainingDetails("weights", 0.3, 3, 1, 0.0, 0.0)
    labels = torch.tensor([[0, 1, 2], [3, 3, 0]])
    names = [name for name, _ in client.model().named_parameters()]
    sizes = [p.numel() for p in client.model().parameters()]
    gradient = rand(2, sum(sizes), seed=2) - 0.5
    searched = SetForEachEpoch(SMALL, labels, torch.float64, 1)
    weights = for_each_layer(layer_weights(names), sizes, gradient)
    simulated = Matching(
        LocalUpdates(client.model(), names, training, in_order(3, training, sets=1)),
        searched,
        Weighted(SquaredDistance, 0.3 * gradient, (UPDATE_WEIGHT * weights).sqrt() / 0.3),
    )
    plain = Matching(
        BatchGradients(client.model(), names),
        searched,
        Weighted(SquaredDistance, gradient, weights.sqrt()),
    )
    at = torch.randn(2, 3 * 72, generator=torch.Generator().manual_seed(0)).double()
    one, other = simulated.evaluate(at), plain.evaluate(at)
    assert torch.allclose(one.cost, UPDATE_WEIGHT * other.cost)
    assert torch.allclose(one.gradient, UPDATE_WEIGHT * other.gradient)


def test_layers_count_less_towards_the_output():
    names = ["a.weight", "a.bias", "b.0.weight", "c.weight", "c.bias"]
    assert layer_weights(names) == pytest.approx([1, 1, 0.367879, 0.135335, 0.135335], rel=1e-4)


def test_it_hands_over_one_set_of_images_for_all_epochs():
    client = Honest("convnet(width=8, stride=2)", spec())
    images, labels = batch(tiles(), 2, 1)
    view = client.weights(images, labels, lr=0.02, batch_size=1, epochs=2, shuffled=True)
    knowledge = client.knowledge("C", 2, lr=0.02, batch_size=1, epochs=2)
    attack = FedAvgLeakage(iterations=20, restarts=2)
    found = attack.reconstruct([view], knowledge)
    assert {capability.value for capability in knowledge.used} == {"updates", "basics", "details"}
    assert found.cost.gradient_evaluations == 2 * 21 * 4
    assert found.examples.shape == (2, 3, 32, 32)
    assert sorted(found.labels.tolist()) == sorted(labels.tolist())
    assert found.scores[0] == found.scores[1] < 0


def test_what_it_cannot_simulate_is_refused():
    client = Honest("lenet", spec())
    with pytest.raises(ValueError, match="inverting-gradients"):
        FedAvgLeakage().check(client.model(), "gradient")
    FedAvgLeakage().check(client.model(), "weights")
    with pytest.raises(ScenarioError, match="fedavg-counts"):
        FedAvgLeakage(labels="fedavg-count")
    view = client.weights(*batch(tiles(), 1, 0), lr=0.1)
    with pytest.raises(NotGranted, match="C"):
        FedAvgLeakage().reconstruct([view], client.knowledge("B"))


# -- figures ---------------------------------------------------------------------------------------
PEAK = """
import json, resource, sys, torch
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.local_updates import LocalUpdates, in_order
from strategies.attacks.optimization.parametrizations import Candidate
from tests.strategies.passive.honest import Honest, spec
epochs = int(sys.argv[1])
client = Honest("convnet(stride=2)", spec())
training = TrainingDetails("weights", 0.004, 5, epochs, 0.0, 0.0)
names = [name for name, _ in client.model().named_parameters()]
operator = LocalUpdates(client.model(), names, training, in_order(50, training, sets=epochs))
images = torch.rand(1, 50 * epochs, 3, 32, 32, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, _ = operator(Candidate(images, torch.zeros(1, 50 * epochs, dtype=torch.int64)))
torch.autograd.grad(sum(t.square().sum() for t in found), images)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([operator.evaluations, (after - before) / 1024]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("epochs", "most"), [(1, 128), (5, 256), (10, 512)])
def test_the_memory_of_the_papers_setting(epochs, most):
    """50 images in batches of 5: 10, 50 and 100 local steps, unrolled."""
    told = subprocess.run(
        [sys.executable, "-c", PEAK, str(epochs)],
        capture_output=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    steps, mebibytes = json.loads(told.stdout)
    print(f"{epochs} epochs, {steps} local steps of 5 images: {mebibytes:.0f} MiB")
    assert steps == 10 * epochs
    assert mebibytes < most
