"""Gradient matching: find the batch whose gradient would have been the one observed.

Seven slots make an attack by optimization (:class:`Recipe`): parametrization, forward operator
(the network's gradient, :mod:`.gradients`), distance, priors, labels, optimizer with its schedule,
and the choice among restarts.  Restarts and views that share weights and batch size run as one
batch of problems, and nothing in the loop waits for the device.

Each restart keeps the point where what it minimizes (distance plus priors) was lowest.  Among
restarts the lowest distance wins: the attack's own score, never the truth.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from fedsim.attack import Cost, Reconstruction
from fedsim.data import DataSpec
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule
from strategies.attacks.optimization.groups import Group, grouped
from strategies.attacks.optimization.matching import Best, Matching, minimize
from strategies.attacks.optimization.objectives import Objective
from strategies.attacks.optimization.optimizers import Optimizer
from strategies.attacks.optimization.parametrizations import Parametrization
from strategies.attacks.optimization.priors import Prior


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
        Distance to observed gradients ``[V, P]``.
    optimizer : callable
        Makes a fresh optimizer.
    iterations : int
        At most, for each restart.
    restarts : int
        At most, for each view.
    labels : LabelRule or None
        None where the parametrization searches labels too.
    priors : callable
        Penalties on images of such data.
    converged : float or None
        A distance at which a view counts as solved: its restarts are tried one after another until
        one gets there.  None runs every restart, all at once.
    patience : int or None
        End a restart whose cost did not fall by a tenth in so many iterations.
    """

    batch_size: Callable[[ServerView], int]
    parametrization: Callable[[Group], Parametrization]
    objective: Callable[[Tensor], Objective]
    optimizer: Callable[[], Optimizer]
    iterations: int
    restarts: int = 1
    labels: LabelRule | None = None
    priors: Callable[[DataSpec], Sequence[Prior]] = lambda _: ()
    converged: float | None = None
    patience: int | None = None


@dataclass
class Tally:
    """What the whole attack has done: iterations of one problem, evaluations, receipts."""

    total: int
    tell: Callable[[int, int, str], None]
    done: int = 0
    evaluations: int = 0
    receipts: list[str] = field(default_factory=list)

    def show(self, iteration: int, problems: int) -> None:
        """Report progress: so many problems run together, at this iteration."""
        text = f"{problems} at once" if problems > 1 else ""
        self.tell(self.done + iteration * problems, self.total, text)


def invert(views: Sequence[ServerView], knowledge: Knowledge, recipe: Recipe) -> Reconstruction:
    """Run a recipe on every view and return one batch of candidates for each.

    The score of a candidate is minus the distance that its batch reached.
    """
    tally = Tally(len(views) * recipe.restarts * recipe.iterations, knowledge.progress)
    empty = torch.empty(0, dtype=torch.int64)
    images, labels, places, scores = [torch.empty(0, 1, 1, 1)], [empty], [empty], [torch.empty(0)]
    for group in grouped(views, knowledge, recipe.batch_size, recipe.labels, tally.receipts):
        parametrization = recipe.parametrization(group)
        best = solve(group, parametrization, knowledge, recipe, tally)
        alive = best.distance.isfinite().nonzero().squeeze(1)
        pictures, named = parametrization.take(alive).decode(best.variables[alive])
        images.append(pictures.clamp(0, 1).flatten(0, 1).cpu())
        named = named.argmax(dim=-1) if named.is_floating_point() else named
        labels.append(named.flatten().cpu())
        alive = alive.cpu()
        places.append(torch.tensor(group.indices)[alive].repeat_interleave(group.batch_size))
        scores.append(-best.distance.cpu()[alive].repeat_interleave(group.batch_size))
    tally.tell(tally.total, tally.total, "")
    return Reconstruction(
        examples=torch.cat(images[1:] or images),
        views=torch.cat(places),
        labels=torch.cat(labels),
        scores=torch.cat(scores[1:] or scores),
        cost=Cost(gradient_evaluations=tally.evaluations),
        receipts=tuple(tally.receipts),
    )


def solve(
    group: Group,
    parametrization: Parametrization,
    knowledge: Knowledge,
    recipe: Recipe,
    tally: Tally,
) -> Best:
    """Return the best restart of each view of a group."""
    observed, priors = group.observed, recipe.priors(group.spec)
    matching = Matching(group.gradients, parametrization, recipe.objective(observed), priors)
    blank = parametrization.start(torch.Generator()).to(observed)
    best = Best.start(blank.expand(len(group.views), -1))
    tried, lost = Counter[int](), Counter[int]()
    for wave in range(recipe.restarts):
        jobs = _jobs(wave, best, recipe)
        for some in (jobs[i : i + group.at_once] for i in range(0, len(jobs), group.at_once)):
            names = [(group.views[view].label, "start", again) for view, again in some]
            starts = [parametrization.start(knowledge.generator(*name)) for name in names]
            rows = torch.tensor([view for view, _ in some], device=observed.device)
            result = minimize(
                matching.take(rows),
                torch.stack(starts).to(observed),
                recipe.optimizer(),
                iterations=recipe.iterations,
                patience=recipe.patience,
                tell=partial(tally.show, problems=len(some)),
            )
            tally.done += recipe.iterations * len(some)
            tally.show(0, 0)
            tally.evaluations += result.evaluations
            tried.update(rows.tolist())
            lost.update(rows[~result.last.isfinite()].tolist())
            _choose(best, rows, result)
    for view, label in enumerate(one.label for one in group.views):
        tally.receipts.append(_receipt(label, tried[view], lost[view], best.distance[view].item()))
    return best


def _jobs(wave: int, best: Best, recipe: Recipe) -> list[tuple[int, int]]:
    """Return the next (view, restart) to run: all at once, or one for each view not yet done."""
    if recipe.converged is not None:
        unsolved = (best.distance >= recipe.converged).nonzero().flatten()
        return [(view, wave) for view in unsolved.tolist()]
    views = range(len(best.distance)) if wave == 0 else range(0)
    return [(view, again) for view in views for again in range(recipe.restarts)]


def _choose(best: Best, rows: Tensor, result: Best) -> None:
    """Let each restart that is nearer than what its view had take its place."""
    for job, view in enumerate(rows.tolist()):
        if result.distance[job] < best.distance[view]:
            best.put(rows[job : job + 1], result.take(torch.tensor([job], device=rows.device)))


def _receipt(label: str, tried: int, lost: int, distance: float) -> str:
    """Say what became of one view's restarts."""
    text = f"{label}: {tried} restart{'s' * (tried != 1)}"
    if lost:
        text += f", {lost} of them ended not finite"
    return f"{text}; " + (f"distance {distance:.3g}" if isfinite(distance) else "nothing found")
