"""How fast gradients are matched, beside a plain PyTorch loop of the same objective.

    python tests/benchmarks/gradient_matching.py [--models lenet convnet] [--together 16]

The objective is that of Inverting Gradients at batch size 1 on photo-tiles 32 x 32: cosine over
all parameters, total variation, signed Adam, box.  The plain loop is what a careful person writes
with autograd: one flat vector, ``torch.optim.Adam``, the gradient with respect to the image only.
Both take turns in one process; printed are milliseconds per target and iteration (the fastest
turn), wall and CPU, and how many times faster the engine is by the median of the turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.data import load_dataset
from fedsim.models import initial_model
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.matching import Matching, minimize
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import ig_steps

TURNS, TV = 9, 1e-4


class Case:
    """Targets that share a model: images ``[T, 1, C, H, W]`` and their gradients ``[T, P]``."""

    def __init__(self, expression: str, targets: int) -> None:
        dataset = load_dataset("photo-tiles")
        self.spec = dataset.spec
        self.model = initial_model(expression, self.spec, 0).eval()
        images, self.labels = dataset.train.batch(torch.arange(targets) * 37)
        self.observed = torch.stack(
            [self._gradient(images[i : i + 1], self.labels[i : i + 1]) for i in range(targets)]
        )

    def _gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(self.model(images), labels)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def plain(self, iterations: int) -> Tensor:
        """Match the first target with autograd alone."""
        parameters = list(self.model.parameters())
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.spec.mean, self.spec.std))
        low, high = -mean / std, (1 - mean) / std
        observed = self.observed[0] / self.observed[0].norm()
        x = torch.randn(1, *self.spec.shape, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        for iteration in range(iterations):
            loss = cross_entropy(self.model(x * std + mean), self.labels[:1])
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            cost = 1 - flat @ observed / flat.norm()
            cost = cost + TV * (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())
            (x.grad,) = torch.autograd.grad(cost, x)
            x.grad.sign_()
            optimizer.param_groups[0]["lr"] = 0.1 * ig_steps(iteration / iterations)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(low, high)
        return x.detach().flatten(1)

    def engine(self, targets: int, iterations: int) -> Tensor:
        """Match so many targets together."""
        labels = self.labels[:targets].unsqueeze(1)
        parametrization = NormalizedPixels(self.spec, labels, torch.float32, boxed=True)
        start = parametrization.start(torch.Generator().manual_seed(0))
        matching = Matching(
            BatchGradients(self.model, [name for name, _ in self.model.named_parameters()]),
            parametrization,
            Cosine(self.observed[:targets]),
            [TotalVariation(TV, self.spec.std)],
        )
        variables = start.expand(targets, -1).clone()
        minimize(
            matching, variables, Adam(0.1, signed=True, schedule=ig_steps), iterations=iterations
        )
        return variables


def clocked(run: Callable[[int], Tensor], iterations: int) -> tuple[float, float]:
    """Return wall and CPU milliseconds an iteration."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(iterations)
    return (
        (time.perf_counter() - wall) / iterations * 1e3,
        (time.process_time() - cpu) / iterations * 1e3,
    )


def compare(expression: str, together: int, iterations: int) -> None:
    """Print the figures of one model."""
    case = Case(expression, together)
    runs: dict[str, tuple[Callable[[int], Tensor], int]] = {
        "plain loop, 1 target": (case.plain, 1),
        "engine, 1 target": (lambda n: case.engine(1, n), 1),
        f"engine, {together} targets": (lambda n: case.engine(together, n), together),
    }
    for run, _ in runs.values():
        run(3)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, (run, targets) in runs.items():
            wall, cpu = clocked(run, iterations)
            turns[name].append((wall / targets, cpu / targets))
    plain = turns["plain loop, 1 target"]
    print(f"{expression}: {case.observed.shape[1]} parameters, {torch.get_num_threads()} threads")
    for name, figures in turns.items():
        wall, cpu = (min(turn[clock] for turn in figures) for clock in (0, 1))
        faster = [
            statistics.median(a[clock] / b[clock] for a, b in zip(plain, figures, strict=True))
            for clock in (0, 1)
        ]
        print(
            f"  {name:22s} {wall:7.2f} ms wall {cpu:7.2f} ms CPU   "
            f"{faster[0]:5.2f} x wall {faster[1]:5.2f} x CPU"
        )


def main() -> None:
    """Compare each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=["lenet", "convnet"])
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for expression in arguments.models:
        compare(expression, arguments.together, arguments.iterations)


if __name__ == "__main__":
    main()
