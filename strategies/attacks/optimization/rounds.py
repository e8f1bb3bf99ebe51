"""Several updates of one batch: the same images, seen under the weights of several rounds.

A client that trains on the same examples every round answers each model with a gradient of the
same images (Xu et al. 2022; Li et al. 2023).  One set of variables is matched with all of them;
how the slopes of the rounds become one is the attack's choice.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fedsim.attack import Reconstruction, Setting
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.engine import Recipe, matching, solve
from strategies.attacks.optimization.groups import Group, alike, grouped, joined_groups
from strategies.attacks.optimization.matching import Evaluation, Matching
from strategies.attacks.optimization.parametrizations import Parametrization
from strategies.attacks.optimization.state import inside, joined
from strategies.attacks.optimization.tally import Findings, Tally

Combine = Callable[[Tensor], Tensor]


def mean(of_rounds: Tensor) -> Tensor:
    """Return the mean over rounds of ``[R, T, ...]``."""
    return of_rounds.mean(dim=0)


def median(of_rounds: Tensor) -> Tensor:
    """Return the coordinate-wise median over rounds, which one wrong round cannot move far."""
    ranked, last = of_rounds.sort(dim=0).values, len(of_rounds) - 1
    return (ranked[last // 2] + ranked[last - last // 2]) / 2


def trimmed_mean(of_rounds: Tensor) -> Tensor:
    """Return the mean over rounds without the highest and the lowest fifth (at least one)."""
    rounds = len(of_rounds)
    cut = max(1, rounds // 5) if rounds > 2 else 0
    return of_rounds.sort(dim=0).values[cut : rounds - cut].mean(dim=0)


@dataclass
class Rounds:
    """The same problems under the weights of several rounds."""

    matchings: Sequence[Matching]
    slopes: Combine
    costs: Combine

    @property
    def parametrization(self) -> Parametrization:
        """What is searched, the same in every round."""
        return self.matchings[0].parametrization

    @property
    def evaluations(self) -> int:
        """How many gradients of the network one evaluation of one problem takes."""
        return sum(matching.evaluations for matching in self.matchings)

    def evaluate(self, variables: Tensor, progress: float = 1.0) -> Evaluation:
        """Evaluate ``[T, n]`` in every round, and combine."""
        found = [matching.evaluate(variables, progress) for matching in self.matchings]
        return Evaluation(
            self.costs(torch.stack([each.distance for each in found])),
            self.costs(torch.stack([each.cost for each in found])),
            self.slopes(torch.stack([each.gradient for each in found])),
        )

    def take(self, rows: Tensor) -> Self:
        """Return some of the problems."""
        some = [matching.take(rows) for matching in self.matchings]
        return type(self)(some, self.slopes, self.costs)

    def state(self) -> dict[str, Tensor]:
        """Return what the problems of each round remember."""
        return joined({str(place): each.state() for place, each in enumerate(self.matchings)})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Let the problems of each round go on."""
        for place, each in enumerate(self.matchings):
            each.restore(inside(state, str(place)))


def same_batch_every_round(setting: Setting) -> None:
    """Refuse clients that answer each round on another batch (``ValueError``)."""
    training, most = setting.training, max(setting.examples)
    if training.kind == "gradient" and training.batch_size < most:
        raise ValueError(
            "a client draws another batch every round, and there are no images that all its "
            f"gradients are of; let batch_size be what a client holds, {most}, or use fedavg(...)"
        )


def invert_rounds(
    views: Sequence[ServerView],
    knowledge: Knowledge,
    recipe: Recipe,
    slopes: Combine = mean,
    costs: Combine = mean,
    *,
    one_prior: bool = False,
) -> Reconstruction:
    """Invert all updates of each sender together; candidates count for its first view.

    Parameters
    ----------
    views, knowledge, recipe
        As :func:`~.engine.invert` takes them.
    slopes, costs : callable
        Combine the slopes ``[R, T, n]``, and the distances and costs ``[R, T]``, of the rounds.
    one_prior : bool
        Whether priors are beside the sum over rounds, not beside each round: the mean then has
        ``1 / R`` of them.
    """
    senders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, view in enumerate(views):
        senders[view.senders].append(index)
    tally = Tally(len(senders) * recipe.restarts * recipe.iterations, knowledge)
    findings = Findings()
    of_senders = (
        _of_each_round([(index, views[index]) for index in indices], knowledge, recipe, tally)
        for indices in senders.values()
    )
    for groups in _together(groups for groups in of_senders if groups):
        first = replace(groups[0], labels=_agreed([group.labels for group in groups]))
        others = replace(recipe, priors=lambda _: ()) if one_prior else recipe
        matchings = [matching(first, recipe), *(matching(group, others) for group in groups[1:])]
        for other in matchings[1:]:
            other.parametrization = matchings[0].parametrization
        problems = Rounds(matchings, slopes, costs)
        more = f" and {len(groups) - 1} more" if groups[1:] else ""
        labels = [view.label + more for view in first.views]
        best = solve(problems, labels, recipe, tally, like=first.observed, at_once=first.at_once)
        findings.add(best, problems.parametrization, first.indices)
    return findings.reconstruction(tally)


def _of_each_round(
    views: Sequence[tuple[int, ServerView]], knowledge: Knowledge, recipe: Recipe, tally: Tally
) -> list[Group]:
    """Return a group of one view for each round that says something of as many examples."""
    groups: list[Group] = []
    for index, view in views:
        for group in grouped([view], knowledge, recipe.batch_size, recipe.labels, tally.receipts):
            if groups and group.batch_size != groups[0].batch_size:
                tally.receipts.append(f"{view.label}: of another number of examples; left out")
                continue
            groups.append(replace(group, indices=(index,)))
    return groups


def _together(of_senders: Iterable[list[Group]]) -> Iterator[list[Group]]:
    """Yield the rounds of neighboring senders as one, where all got the same in each round."""
    waiting: list[list[Group]] = []
    for groups in of_senders:
        full = len(waiting) >= groups[0].at_once
        if waiting and (full or not _same_rounds(groups, waiting[0])):
            yield [joined_groups(of_round) for of_round in zip(*waiting, strict=True)]
            waiting = []
        waiting.append(groups)
    if waiting:
        yield [joined_groups(of_round) for of_round in zip(*waiting, strict=True)]


def _same_rounds(some: Sequence[Group], others: Sequence[Group]) -> bool:
    """Say whether two senders were sent the same model in as many rounds, for as many examples."""
    return (
        len(some) == len(others)
        and some[0].batch_size == others[0].batch_size
        and all(alike(a.views[0], b.views[0]) for a, b in zip(some, others, strict=True))
    )


def _agreed(of_rounds: Sequence[Tensor | None]) -> Tensor | None:
    """Return the labels ``[V, B]``, in order, that most rounds give a view; of some, any."""
    given = [labels.sort(dim=1).values for labels in of_rounds if labels is not None]
    if not given:
        return None
    chosen = []
    for of_view in torch.stack(given, dim=1):
        kinds, counts = of_view.unique(dim=0, return_counts=True)
        chosen.append(kinds[counts.argmax()])
    return torch.stack(chosen)
