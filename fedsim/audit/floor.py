"""What an attacker gets who never looks at the updates.

Three guesses, as many as the attack made for each view and matched the same way: the mean of the
surrogate images, surrogate images drawn at random, uniform noise.  The floor is the guess that
leaks most by the run's own criterion, or among equals the one of the best mean PSNR.  A PSNR means
something only above it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import seeds
from fedsim.audit.criterion import Criterion
from fedsim.audit.leak import Scores, score
from fedsim.audit.matching import PrivateSet


@dataclass(frozen=True)
class GuessScores:
    """One guess and how it did; the best of them has every metric."""

    name: str
    scores: Scores


def floor(
    surrogate: Tensor, views: Tensor, private: PrivateSet, criterion: Criterion, seed: int
) -> list[GuessScores]:
    """Score the three guesses, the best first.

    Parameters
    ----------
    surrogate : Tensor
        ``[S, C, H, W]`` in ``[0, 1]``, disjoint from what clients train on.
    views : Tensor
        ``[M]`` int64: for which view each guess is; the attack's own.
    """
    count = len(views)
    draw = seeds.generator(seed, "audit", "floor")
    shape = private.images.shape[1:]
    picked = torch.cat(
        [torch.randperm(len(surrogate), generator=draw) for _ in range(-(-count // len(surrogate)))]
    )[:count]
    guesses = {
        "mean surrogate image": surrogate.mean(dim=0, keepdim=True).expand(count, *shape),
        "random surrogate images": surrogate[picked],
        "uniform noise": torch.rand(count, *shape, generator=draw),
    }
    ranking = {"psnr", *criterion.metrics}
    scored = [
        GuessScores(name, score(images, views, private, criterion, ranking))
        for name, images in guesses.items()
    ]
    scored.sort(key=lambda g: (g.scores.leaked_count, g.scores.mean_psnr), reverse=True)
    best = scored[0].name
    return [GuessScores(best, score(guesses[best], views, private, criterion)), *scored[1:]]
