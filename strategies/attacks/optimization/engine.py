"""Gradient matching: find the batch whose update would have been the one observed.

Seven slots make an attack by optimization (:class:`Recipe`): parametrization, operator
(the network's gradient or unrolled local training), distance, priors, labels, optimizer with its
schedule, and the choice among restarts.  Restarts and views that share weights and batch size run
as one batch of problems, and nothing in the loop waits for the device, but for noise of each
problem's own, which is drawn on the CPU.

Each restart keeps the point where what it minimizes (distance plus priors) was lowest.  Among
restarts the lowest distance wins: the attack's own score, never the truth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from fedsim.attack import Reconstruction
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule
from strategies.attacks.optimization.activations import ActivationPrior
from strategies.attacks.optimization.gradients import BatchGradients, Operator
from strategies.attacks.optimization.groups import Group, grouped
from strategies.attacks.optimization.matching import Best, Matching, Problems, minimize
from strategies.attacks.optimization.objectives import Objective
from strategies.attacks.optimization.optimizers import Optimizer
from strategies.attacks.optimization.parametrizations import Parametrization
from strategies.attacks.optimization.priors import Prior
from strategies.attacks.optimization.tally import Findings, Tally

# One restart: the label of its view, and which of the view's restarts it is.
Job = tuple[str, int]


def one_gradient(group: Group, layers: Sequence[str]) -> Operator:
    """Return the network's gradient, the operator of one step."""
    return BatchGradients(group.model, group.names, layers)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One paper's choice for every slot.

    Attributes
    ----------
    batch_size : callable
        How many examples the attacker takes a view to be of.
    parametrization : callable
        What is searched, for one group of views.
    objective : callable
        Distance to the observed updates of a group, ``group.observed``.
    optimizer : callable
        Makes a fresh one for the restarts that run together, in their order.
    iterations : int
        At most, for each restart.
    operator : callable
        What clients do, for one group and the layers to read on the way.
    restarts : int
        At most, for each view.
    labels : LabelRule or None
        None where the parametrization searches labels too.
    priors : callable
        Penalties on images, for one group.
    activations : callable
        Penalties on what layers see, for one group.
    converged : float or None
        A distance at which a view counts as solved: its restarts are tried one after another until
        one gets there.  None runs every restart, all at once.
    patience : int or None
        End a restart whose cost did not fall by a tenth in so many iterations.
    settled : float
        Share of the iterations after which the cost no longer changes its meaning: later points
        come before earlier ones.  For schedules that switch priors on.
    together : bool
        Whether the restarts of a view see each other (a prior on their consensus): they then run
        as one batch, however many images that is.
    """

    batch_size: Callable[[ServerView], int]
    parametrization: Callable[[Group], Parametrization]
    objective: Callable[[Group], Objective]
    optimizer: Callable[[Sequence[Job]], Optimizer]
    iterations: int
    operator: Callable[[Group, Sequence[str]], Operator] = one_gradient
    restarts: int = 1
    labels: LabelRule | None = None
    priors: Callable[[Group], Sequence[Prior]] = lambda _: ()
    activations: Callable[[Group], Sequence[ActivationPrior]] = lambda _: ()
    converged: float | None = None
    patience: int | None = None
    settled: float = 0.0
    together: bool = False


def invert(views: Sequence[ServerView], knowledge: Knowledge, recipe: Recipe) -> Reconstruction:
    """Run a recipe on every view and return one batch of candidates for each.

    The score of a candidate is minus the distance that its batch reached.
    """
    tally = Tally(len(views) * recipe.restarts * recipe.iterations, knowledge)
    findings = Findings()
    for group in grouped(views, knowledge, recipe.batch_size, recipe.labels, tally.receipts):
        problems = matching(group, recipe)
        labels = [view.label for view in group.views]
        best = solve(problems, labels, recipe, tally, like=group.observed, at_once=group.at_once)
        findings.add(best, problems.parametrization, group.indices)
    return findings.reconstruction(tally)


def matching(group: Group, recipe: Recipe) -> Matching:
    """Put a recipe's parts together for one group of views."""
    activations = recipe.activations(group)
    layers = [layer for prior in activations for layer in prior.layers]
    return Matching(
        recipe.operator(group, layers),
        recipe.parametrization(group),
        recipe.objective(group),
        recipe.priors(group),
        activations,
    )


def solve(
    problems: Problems,
    labels: Sequence[str],
    recipe: Recipe,
    tally: Tally,
    *,
    like: Tensor,
    at_once: int,
) -> Best:
    """Return the best restart of each target.

    Parameters
    ----------
    problems : Problems
        One for each target.
    labels : sequence of str
        What targets are called.
    recipe : Recipe
        Says how often, how long and by which optimizer.
    tally : Tally
    like : Tensor
        Whose device and type variables have.
    at_once : int
        How many problems to run as one batch.
    """
    blank = problems.parametrization.start(torch.Generator()).to(like)
    best = Best.start(blank.expand(len(labels), -1))
    ends = [Ends() for _ in labels]
    for wave in range(recipe.restarts):
        for batch in _batches(_jobs(wave, best, recipe), recipe, at_once):
            if tally.stopped:
                break
            rows = torch.tensor([target for target, _ in batch], device=like.device)
            jobs = [(labels[target], again) for target, again in batch]
            result = _run(problems.take(rows), jobs, like, recipe, tally)
            _count(ends, rows, result, recipe.iterations)
            _choose(best, rows, result)
    for label, end, distance in zip(labels, ends, best.distance.tolist(), strict=True):
        tally.receipts.append(end.receipt(label, distance, stopped=tally.stopped))
    return best


def _run(
    problems: Problems,
    jobs: Sequence[Job],
    like: Tensor,
    recipe: Recipe,
    tally: Tally,
) -> Best:
    """Run one batch of restarts, or take over what an earlier attempt did of it."""
    with tally.batch(jobs, recipe.iterations, like.device) as batch:
        if batch.finished is not None:
            return batch.finished
        starts = [
            problems.parametrization.start(tally.knowledge.generator(label, "start", again))
            for label, again in jobs
        ]
        batch.finished = minimize(
            problems,
            torch.stack(starts).to(like),
            recipe.optimizer(jobs),
            iterations=recipe.iterations,
            patience=recipe.patience,
            settled=recipe.settled,
            watch=batch,
            earlier=batch.earlier,
        )
        return batch.finished


def _jobs(wave: int, best: Best, recipe: Recipe) -> list[tuple[int, int]]:
    """Return the next (target, restart) to run: all at once, or one for each not yet done."""
    if recipe.converged is not None:
        unsolved = (best.distance >= recipe.converged).nonzero().flatten()
        return [(target, wave) for target in unsolved.tolist()]
    targets = range(len(best.distance)) if wave == 0 else range(0)
    return [(target, again) for target in targets for again in range(recipe.restarts)]


def _batches(
    jobs: Sequence[tuple[int, int]], recipe: Recipe, at_once: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Return the jobs in batches of at most ``at_once``; restarts that see each other in one."""
    if recipe.together:
        at_once = max(at_once // recipe.restarts, 1) * recipe.restarts
    return (jobs[first : first + at_once] for first in range(0, len(jobs), at_once))


def _choose(best: Best, rows: Tensor, result: Best) -> None:
    """Let each restart that is nearer than what its target had take its place.

    One whose schedule settled comes before one that has only a point from before.
    """
    for job, target in enumerate(rows.tolist()):
        if _rank(result, job) < _rank(best, target):
            best.put(rows[job : job + 1], result.take(torch.tensor([job], device=rows.device)))


def _rank(best: Best, row: int) -> tuple[bool, float]:
    return not best.cost[row].isfinite(), best.distance[row].item()


@dataclass
class Ends:
    """How many restarts of one target were tried, ended not finite, or before their time."""

    tried: int = 0
    lost: int = 0
    stuck: int = 0

    def receipt(self, label: str, distance: float, *, stopped: bool) -> str:
        """Say what became of them; who was stopped by hand was not stuck."""
        text = f"{label}: {self.tried} restart{'s' * (self.tried != 1)}"
        if self.lost:
            text += f", {self.lost} of them ended not finite"
        if self.stuck and not stopped:
            text += f", {self.stuck} of them on a plateau"
        return f"{text}; " + (f"distance {distance:.3g}" if isfinite(distance) else "nothing found")


def _count(ends: Sequence[Ends], rows: Tensor, result: Best, iterations: int) -> None:
    """Count how one batch of restarts ended, by target."""
    finite, early = result.last.isfinite().tolist(), (result.ended <= iterations).tolist()
    for job, target in enumerate(rows.tolist()):
        ends[target].tried += 1
        ends[target].lost += not finite[job]
        ends[target].stuck += finite[job] and early[job]
