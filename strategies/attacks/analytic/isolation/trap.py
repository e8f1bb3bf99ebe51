"""Rows that rarely fire: trap weights, how often they fire, and the scale at which most leaks.

Boenisch et al. (EuroS&P 2023), Alg. 1 and Sec. 5.  A row has half of its weights negative and the
other half positive at the same magnitudes times ``s < 1``: on inputs in ``[0, 1]`` its sum is
negative for nearly every image, and a ReLU behind it hears the few images for which it is not.

The law (central limit over the pixels; ``m_x`` and ``d_x`` are the mean and the standard deviation
over the ``D`` pixels of one image):

    P(row fires | x) = Phi(-t),  t = (1 - s) sqrt(D) (m_x / d_x) / sqrt(pi (1 + s^2))

so that ``s`` goes to 1 as ``1 / sqrt(D)``.  With ``p_j`` for each of ``B`` images and ``N``
independent rows, image j comes back if a row hears it alone:

    R = mean_j 1 - (1 - p_j prod_{k != j} (1 - p_k))^N
"""

from math import pi, sqrt

import torch
from torch import Tensor

from fedsim.data import DataSpec

Rows = tuple[Tensor, Tensor]


def trap_rows(
    rows: int, features: int, scale: float, sigma: float, generator: torch.Generator
) -> Rows:
    """Return weights ``[rows, features]`` and biases ``[rows]`` (zero) of Alg. 1, float64.

    Parameters
    ----------
    rows, features : int
        An odd ``features`` leaves one position of each row at zero.
    scale : float
        ``s`` in (0, 1): positive weights are this share of the negative ones.
    sigma : float
        Standard deviation of the normal draw whose magnitudes are used.
    """
    half = features // 2
    draw = torch.randn(rows, half, generator=generator, dtype=torch.float64)
    magnitudes = sigma * draw.abs()
    shuffled = torch.rand(rows, features, generator=generator).argsort(dim=1)
    weight = torch.zeros(rows, features, dtype=torch.float64)
    weight.scatter_(1, shuffled[:, :half], -magnitudes)
    weight.scatter_(1, shuffled[:, half : 2 * half], scale * magnitudes)
    return weight, torch.zeros(rows, dtype=torch.float64)


def gaussian_rows(rows: int, features: int, sigma: float, generator: torch.Generator) -> Rows:
    """Return ``N(0, sigma^2)`` weights and zero biases: what an honest server may have drawn."""
    weight = sigma * torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return weight, torch.zeros(rows, dtype=torch.float64)


def quantile_rows(rows: int, spec: DataSpec, together: int, generator: torch.Generator) -> Rows:
    """Return rows that fire for one image in ``together`` without any data (QBI), float64.

    Nowak et al., "QBI: Quantile-Based Bias Initialization", 2024: for standardized inputs
    ``W ~ N(0, 1)`` gives sums near ``N(0, D)``, hence ``b = Phi^-1(1 / B) sqrt(D)``.  The public
    mean and standard deviation are folded in, because the rows here are of pixels in ``[0, 1]``.
    """
    mean, std = (torch.tensor(facts, dtype=torch.float64) for facts in (spec.mean, spec.std))
    pixels = torch.Size(spec.shape).numel()
    each = pixels // len(mean)
    mean, std = mean.repeat_interleave(each), std.repeat_interleave(each)
    draw = torch.randn(rows, pixels, generator=generator, dtype=torch.float64)
    rarity = torch.special.ndtri(torch.tensor(1 / max(together, 2), dtype=torch.float64))
    return draw / std, rarity * sqrt(pixels) - draw @ (mean / std)


def firing_rate(images: Tensor, scale: float) -> Tensor:
    """Return the law's P(row fires | x) of each image.

    Parameters
    ----------
    images : Tensor
        ``[S, D]`` in ``[0, 1]``.
    scale : float
        ``s``.

    Returns
    -------
    Tensor
        ``[S]`` float64 in ``[0, 0.5]``.
    """
    images = images.double()
    # A flat image makes every row's sum the same small negative number: it is never heard.
    ratio = images.mean(dim=1) / images.std(dim=1, correction=0)
    ratio = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)
    per_ratio = (1 - scale) * sqrt(images.shape[1]) / sqrt(pi * (1 + scale**2))
    rate: Tensor = torch.special.ndtr(-per_ratio * ratio)
    return rate


def expected_recall(rates: Tensor, rows: int, together: int) -> float:
    """Return the law's R for ``together`` images like these, whose firing rates are ``[S]``."""
    nobody_else = torch.exp((together - 1) * torch.log1p(-rates).mean())
    missed_by_all = rows * torch.log1p(-rates * nobody_else)
    return float(-torch.expm1(missed_by_all).mean())


def tuned_scale(images: Tensor, rows: int, together: int) -> float:
    """Return the ``s`` with the largest expected R; 400 values of ``1 - s``, log-spaced.

    ``images`` are ``[S, D]`` in ``[0, 1]``, the attacker's own; ``together`` how many private
    images one update mixes.
    """
    grid = 1 - torch.logspace(-4, -0.05, 400, dtype=torch.float64)
    recalls = [expected_recall(firing_rate(images, s), rows, together) for s in grid.tolist()]
    return float(grid[max(range(len(recalls)), key=recalls.__getitem__)])
