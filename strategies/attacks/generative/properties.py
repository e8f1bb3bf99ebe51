"""What singles one image out: a score of it, and how high is high enough for nobody else.

Garov et al., "Hiding in Plain Sight", ICLR 2024, Sec. 4: the server's secret property.  *Local*
(``max``): the image with the largest score of a batch.  *Global* (``thresh``), for sums over
clients: the one whose score, standardized within its client's batch, is above tau.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _color(channel: int) -> Callable[[Tensor], Tensor]:
    """Twice a channel minus the other two."""
    return lambda images: (3 * images[..., channel, :, :] - images.sum(dim=-3)).mean(dim=(-2, -1))


PROPERTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "bright": lambda images: images.mean(dim=(-3, -2, -1)),
    "dark": lambda images: -images.mean(dim=(-3, -2, -1)),
    "red": _color(0),
    "green": _color(1),
    "blue": _color(2),
    "horizontal-edge": lambda images: images.diff(dim=-2).mean(dim=(-3, -2, -1)),
    "vertical-edge": lambda images: images.diff(dim=-1).mean(dim=(-3, -2, -1)),
}
COLORS = frozenset({"red", "green", "blue"})


def standardized(scores: Tensor) -> Tensor:
    """Return scores ``[..., B]`` with mean 0 and variance 1 in each batch."""
    spread = scores.std(dim=-1, keepdim=True, correction=0).clamp_min(1e-12)
    return (scores - scores.mean(dim=-1, keepdim=True)) / spread


@dataclass(frozen=True)
class Threshold:
    """tau, and the probability that exactly one image of all clients' is above it."""

    tau: float
    exactly_one: float


def fit_threshold(scores: Tensor, clients: int) -> Threshold:
    """Return the tau that leaves exactly one image most often.

    With the distributions F1 and F2 of a batch's largest and second largest standardized score,
    one of C clients has exactly one image above tau, and the others none, with probability
    ``C (F2 - F1) F1^(C-1)``.  (The authors maximize ``(1 - F1) F2 F1^(C-1)``, as if top and second
    were independent; as the second is never the larger, ``F2 - F1`` is exact.)

    Parameters
    ----------
    scores : Tensor
        ``[N, B]`` standardized scores of N batches.
    clients : int
        C, how many batches are in a sum.
    """
    top, second = scores.topk(2, dim=1).values.T
    taus = torch.cat([top, second]).sort().values
    below_top = (top.unsqueeze(0) <= taus.unsqueeze(1)).double().mean(dim=1)
    below_second = (second.unsqueeze(0) <= taus.unsqueeze(1)).double().mean(dim=1)
    chance = clients * (below_second - below_top) * below_top ** (clients - 1)
    best = int(chance.argmax())
    return Threshold(float(taus[best]), float(chance[best]))


def spread_taus(scores: Tensor, count: int) -> Tensor:
    """Return ``[count]`` thresholds between which a batch's largest score mostly lies.

    From the 0.3-quantile of the second largest to the median of the largest: the least squares
    behind them weigh one that is seldom met, but by one image only, against one often met.
    """
    top, second = scores.topk(2, dim=1).values.T
    return torch.linspace(float(second.quantile(0.3)), float(top.quantile(0.5)), count)


def exactly_one(share: float, examples: int) -> float:
    """Return ``M p (1 - p)^(M-1)``: of M independent images exactly one has a property of share p.

    At most about 1/e, where ``p = 1 / M``; standardizing within batches beats it, because an image
    that stands out lowers the others.
    """
    return examples * share * (1 - share) ** (examples - 1)
