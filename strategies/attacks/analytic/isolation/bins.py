"""A scalar of the input, and cut-offs that cut its distribution into bins of equal mass.

Fowl et al. (ICLR 2022), Sec. 3: unit ``i`` of the imprint fires when ``h(x) = <v, x>`` is above
cut-off ``c_i``; with cut-offs at the quantiles of ``h`` an image falls into each of ``n`` bins
with probability ``1 / n``.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from fedsim.data import DataSpec, Split

Floats = NDArray[np.float64]

# Below so many samples a bin, their own quantiles are noise: at 10 the noise of the bins' masses
# costs a hundredth of the images, at 1 a seventh (n = 256, 64 images).
SAMPLES_PER_BIN = 10
CELLS = 2**14
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
    """Return the quantiles of what a sample was drawn from, increasing, float64.

    Between the order statistics where there are ``SAMPLES_PER_BIN`` samples for each bin, else of
    the smoothed sample.  0 and 1 stand for ``BEYOND`` standard deviations from the mean.
    """
    sample = values.double().numpy()
    mean, spread = float(sample.mean()), max(float(sample.std()), 1e-6)
    bins = 1 / float(quantiles.diff().min())
    if len(sample) >= SAMPLES_PER_BIN * bins:
        cut = np.quantile(sample, quantiles.numpy(), method="hazen")
    else:
        cut = _smoothed_quantiles(sample, quantiles.numpy(), mean, spread)
    return _opened(torch.from_numpy(cut), quantiles, mean, spread)


def _smoothed_quantiles(sample: Floats, quantiles: Floats, mean: float, spread: float) -> Floats:
    """Return quantiles of a Gaussian kernel density on a fine grid.

    A bin cut between so few samples holds anything from nothing to several times its share.  Half
    of Silverman's bandwidth: brightness has several modes, which the whole one levels.
    """
    edges = np.linspace(mean - BEYOND * spread, mean + BEYOND * spread, CELLS + 1)
    counts, _ = np.histogram(sample, edges)
    quartiles = np.subtract(*np.quantile(sample, [0.75, 0.25]))
    bandwidth = 0.45 * min(spread, float(quartiles) / 1.34 or spread) * len(sample) ** -0.2
    cells = bandwidth / (edges[1] - edges[0])
    density = gaussian_filter1d(counts.astype(np.float64), cells, mode="constant")
    return np.interp(quantiles, density.cumsum() / density.sum(), edges[1:])


def normal_cutoffs(quantiles: Tensor) -> Tensor:
    """Return standard normal quantiles; 0 and 1 stand for ``BEYOND`` standard deviations."""
    inner = quantiles.double().clamp(1e-12, 1 - 1e-12)
    return _opened(torch.special.ndtri(inner), quantiles, 0.0, 1.0)


def _opened(cutoffs: Tensor, quantiles: Tensor, mean: float, spread: float) -> Tensor:
    reach = BEYOND * spread
    opened = torch.where(quantiles <= 0, mean - reach, cutoffs)
    opened = torch.where(quantiles >= 1, mean + reach, opened)
    step = NARROWEST * 2 * reach
    ladder = step * torch.arange(len(opened), dtype=torch.float64)
    return (opened - ladder).cummax(dim=0).values + ladder
