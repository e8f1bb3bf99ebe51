"""HF-GradInv's rule: a genetic search for how often each class occurs.

Ye et al., "High-Fidelity Gradient Inversion in Distributed Learning", AAAI 2024, and the authors'
code.  Row c of the last layer's weight gradient is ``g_c = sum_i (p_ic - [y_i = c]) h_i / B`` with
features ``h >= 0``: the classes whose row has a mean below 0 occur.  What an image of class c puts
there is about ``h / B``, whichever image it is once h is sorted: so ``|g_c|``, sorted, is about
``n_c r / B``, r being the mean of sorted features over images that the server has.  Of its entries
the ``RANKS`` count whose standard deviation over these images is least beside their mean.

Counts n, of which each is at least 1 and which add up to B, are bred for

    max_n  cos(concat_c |g_c|, concat_c n_c r):

each individual is crossed with another (every count from either, mended to B), one example of the
child changes its class, and the better of parent and child lives on.  As ``a_c = <|g_c|, r>`` is
all that this cosine asks of the gradient, it is ``<n, a> / |n|`` but for a constant.

Decided here: mending and mutation leave no count below 1 (the authors' last class takes what is
over, and may fall below); where more classes seem to occur than there are examples, the lowest rows
are taken; the reference is computed for the model that was sent, where theirs is in a file.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.probing import probe
from strategies.attacks.labels.rule import LabelRule, classifier, moved

RANKS = 20


@register("labels", "hf-gradinv")
@dataclass(frozen=True, kw_only=True)
class HFGradInv(LabelRule):
    """Threat model B (reference from noise) or D (from surrogate images); nonnegative features.

    Unchanged by any rescaling of the update.

    Parameters
    ----------
    population : int
        Individuals.
    generations : int
        Of the search.
    """

    needs = frozenset({Capability.UPDATES, Capability.BASICS})

    population: Annotated[int, Field(ge=2)] = 20
    generations: Annotated[int, Field(ge=1)] = 200

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If the weight gradient is not in the update, not finite, or no row's mean is negative.
        """
        weight = moved(view, model, "weight")
        means = weight.mean(dim=1)
        occurring = means.argsort()[:batch_size]
        occurring = occurring[means[occurring] < 0].sort().values
        if not len(occurring):
            raise ValueError(f"the last layer's gradient in {view.label} is nowhere negative")
        ranks, reference = sorted_features(probe(model, view, knowledge).features)
        along = weight[occurring].abs().sort(dim=1).values[:, ranks] @ reference
        generator = knowledge.generator(view.label, "counts")
        counts = self.bred(along, batch_size, generator)
        return torch.repeat_interleave(occurring, counts)

    def bred(self, along: Tensor, total: int, generator: torch.Generator) -> Tensor:
        """Return the counts ``[K]`` of the best individual, each at least 1.

        Parameters
        ----------
        along : Tensor
            ``[K]``: how long each row is along the reference.
        total : int
            What counts add up to; at least K.
        """
        random = torch.rand(self.population, len(along), generator=generator, dtype=along.dtype)
        living = mended(1 + total * random, total)
        for _ in range(self.generations):
            others = living[torch.randperm(self.population, generator=generator)]
            own = torch.rand(living.shape, generator=generator) < 0.5
            children = mutated(mended(torch.where(own, living, others), total), generator)
            better = fitness(children, along) > fitness(living, along)
            living = torch.where(better.unsqueeze(1), children, living)
        return living[fitness(living, along).argmax()].long()


def sorted_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return which ranks vary least beside their mean, and the mean there, ``[RANKS]`` or fewer.

    Parameters
    ----------
    features : Tensor
        ``[N, d]``: of images that the server has.
    """
    ascending = features.sort(dim=1).values
    mean = ascending.mean(dim=0)
    variation = (ascending.std(dim=0) / mean).nan_to_num(nan=torch.inf)
    ranks = variation.argsort(stable=True)[:RANKS]
    return ranks, mean[ranks]


def fitness(counts: Tensor, along: Tensor) -> Tensor:
    """Return the cosine of each individual ``[P, K]``, but for a constant."""
    cosine: Tensor = counts @ along / counts.norm(dim=1)
    return cosine


def mended(counts: Tensor, total: int) -> Tensor:
    """Scale what counts ``[P, K]`` have above 1 until whole numbers add up to ``total``."""
    above = (counts - 1).clamp_min(1e-9)
    shares = above / above.sum(dim=1, keepdim=True) * (total - counts.shape[1])
    whole = shares.floor()
    missing = total - counts.shape[1] - whole.sum(dim=1, keepdim=True)
    place = (whole - shares).argsort(dim=1).argsort(dim=1)
    return 1 + whole + (place < missing)


def mutated(counts: Tensor, generator: torch.Generator) -> Tensor:
    """Let one example of each individual ``[P, K]`` change its class, where one class has two."""
    keys = torch.rand(2, *counts.shape, generator=generator)
    giving = (keys[0] * (counts > 1)).argmax(dim=1, keepdim=True)
    taking = keys[1].argmax(dim=1, keepdim=True)
    one = (counts.gather(1, giving) > 1).to(counts)
    return counts.scatter_add(1, giving, -one).scatter_add(1, taking, one)
