"""A scalar of the input, and cut-offs that cut its distribution into bins of equal mass.

Fowl et al. (ICLR 2022), Sec. 3: unit ``i`` of the imprint fires when ``h(x) = <v, x>`` is above
cut-off ``c_i``; with cut-offs at the quantiles of ``h`` an image falls into each of ``n`` bins
with probability ``1 / n``.
"""

import numpy as np
import torch
from torch import Tensor

from fedsim.data import DataSpec, Split

# How far beyond the distribution the outermost cut-offs lie, in standard deviations: no image
# is outside (the authors' code writes -10 for a standardized scalar).
BEYOND = 10.0
# Least width of a bin, as a share of the whole range: ties in the surrogate data give none.
NARROWEST = 1e-7


def brightness(spec: DataSpec) -> Tensor:
    """Return ``v = 1 / D``, ``[D]`` float64: ``h`` is the mean pixel."""
    pixels = torch.Size(spec.shape).numel()
    return torch.full((pixels,), 1 / pixels, dtype=torch.float64)


def random_functional(spec: DataSpec, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return ``v`` (``[D]`` float64) and the ``offset`` with ``<v, x> + offset`` near N(0, 1).

    A normal row of mean zero and length one, applied to the image standardized by the public mean
    and standard deviation, both folded into ``v`` because the layer reads raw pixels.  The spread
    is 1 only on average over rows: pixels are correlated, and one row may see half of it.
    """
    pixels = torch.Size(spec.shape).numel()
    row = torch.randn(pixels, generator=generator, dtype=torch.float64)
    row = row - row.mean()
    row = (row / row.norm()).view(spec.shape)
    std = torch.tensor(spec.std, dtype=torch.float64).view(-1, 1, 1)
    mean = torch.tensor(spec.mean, dtype=torch.float64).view(-1, 1, 1)
    return (row / std).flatten(), -float((row * mean / std).sum())


def scalar_of(split: Split, row: Tensor) -> Tensor:
    """Return ``<v, x>`` of every example, ``[N]`` float64, a few hundred at a time."""
    parts = torch.split(torch.arange(len(split)), 256)
    return torch.cat([split.batch(part, torch.float64)[0].flatten(1) @ row for part in parts])


def empirical_cutoffs(values: Tensor, quantiles: Tensor) -> Tensor:
    """Return the quantiles of a sample, between its order statistics, increasing (float64).

    0 and 1 among ``quantiles`` stand for ``BEYOND`` standard deviations from the mean.
    """
    cut = np.quantile(values.double().numpy(), quantiles.numpy(), method="hazen")
    spread = float(values.double().std(correction=0))
    return _opened(torch.from_numpy(cut), quantiles, float(values.double().mean()), spread)


def normal_cutoffs(quantiles: Tensor) -> Tensor:
    """Return standard normal quantiles; 0 and 1 stand for ``BEYOND`` standard deviations."""
    inner = quantiles.double().clamp(1e-12, 1 - 1e-12)
    return _opened(torch.special.ndtri(inner), quantiles, 0.0, 1.0)


def _opened(cutoffs: Tensor, quantiles: Tensor, mean: float, spread: float) -> Tensor:
    reach = BEYOND * max(spread, 1e-6)
    opened = torch.where(quantiles <= 0, mean - reach, cutoffs)
    opened = torch.where(quantiles >= 1, mean + reach, opened)
    step = NARROWEST * 2 * reach
    ladder = step * torch.arange(len(opened), dtype=torch.float64)
    return (opened - ladder).cummax(dim=0).values + ladder
