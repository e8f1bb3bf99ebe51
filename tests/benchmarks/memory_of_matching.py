"""How much memory gradient matching takes: a batch of 224 x 224 images on ResNet-18.

    python tests/benchmarks/memory_of_matching.py [--model resnet18] [--side 224] [--batch 8]
        [--iterations 3] [--attack inverting-gradients|see-through-gradients]

The batch is random, the network untrained; one process does nothing else.  Printed are the highest
resident size of the process before and after the iterations, and seconds an iteration.
"""

import argparse
import resource
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedsim.data import DataSpec
from fedsim.models import initial_model
from fedsim.models.statistics import layer_statistics
from strategies.attacks.optimization.activations import BatchNormDistance
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.matching import Matching, minimize
from strategies.attacks.optimization.objectives import Cosine, LayerDistances
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import TotalVariation


def highest() -> float:
    """Return the highest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def problem(attack: str, model: nn.Module, spec: DataSpec, batch: int) -> Matching:
    """Return the matching that an attack would run on one update."""
    images = torch.rand(batch, *spec.shape)
    labels = torch.arange(batch)
    loss = cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    observed = torch.cat([gradient.flatten() for gradient in found]).unsqueeze(0)
    names = [name for name, _ in model.named_parameters()]
    search = NormalizedPixels(spec, labels.unsqueeze(0), torch.float32, boxed=True)
    priors = [TotalVariation(1e-4, spec.std)]
    if attack == "inverting-gradients":
        return Matching(BatchGradients(model, names), search, Cosine(observed), priors)
    distance = BatchNormDistance(0.1, [layer_statistics(model, images)])
    gradients = BatchGradients(model, names, distance.layers)
    objective = LayerDistances(observed, [gradient.numel() for gradient in found])
    return Matching(gradients, search, objective, priors, [distance])


def main() -> None:
    """Run a few iterations and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--attack", default="inverting-gradients")
    given = parser.parse_args()
    spec = DataSpec((3, given.side, given.side), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = initial_model(given.model, spec, 0).eval()
    matching = problem(given.attack, model, spec, given.batch)
    before, started = highest(), time.perf_counter()
    start = matching.parametrization.start(torch.Generator().manual_seed(0)).unsqueeze(0)
    minimize(matching, start, Adam(0.1, signed=True), iterations=given.iterations)
    seconds = (time.perf_counter() - started) / (given.iterations + 1)
    print(
        f"{given.attack}, {given.model}, {given.batch} images of {given.side} x {given.side}: "
        f"{before:.2f} GiB before, {highest():.2f} GiB at most, {seconds:.1f} s an iteration"
    )


if __name__ == "__main__":
    main()
