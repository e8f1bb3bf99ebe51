"""E2EGI: seeds that first search alone, then trade single images, then end as one batch.

``min_x 1 - cos(F(x), g) + a_tv TV(x) + a_bn sum_l (||mu_l(x) - mu_l|| + ||var_l(x) - var_l||)`` by
Adam on the sign of the slope, with half a cosine and noise on the pixels.  Its minimum loss
combinatorial optimization (MLCO):

1. 30 % of the iterations: every seed alone.
2. 30 %, in blocks: before each, a group batch is put together slot by slot.  It starts as the seed
   whose gradient fits best; each slot then takes the seed's image there with which the gradient of
   the whole batch fits best.  In the block every seed is drawn to it, ``a_c mean |x - group|^2``.
3. 40 %: from the last group batch on, one search.

A view's receipt ends with the gradient information ratio (GInfoR) of each image found: its share in
the gradient observed.

Li et al., "E2EGI: End-to-End Gradient Inversion in Federated Learning",
IEEE JBHI 2023, and the authors' code.  Their weights were found on victims of the attacker's own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.attack import Paper, Reconstruction, ToyCase
from fedsim.registry import register
from fedsim.threat import THREAT_MODELS, Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.activations import BatchNormDistance
from strategies.attacks.optimization.engine import Recipe, matching
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.groups import Group, grouped
from strategies.attacks.optimization.matching import Best, Matching, minimize
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam, Langevin, Optimizer
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import Differentiated, TotalVariation
from strategies.attacks.optimization.schedules import cosine
from strategies.attacks.optimization.tally import Findings, Tally
from strategies.attacks.statistics.attack import TakesStatistics

Weight = Annotated[float, Field(ge=0)]
ALONE, TRADING, ONE = 0.3, 0.3, 0.4  # shares of the iterations
BLOCK = 1_000 / 24_000
LOWEST = 1e-3  # where the rate ends


@register("attack", "e2egi")
@dataclass(frozen=True, kw_only=True)
class E2EGI(TakesStatistics):
    """Threat model E.  Cost: ``iterations * (0.6 seeds + 0.4)`` evaluations a view, and the trades.

    A trade before each block costs ``seeds`` evaluations for each image, and as many again; the
    information ratio costs one for each image.

    Parameters
    ----------
    iterations : int
        In all three phases.
    seeds : int
        That search alone and trade.
    tv : float
        Weight of the total variation.
    batchnorm : float
        Weight of the BatchNorm distance; 0 for none, and then ``statistics`` is not asked.
    group : float
        Weight of the mean squared distance to the group batch.
    lr : float
        Adam's rate at the start.
    noise : float
        Standard deviation of the noise after each step, times the rate.
    statistics : str
        Whose BatchNorm statistics: ``running``, ``proxy``, ``recovered``, ``oracle`` (a grant).
    labels : str
        Label rule expression: ``e2egi``, ``analytic``, ``oracle`` (a grant).
    """

    paper: ClassVar = Paper(
        title="E2EGI: End-to-End Gradient Inversion in Federated Learning",
        authors="Zhaohua Li et al.",
        venue="IEEE Journal of Biomedical and Health Informatics",
        year=2023,
        published="labels: 81 % right where 96 % repeat, 27 points above rules before it "
        "(abstract); images: ImageNet, ResNet-50, batches of 8 to 256, no figure at hand",
        measured="CIFAR-10, convnet(width=16, norm='batch') after 30 steps, two images, 4 seeds, "
        "400 iterations, 3 batches, true labels: 17.7 dB without BatchNorm, running / exact "
        "statistics 9.5 / 11.2 at the authors' weight, 12.8 / 17.4 at 1e-3; inverting-gradients at "
        "like cost 16.3, mean image 12.0 (FEDSIM_TEST_DATA=... python -m pytest -m slow -s "
        "tests/strategies/passive/test_e2egi.py). Clients in train mode: scenarios/e2egi.toml 11.9 "
        "dB, scenarios/e2egi_oracle.toml 13.2, floor 13.6",
    )
    needs: ClassVar = THREAT_MODELS["E"]
    unit: ClassVar = "iterations"
    toy: ClassVar = ToyCase(
        scenario={
            "threat-model": "E",
            "attack": "e2egi(iterations=300, seeds=2, batchnorm=1e-3, statistics='proxy', "
            "labels='analytic')",
            "model.name": "convnet(stride=2, norm='batch')",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=2, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=17.0,
        high=40.0,
    )

    iterations: Annotated[int, Field(ge=10)] = 24_000
    seeds: Annotated[int, Field(ge=1)] = 8
    tv: Weight = 0.0114
    batchnorm: Weight = 0.0357
    group: Weight = 0.01
    lr: Annotated[float, Field(gt=LOWEST)] = 0.1046
    noise: Weight = 0.2
    statistics: str = "running"
    labels: str = "e2egi"

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""
        recipe = self.recipe(knowledge)
        searches = Searches(self, knowledge, len(views))
        tally, findings = searches.tally, Findings()
        for group in grouped(views, knowledge, recipe.batch_size, recipe.labels, tally.receipts):
            problems = matching(group, recipe)
            for index in range(len(group.views)):
                view = problems.take(torch.tensor([index]))
                best = searches.of_a_view(view, group.observed[index], group.views[index].label)
                findings.add(best, view.parametrization, group.indices[index : index + 1])
        return findings.reconstruction(tally)

    def recipe(self, knowledge: Knowledge) -> Recipe:
        """Return the paper's choice for every slot that has nothing to do with the phases."""

        def distances(group: Group) -> list[BatchNormDistance]:
            if not self.batchnorm:
                return []
            wanted = [self.source.statistics(v, group.model, knowledge) for v in group.views]
            return [BatchNormDistance(self.batchnorm, wanted)]

        return Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            parametrization=lambda group: NormalizedPixels(
                group.spec, group.known_labels, group.observed.dtype, boxed=True
            ),
            objective=lambda group: Cosine(group.observed),
            priors=lambda group: [TotalVariation(self.tv, group.spec.std)] * (self.tv > 0),
            activations=distances,
            optimizer=lambda _: Adam(self.lr, signed=True),
            iterations=self.iterations,
        )


@dataclass(frozen=True)
class Phase:
    """Where a phase is in the whole: the share of iterations before it, its own iterations."""

    before: float
    iterations: int


def phases(iterations: int) -> tuple[Phase, list[Phase], Phase]:
    """Return the search alone, the blocks between trades, and the search as one."""
    count = max(round(TRADING / BLOCK), 1)
    alone, one = max(round(ALONE * iterations), 1), max(round(ONE * iterations), 1)
    left = max(iterations - alone - one, 1)
    size = ceil(left / min(count, left))
    sizes = [min(size, left - done) for done in range(0, left, size)]
    blocks = [Phase((alone + i * size) / iterations, n) for i, n in enumerate(sizes)]
    return Phase(0.0, alone), blocks, Phase(1 - one / iterations, one)


class Searches:
    """The three phases, for one view after another."""

    def __init__(self, attack: E2EGI, knowledge: Knowledge, views: int) -> None:
        self.attack, self.knowledge = attack, knowledge
        self.alone, self.blocks, self.one = phases(attack.iterations)
        many = self.alone.iterations + sum(block.iterations for block in self.blocks)
        self.tally = Tally(views * (attack.seeds * many + self.one.iterations), knowledge)

    def of_a_view(self, view: Matching, observed: Tensor, label: str) -> Best:
        """Return the one batch in which a view's seeds end.

        Parameters
        ----------
        view : Matching
            One problem.
        observed : Tensor
            ``[P]``: the gradient.
        label : str
            What the view is called.
        """
        seeds = view.take(torch.zeros(self.attack.seeds, dtype=torch.int64))
        at = torch.stack(
            [
                view.parametrization.start(self.knowledge.generator(label, "start", seed))
                for seed in range(self.attack.seeds)
            ]
        ).to(view.objective.observed)
        at = self._run(seeds, at, self.alone, label).variables
        for block in self.blocks:
            group, _ = self._trade(seeds, at)
            pull = Toward(self.attack.group, seeds.parametrization.decode(group).images)
            at = self._run(replace(seeds, priors=[*seeds.priors, pull]), at, block, label).variables
        group, distances = self._trade(seeds, at)
        best = self._run(view, group, self.one, label)
        self.tally.receipts.append(
            f"{label}: {self.attack.seeds} seeds, {len(self.blocks)} blocks; traded from distance "
            f"{distances[0]:.3g} to {distances[-1]:.3g}; distance {best.distance.item():.3g}; "
            f"{self._information(view, best.variables, observed)}"
        )
        return best

    def _information(self, view: Matching, at: Tensor, observed: Tensor) -> str:
        """Say who makes up how much, in the order of the images."""
        along = torch.stack([gradient @ observed for gradient in image_gradients(view, at)])
        self.tally.evaluations += len(along)
        shares = ", ".join(f"{share:.0%}" for share in information_ratios(along).tolist())
        return f"shares of the gradient, image by image: {shares}"

    def _run(self, problems: Matching, at: Tensor, phase: Phase, label: str) -> Best:
        """Run a phase, or take over what an earlier attempt did of it."""
        jobs = [(label, seed) for seed in range(len(at))]
        with self.tally.batch(jobs, phase.iterations, at.device) as batch:
            if batch.finished is None:
                batch.finished = minimize(
                    problems,
                    at.clone(),
                    self._optimizer(phase, label, len(at)),
                    iterations=1 if self.tally.stopped else phase.iterations,
                    watch=batch,
                    earlier=batch.earlier,
                )
            return batch.finished

    def _optimizer(self, phase: Phase, label: str, seeds: int) -> Optimizer:
        """Return Adam and its noise, with a rate that is that of the whole."""
        attack, share = self.attack, phase.iterations / self.attack.iterations
        whole = cosine(lowest=LOWEST / attack.lr)

        def rate(progress: float) -> float:
            return whole(min(phase.before + progress * share, 1.0))

        adam = Adam(attack.lr, signed=True, schedule=rate)
        if not attack.noise:
            return adam
        noise = [self.knowledge.generator(label, "noise", phase.before, s) for s in range(seeds)]
        return Langevin(adam, lambda progress: attack.noise * attack.lr * rate(progress), noise)

    def _trade(self, seeds: Matching, at: Tensor) -> tuple[Tensor, list[float]]:
        """Put a group batch together, and count what that costs."""

        def distance(variables: Tensor) -> Tensor:
            self.tally.evaluations += len(variables) * seeds.evaluations
            return seeds.evaluate(variables).distance

        return traded(at, seeds.parametrization.decode(at).images.shape[1], distance)


def traded(
    at: Tensor, slots: int, distance: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[float]]:
    """Put a batch together from seeds, slot by slot, whose distance does not rise.

    Parameters
    ----------
    at : Tensor
        ``[S, n]``: the variables of the seeds, slot after slot.
    slots : int
        Images in a batch.
    distance : callable
        Of the gradient of each of S batches ``[S, n]``, ``[S]``.

    Returns
    -------
    tuple
        The batch ``[1, n]``, and the distance at first and after each slot.
    """
    distances = distance(at).nan_to_num(nan=torch.inf)
    least = int(distances.argmin())
    group, path = at[least].view(slots, -1).clone(), [distances[least].item()]
    images = at.view(len(at), slots, -1)
    for slot in range(slots):
        tried = group.expand(len(at), -1, -1).clone()
        tried[:, slot] = images[:, slot]
        distances = distance(tried.flatten(1)).nan_to_num(nan=torch.inf)
        least = int(distances.argmin())
        if distances[least].item() < path[-1]:  # else it stays: rounding alone must not move it
            group[slot] = images[least, slot]
        path.append(min(distances[least].item(), path[-1]))
    return group.flatten().unsqueeze(0), path


def image_gradients(view: Matching, at: Tensor) -> Iterator[Tensor]:
    """Yield the gradient ``[P]`` of each image's loss within its batch ``[1, n]``, as the authors.

    The images go through the network together: BatchNorm in train mode sees what clients' sees, and
    the mean of all is the batch's gradient.  There is one gradient in memory at a time.
    """
    operator = view.operator
    assert isinstance(operator, BatchGradients)
    images, labels, _ = view.parametrization.decode(at)
    losses = cross_entropy(operator.model(images[0]), labels[0], reduction="none")
    for loss in losses:
        found = torch.autograd.grad(
            loss, operator.wanted, retain_graph=True, materialize_grads=True
        )
        yield torch.cat([part.flatten() for part in found])


def information_ratios(along: Tensor) -> Tensor:
    """Return GInfoR ``[B]``: ``<g_i, g>`` beside the sum of all; they add up to 1.

    Where some are negative, the lowest is subtracted from all first.

    Parameters
    ----------
    along : Tensor
        ``[B]``: the inner product of each image's gradient with the batch's.
    """
    along = along - along.min().clamp_max(0)
    total = along.sum()
    return along / total if total > 0 else torch.full_like(along, 1 / len(along))


class Toward(Differentiated):
    """``weight * mean |x - wanted|^2``, wanted images ``[1, B, C, H, W]`` for all problems."""

    def __init__(self, weight: float, wanted: Tensor) -> None:
        self.weight, self.wanted = weight, wanted.detach()

    def value(self, images: Tensor) -> Tensor:
        """Return the mean square ``[T]``."""
        return self.weight * (images - self.wanted).square().flatten(1).mean(dim=1)
