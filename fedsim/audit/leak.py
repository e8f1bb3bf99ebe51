"""How much of the private data came back."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attack import Reconstruction
from fedsim.audit import perceptual
from fedsim.audit.criterion import Criterion
from fedsim.audit.matching import PrivateSet, best_matches
from fedsim.audit.metrics import METRICS

EXACT = 1e-10
_CHUNK = 256
THRESHOLDS = tuple(range(61))


@dataclass(frozen=True)
class Scores:
    """Every private image and its match.

    Attributes
    ----------
    chosen, source : Tensor
        ``[U]`` int64: candidate and view, -1 where an image got no candidate.
    values : dict of str to Tensor
        Each metric ``[U]`` float64, NaN where there is no match.
    leaked : Tensor
        ``[U]`` bool.
    """

    chosen: Tensor
    source: Tensor
    values: dict[str, Tensor]
    leaked: Tensor

    @property
    def matched(self) -> Tensor:
        """``[U]`` bool: which images got a candidate."""
        return self.chosen >= 0

    @property
    def leaked_count(self) -> int:
        """How many images meet the criterion."""
        return int(self.leaked.sum())

    @property
    def mean_psnr(self) -> float:
        """Mean over matched images, in dB."""
        return float(self.values["psnr"][self.matched].mean())

    def rate_at(self, threshold: float) -> float:
        """Return the share of all private images with at least this PSNR."""
        return float((self.values["psnr"] >= threshold).double().mean())


def score(
    candidates: Tensor,
    views: Tensor,
    private: PrivateSet,
    criterion: Criterion,
    metrics: Collection[str] = tuple(METRICS),
) -> Scores:
    """Match candidates ``[M, C, H, W]`` to the private images and measure every pair.

    ``metrics`` names what to measure; LPIPS is left out where its weights are not at hand.
    """
    chosen, source = best_matches(candidates, views, private)
    matched = chosen >= 0
    pairs = candidates[chosen[matched]], private.images[matched]
    values = {}
    for name in metrics:
        if name == "lpips" and perceptual.unavailable():
            continue
        values[name] = torch.full((len(private),), torch.nan, dtype=torch.float64)
        parts = zip(*(torch.split(side, _CHUNK) for side in pairs), strict=True)
        measured = [METRICS[name].function(a, b) for a, b in parts]
        values[name][matched] = torch.cat(measured)
    return Scores(chosen, source, values, criterion.holds(values))


def wilson(leaked: int, private: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927), within ``[0, 1]``."""
    z, share = 1.959963984540054, leaked / private
    middle = share + z**2 / (2 * private)
    half = z * math.sqrt(share * (1 - share) / private + z**2 / (4 * private**2))
    scale = 1 + z**2 / private
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def label_accuracy(
    reconstruction: Reconstruction, private: PrivateSet
) -> tuple[float | None, str | None]:
    """Return the mean over views of the share of label counts that is right, or why there is none.

    ``1 - sum_c |n_recovered(c) - n_true(c)| / 2B`` on the labels as a multiset, which no matching
    to the truth can flatter; never below 0.
    """
    if reconstruction.labels is None:
        return None, "the attack gives no labels"
    shares = []
    for view, behind in enumerate(private.behind):
        mine = reconstruction.views == view
        if not len(behind) or not mine.any():
            continue
        true, found = private.labels[behind], reconstruction.labels[mine]
        classes = int(max(true.max(), found.max())) + 1
        kept = found[found >= 0]
        difference = torch.bincount(kept, minlength=classes) - torch.bincount(
            true, minlength=classes
        )
        shares.append(max(0.0, 1 - float(difference.abs().sum()) / (2 * len(true))))
    if not shares:
        return None, "no view with candidates has private images behind it"
    return sum(shares) / len(shares), None
