"""The problem and the loop: T candidate batches, each moved until its update fits its target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from strategies.attacks.optimization.activations import ActivationPrior
from strategies.attacks.optimization.convolutions import convolutions_for
from strategies.attacks.optimization.gradients import Operator
from strategies.attacks.optimization.objectives import Objective
from strategies.attacks.optimization.optimizers import Optimizer
from strategies.attacks.optimization.parametrizations import Candidate, Parametrization
from strategies.attacks.optimization.priors import Prior

# How often the loop looks up, and how often it asks the device which problems are lost.
LOOK_EVERY = 25
CHECK_EVERY = 100
# A problem is stuck where its cost fell by less than this share in `patience` iterations.
LEAST_FALL = 0.1


@dataclass(frozen=True)
class Evaluation:
    """What T candidates are worth: distance ``[T]``, with priors ``[T]``, slope ``[T, n]``."""

    distance: Tensor
    cost: Tensor
    gradient: Tensor


class Problems(Protocol):
    """T problems that the loop can work on."""

    @property
    def parametrization(self) -> Parametrization:
        """What is searched."""

    def evaluate(self, variables: Tensor, progress: float = 1.0) -> Evaluation:
        """Evaluate ``[T, n]``, ``progress`` of the way."""

    def take(self, rows: Tensor) -> Self:
        """Return some of the problems."""

    @property
    def evaluations(self) -> int:
        """How many gradients of the network one evaluation of one problem takes."""


@dataclass
class Matching:
    """T problems: variables whose images should have the observed updates.

    ``activations`` are penalties on what the operator reads: it reads their layers, in order.
    """

    operator: Operator
    parametrization: Parametrization
    objective: Objective
    priors: Sequence[Prior] = ()
    activations: Sequence[ActivationPrior] = ()

    def __post_init__(self) -> None:
        self._flat = torch.empty_like(self.objective.observed)

    @property
    def evaluations(self) -> int:
        """How many gradients of the network one evaluation of one problem takes."""
        return self.operator.evaluations

    def evaluate(self, variables: Tensor, progress: float = 1.0) -> Evaluation:
        """Evaluate ``[T, n]``: one forward pass, one back, one back through both."""
        variables = variables.detach().requires_grad_()
        candidate = self.parametrization.decode(variables)
        with convolutions_for(candidate.images, self.operator.narrow):
            return self._evaluate(variables, candidate, progress)

    def _evaluate(self, variables: Tensor, candidate: Candidate, progress: float) -> Evaluation:
        updates, inputs = self.operator(candidate)
        penalties = self._penalties(inputs, progress)
        with torch.no_grad():
            rows = [update.reshape(len(variables), -1) for update in updates]
            torch.cat(rows, dim=1, out=self._flat)
            distance, derivative = self.objective(self._flat, progress)
            pieces = torch.split(derivative, [row.shape[1] for row in rows], dim=1)
            ends = [
                (update, piece.view_as(update))
                for update, piece in zip(updates, pieces, strict=True)
                if update.requires_grad
            ]
            cost = distance
            for penalty in penalties:
                cost = cost + penalty
                ends.append((penalty, torch.ones_like(penalty)))
            for prior in self.priors:
                penalty, pull = prior(candidate.images.detach(), progress)
                cost = cost + penalty
                ends.append((candidate.images, pull))
        outputs, pulls = zip(*ends, strict=True)
        (slope,) = torch.autograd.grad(outputs, variables, pulls)
        return Evaluation(distance, cost.detach(), slope)

    def _penalties(self, inputs: Sequence[Tensor], progress: float) -> list[Tensor]:
        """Hand each activation prior what its layers saw."""
        found, first = [], 0
        for prior in self.activations:
            last = first + len(prior.layers)
            found.append(prior(inputs[first:last], progress))
            first = last
        return found

    def take(self, rows: Tensor) -> Self:
        """Return some of the problems."""
        return type(self)(
            self.operator.take(rows),
            self.parametrization.take(rows),
            self.objective.take(rows),
            [prior.take(rows) for prior in self.priors],
            [prior.take(rows) for prior in self.activations],
        )


@dataclass
class Best:
    """The point of lowest cost of each problem: variables ``[T, n]``, distance and cost ``[T]``.

    A problem whose cost was never finite has the cost infinity; ``last`` ``[T]`` is the latest
    cost, ``ended`` ``[T]`` the iterations that it took.
    """

    variables: Tensor
    distance: Tensor
    cost: Tensor
    last: Tensor
    ended: Tensor
    evaluations: int = 0

    @classmethod
    def start(cls, variables: Tensor) -> "Best":
        """Return a record with nothing in it yet."""
        nothing = variables.new_full((len(variables),), torch.inf)
        ended = torch.zeros(len(variables), dtype=torch.int64, device=variables.device)
        return cls(variables.clone(), nothing, nothing.clone(), nothing.clone(), ended)

    def note(self, variables: Tensor, now: Evaluation, evaluations: int = 1) -> None:
        """Keep what is lower than before; the device is not waited for."""
        lower = now.cost < self.cost
        self.cost = torch.where(lower, now.cost, self.cost)
        self.distance = torch.where(lower, now.distance, self.distance)
        torch.where(lower.unsqueeze(1), variables, self.variables, out=self.variables)
        self.last = now.cost
        self.ended = self.ended + 1
        self.evaluations += len(variables) * evaluations

    def forget(self) -> None:
        """Start over with what counts as best: costs mean something else from here on."""
        self.cost = torch.full_like(self.cost, torch.inf)
        self.distance = torch.full_like(self.distance, torch.inf)

    def take(self, rows: Tensor) -> "Best":
        """Return the record of some of the problems."""
        return Best(
            self.variables[rows],
            self.distance[rows],
            self.cost[rows],
            self.last[rows],
            self.ended[rows],
        )

    def put(self, rows: Tensor, part: "Best") -> None:
        """Write back the record of some of the problems."""
        self.variables[rows], self.distance[rows] = part.variables, part.distance
        self.cost[rows], self.last[rows] = part.cost, part.last
        self.ended[rows] = part.ended
        self.evaluations += part.evaluations

    def state(self) -> dict[str, Tensor]:
        """Return everything in it as tensors, by field."""
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> "Best":
        """Return what :meth:`state` gave back, as a record of its own."""
        tensors = {name: tensor.clone() for name, tensor in state.items()}
        return cls(**{**tensors, "evaluations": int(tensors["evaluations"])})  # type: ignore[arg-type]


@dataclass
class Run:
    """How far the loop is: which problems go on, where they are, and the best of all.

    ``rows`` ``[R]`` are the places of ``variables`` ``[R, n]`` and ``part`` among all problems;
    ``mark`` ``[R]`` is the cost at the last look at who is stuck.
    """

    rows: Tensor
    variables: Tensor
    part: Best
    best: Best
    mark: Tensor
    iteration: int = 0

    @classmethod
    def start(cls, variables: Tensor) -> "Run":
        """Return a run that has not moved."""
        rows = torch.arange(len(variables), device=variables.device)
        best = Best.start(variables)
        return cls(rows, variables, best.take(rows), best, torch.full_like(best.cost, torch.inf))

    def drop(self, kept: Tensor) -> None:
        """Go on with some of the problems only; the others keep their best."""
        self.best.put(self.rows, self.part)
        self.rows, self.variables, self.mark = (
            self.rows[kept],
            self.variables[kept],
            self.mark[kept],
        )
        self.part = self.part.take(kept)

    def state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return everything that it takes to go on from here."""
        parts = {
            "part": self.part.state(),
            "best": self.best.state(),
            "optimizer": optimizer.state(),
        }
        nested = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.items()}
        own = {"rows": self.rows, "variables": self.variables, "mark": self.mark}
        return {**own, "iteration": torch.tensor(self.iteration), **nested}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], optimizer: Optimizer) -> "Run":
        """Return what :meth:`state` gave back; the optimizer goes on with it."""

        def inside(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {k.removeprefix(start): t for k, t in state.items() if k.startswith(start)}

        optimizer.restore(inside("optimizer"))
        return cls(
            state["rows"],
            state["variables"].clone(),
            Best.restored(inside("part")),
            Best.restored(inside("best")),
            state["mark"],
            int(state["iteration"]),
        )


class Watch:
    """Who watches the loop; this one does nothing."""

    def __call__(self, run: Run, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Look up now and then, before a step; say whether to end it here."""
        return False


def minimize(
    problems: Problems,
    variables: Tensor,
    optimizer: Optimizer,
    *,
    iterations: int,
    patience: int | None = None,
    settled: float = 0.0,
    watch: Watch | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> Best:
    """Move ``variables`` ``[T, n]`` in place and return each problem's best point.

    A problem whose cost is not finite ends, and keeps its best.

    Parameters
    ----------
    problems : Problems
    variables : Tensor
    optimizer : Optimizer
        A fresh one.
    iterations : int
    patience : int or None
        Iterations in which a problem's cost must fall by a tenth, or it is left where it is.
    settled : float
        Share of the iterations after which the cost stays the same function: no earlier point is
        kept, for its cost meant something else.
    watch : Watch or None
    earlier : mapping or None
        The ``Run.state`` of an attempt that was cut off; it goes on from there.
    """
    run, begins = Run.start(variables), int(settled * iterations)
    if earlier:
        run = Run.restored(earlier, optimizer)
        problems = problems.take(run.rows)
    for iteration in range(run.iteration, iterations + 1):
        run.iteration = iteration
        if iteration and iteration % LOOK_EVERY == 0 and watch and watch(run, optimizer):
            break
        if iteration == begins:
            run.part.forget()
        now = problems.evaluate(run.variables, iteration / iterations)
        run.part.note(run.variables, now, problems.evaluations)
        if iteration == iterations:
            break
        gradient = now.gradient
        going = _going(run, patience)
        if going is not None and not going.all():  # the rest goes faster without them
            kept = going.nonzero().squeeze(1)
            run.drop(kept)
            if not len(kept):
                return run.best
            problems, gradient = problems.take(kept), gradient[kept]
            optimizer.keep(kept)
        optimizer.step(run.variables, gradient, iteration / iterations)
        problems.parametrization.box(run.variables)
    run.best.put(run.rows, run.part)
    return run.best


def _going(run: Run, patience: int | None) -> Tensor | None:
    """Say now and then which problems are worth going on with, ``[R]`` bool."""
    going = run.part.last.isfinite() if run.iteration % CHECK_EVERY == 0 else None
    if patience is not None and run.iteration % patience == 0:
        falling = run.part.cost < (1 - LEAST_FALL) * run.mark
        going = run.part.last.isfinite() & falling
        run.mark = run.part.cost
    return going
