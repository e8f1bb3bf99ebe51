"""The problem and the loop: T candidate batches, each moved until its gradient fits its target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.objectives import Objective
from strategies.attacks.optimization.optimizers import Optimizer
from strategies.attacks.optimization.parametrizations import Parametrization
from strategies.attacks.optimization.priors import Prior

# How often the loop says how far it is.
TELL_EVERY = 25
# A problem is stuck where its cost fell by less than this share in `patience` iterations.
LEAST_FALL = 0.1


@dataclass(frozen=True)
class Evaluation:
    """What T candidates are worth: distance ``[T]``, with priors ``[T]``, slope ``[T, n]``."""

    distance: Tensor
    cost: Tensor
    gradient: Tensor


@dataclass
class Matching:
    """T problems: variables whose images should have the observed gradients."""

    gradients: BatchGradients
    parametrization: Parametrization
    objective: Objective
    priors: Sequence[Prior] = ()

    def __post_init__(self) -> None:
        self._flat = torch.empty_like(self.objective.observed)

    def evaluate(self, variables: Tensor) -> Evaluation:
        """Evaluate ``[T, n]``: one forward pass, one back, one back through both."""
        variables = variables.detach().requires_grad_()
        images, labels = self.parametrization.decode(variables)
        gradients = self.gradients(images, labels)
        with torch.no_grad():
            rows = [gradient.reshape(len(variables), -1) for gradient in gradients]
            torch.cat(rows, dim=1, out=self._flat)
            distance, derivative = self.objective(self._flat)
            pieces = torch.split(derivative, [row.shape[1] for row in rows], dim=1)
            ends = [
                (gradient, piece.view_as(gradient))
                for gradient, piece in zip(gradients, pieces, strict=True)
                if gradient.requires_grad
            ]
            cost = distance
            for prior in self.priors:
                penalty, pull = prior(images.detach())
                cost = cost + penalty
                ends.append((images, pull))
        outputs, pulls = zip(*ends, strict=True)
        (slope,) = torch.autograd.grad(outputs, variables, pulls)
        return Evaluation(distance, cost, slope)

    def take(self, rows: Tensor) -> "Matching":
        """Return some of the problems."""
        return Matching(
            self.gradients, self.parametrization.take(rows), self.objective.take(rows), self.priors
        )


@dataclass
class Best:
    """The point of lowest cost of each problem: variables ``[T, n]``, distance and cost ``[T]``.

    A problem whose cost was never finite has the cost infinity; ``last`` ``[T]`` is the latest.
    """

    variables: Tensor
    distance: Tensor
    cost: Tensor
    last: Tensor
    evaluations: int = 0

    @classmethod
    def start(cls, variables: Tensor) -> "Best":
        """Return a record with nothing in it yet."""
        nothing = variables.new_full((len(variables),), torch.inf)
        return cls(variables.clone(), nothing, nothing.clone(), nothing.clone())

    def note(self, variables: Tensor, now: Evaluation) -> None:
        """Keep what is lower than before; the device is not waited for."""
        lower = now.cost < self.cost
        self.cost = torch.where(lower, now.cost, self.cost)
        self.distance = torch.where(lower, now.distance, self.distance)
        torch.where(lower.unsqueeze(1), variables, self.variables, out=self.variables)
        self.last = now.cost
        self.evaluations += len(variables)

    def take(self, rows: Tensor) -> "Best":
        """Return the record of some of the problems."""
        return Best(self.variables[rows], self.distance[rows], self.cost[rows], self.last[rows])

    def put(self, rows: Tensor, part: "Best") -> None:
        """Write back the record of some of the problems."""
        self.variables[rows], self.distance[rows] = part.variables, part.distance
        self.cost[rows], self.last[rows] = part.cost, part.last
        self.evaluations += part.evaluations


def minimize(
    matching: Matching,
    variables: Tensor,
    optimizer: Optimizer,
    *,
    iterations: int,
    patience: int | None = None,
    tell: Callable[[int], None] = lambda _: None,
) -> Best:
    """Move ``variables`` ``[T, n]`` in place and return each problem's best point.

    Parameters
    ----------
    matching : Matching
    variables : Tensor
    optimizer : Optimizer
        A fresh one.
    iterations : int
    patience : int or None
        Iterations in which a problem's cost must fall by a tenth, or it is left where it is.
    tell : callable
        Told now and then how many iterations are done.
    """
    best, rows = Best.start(variables), torch.arange(len(variables), device=variables.device)
    part, mark = best.take(rows), torch.full_like(best.cost, torch.inf)
    for iteration in range(iterations + 1):
        now = matching.evaluate(variables)
        part.note(variables, now)
        if iteration == iterations:
            break
        gradient = now.gradient
        if iteration and iteration % TELL_EVERY == 0:
            tell(iteration)
        if patience is not None and iteration % patience == 0:
            going = part.last.isfinite() & (part.cost < (1 - LEAST_FALL) * mark)
            mark = part.cost
            if not going.all():  # drop what goes nowhere, so that the rest goes faster
                kept = going.nonzero().squeeze(1)
                best.put(rows, part)
                if not len(kept):
                    return best
                rows, variables, gradient = rows[kept], variables[kept], gradient[kept]
                matching, part, mark = matching.take(kept), part.take(kept), mark[kept]
                optimizer.keep(kept)
        optimizer.step(variables, gradient, iteration / iterations)
        matching.parametrization.box(variables)
    best.put(rows, part)
    return best
