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
from strategies.attacks.optimization.state import Stateful, inside, joined

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

    def state(self) -> dict[str, Tensor]:
        """Return what they remember between evaluations."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what the same problems remembered."""

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

    def _remembering(self) -> dict[str, Stateful]:
        priors = {f"prior-{place}": prior for place, prior in enumerate(self.priors)}
        return {"objective": self.objective, **priors}

    def state(self) -> dict[str, Tensor]:
        """Return what the objective and the priors remember."""
        return joined({name: part.state() for name, part in self._remembering().items()})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Let the objective and the priors go on."""
        for name, part in self._remembering().items():
            part.restore(inside(state, name))


@dataclass
class Best:
    """The point of lowest cost of each problem: variables ``[T, n]``, distance and cost ``[T]``.

    A problem whose cost was never finite has the cost infinity, and where that is so since
    :meth:`forget` it still has the variables and the distance from before; ``last`` ``[T]`` is the
    latest cost, ``ended`` ``[T]`` the iterations that it took.
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
        """Let any finite cost be lower than those so far, which meant something else."""
        self.cost = torch.full_like(self.cost, torch.inf)

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

    ``rows`` ``[R]`` are the places of ``problems``, ``variables`` ``[R, n]`` and ``part`` among all
    problems; ``mark`` ``[R]`` is the cost at the last look at who is stuck.
    """

    problems: Problems
    optimizer: Optimizer
    rows: Tensor
    variables: Tensor
    part: Best
    best: Best
    mark: Tensor
    iteration: int = 0

    @classmethod
    def start(
        cls,
        problems: Problems,
        variables: Tensor,
        optimizer: Optimizer,
        earlier: Mapping[str, Tensor] | None = None,
    ) -> "Run":
        """Return a run that has not moved, or one that goes on from an earlier :meth:`state`."""
        if earlier:
            return cls.restored(earlier, problems, optimizer)
        rows = torch.arange(len(variables), device=variables.device)
        best = Best.start(variables)
        mark = torch.full_like(best.cost, torch.inf)
        return cls(problems, optimizer, rows, variables, best.take(rows), best, mark)

    def evaluate(self, progress: float) -> Tensor:
        """Evaluate the problems where they are, note what is best, and return the slope."""
        now = self.problems.evaluate(self.variables, progress)
        self.part.note(self.variables, now, self.problems.evaluations)
        return now.gradient

    def step(self, slope: Tensor, progress: float) -> None:
        """Move along the slope ``[R, n]``, and stay in the box."""
        self.optimizer.step(self.variables, slope, progress)
        self.problems.parametrization.box(self.variables)
        self.iteration += 1

    def settle(self) -> None:
        """Let the next points count as the best, and as falling: costs mean something else now."""
        self.part.forget()
        self.best.forget()
        self.mark = torch.full_like(self.mark, torch.inf)

    def keep(self, kept: Tensor) -> None:
        """Go on with some of the problems only; the others keep their best."""
        self.best.put(self.rows, self.part)
        self.rows, self.variables, self.mark = (
            self.rows[kept],
            self.variables[kept],
            self.mark[kept],
        )
        self.part = self.part.take(kept)
        if len(kept):
            self.problems = self.problems.take(kept)
            self.optimizer.keep(kept)

    def ended(self) -> Best:
        """Return the best of all problems."""
        self.best.put(self.rows, self.part)
        return self.best

    def state(self) -> dict[str, Tensor]:
        """Return everything that it takes to go on from here."""
        parts = {
            "part": self.part.state(),
            "best": self.best.state(),
            "optimizer": self.optimizer.state(),
            "problems": self.problems.state(),
        }
        own = {"rows": self.rows, "variables": self.variables, "mark": self.mark}
        return {**own, "iteration": torch.tensor(self.iteration), **joined(parts)}

    @classmethod
    def restored(
        cls, state: Mapping[str, Tensor], problems: Problems, optimizer: Optimizer
    ) -> "Run":
        """Return what :meth:`state` gave back, of the same problems and optimizer, made afresh."""
        problems = problems.take(state["rows"])
        problems.restore(inside(state, "problems"))
        optimizer.restore(inside(state, "optimizer"))
        return cls(
            problems,
            optimizer,
            state["rows"],
            state["variables"].clone(),
            Best.restored(inside(state, "part")),
            Best.restored(inside(state, "best")),
            state["mark"],
            int(state["iteration"]),
        )


class Watch:
    """Who watches the loop; this one does nothing."""

    def __call__(self, run: Run) -> bool:  # noqa: ARG002
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

    A problem whose cost is not finite ends, and keeps its best.  ``optimizer`` is a fresh one.
    ``earlier`` is the ``Run.state`` of an attempt that was cut off: it goes on from there.

    Parameters
    ----------
    patience : int or None
        Iterations in which a problem's cost must fall by a tenth, or it is left where it is.
    settled : float
        Share of the iterations after which the cost stays the same function: an earlier point is
        kept only where no later one is finite, for its cost meant something else.
    """
    run = Run.start(problems, variables, optimizer, earlier)
    while not _called_off(run, watch):
        if run.iteration == int(settled * iterations):
            run.settle()
        progress = run.iteration / iterations
        slope = run.evaluate(progress)
        if run.iteration == iterations:
            break
        going = _going(run, patience)
        if going is not None and not going.all():  # the rest goes faster without them
            run.keep(kept := going.nonzero().squeeze(1))
            slope = slope[kept]
        if len(run.rows) == 0:
            break
        run.step(slope, progress)
    return run.ended()


def _called_off(run: Run, watch: Watch | None) -> bool:
    """Let whoever watches look up now and then, and say whether to end it here."""
    due = run.iteration > 0 and run.iteration % LOOK_EVERY == 0
    return due and watch is not None and watch(run)


def _going(run: Run, patience: int | None) -> Tensor | None:
    """Say now and then which problems are worth going on with, ``[R]`` bool."""
    going = run.part.last.isfinite() if run.iteration % CHECK_EVERY == 0 else None
    if patience is not None and run.iteration % patience == 0:
        falling = run.part.cost < (1 - LEAST_FALL) * run.mark
        going = run.part.last.isfinite() & falling
        run.mark = run.part.cost
    return going
