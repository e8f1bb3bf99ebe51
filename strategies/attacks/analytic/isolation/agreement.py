"""Which rows of a layer's gradient hold the same single example, and that example from all of them.

A row that heard one example is ``y_i = g_i (x, 1)``, weight and bias gradient together; rows of the
same example are parallel, whatever their ``g_i``.  So two rows agree if the smaller singular value
of the two is no larger than the noise in them makes it, ``D + 1`` entries of variance ``sigma^2``:

    sin^2(y_i, y_k) |y_i|^2 |y_k|^2 / (|y_i|^2 + |y_k|^2)
        <=  sigma^2 (D + 1 + SLACK sqrt(2 (D + 1)))

A mixture of several examples hardly ever has a second row that agrees with it.  Over a set of
agreeing rows the least squares estimate of the direction is the first right singular vector: each
row counts by its signal-to-noise ratio, ``g_i^2 / sigma^2``.  No row is divided before all are
together, and nothing here looks at the truth.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# By how many of its standard deviations the noise in a row may exceed its expectation.
SLACK = 6.0
# Rows agree at this squared sine even without noise: a few roundings of float32 on either side.
TIGHT = 1e-12
# Quiet rows are noise if they have no more of a constant than so many of its standard deviations.
WHITE = 5.0
# Fewer values than these may be multiples of one by chance.
FEW = 100


@dataclass(frozen=True)
class Isolated:
    """Examples read from rows, the best supported first.

    Attributes
    ----------
    inputs : Tensor
        ``[K, D]`` float64: what the layer read.
    rows : Tensor
        ``[K]`` int64: how many rows agree on each.
    error : Tensor
        ``[K]`` float64: expected standard deviation of an input, ``sigma / sqrt(sum g_i^2)``.
    """

    inputs: Tensor
    rows: Tensor
    error: Tensor


def isolated(weight: Tensor, bias: Tensor, sigma: float) -> Isolated:
    """Gather the rows of a gradient into examples.

    Parameters
    ----------
    weight, bias : Tensor
        ``[n, D]`` and ``[n]``: gradients of one layer, up to a common factor.
    sigma : float
        Standard deviation of the noise in each of their entries.
    """
    rows = torch.cat([weight, bias.unsqueeze(1)], dim=1).double()
    size = rows.shape[1]
    energy = rows.square().sum(dim=1)
    noise = sigma**2 * (size + SLACK * sqrt(2 * size))
    loudest = energy.max() if len(energy) else energy.sum()
    heard = energy.isfinite() & (energy > noise) & (energy > TIGHT * loudest)
    rows, energy = rows[heard], energy[heard]
    products = rows @ rows.T
    agree = _agreement(products, energy, noise)
    found, supports = [], []
    for members in _gathered(agree, energy):
        inputs, signal = _least_squares(rows[members], products[members][:, members])
        found.append(inputs)
        supports.append((len(members), sigma / max(signal, 1e-300) ** 0.5))
    counts = torch.tensor([count for count, _ in supports], dtype=torch.int64)
    errors = torch.tensor([error for _, error in supports], dtype=torch.float64)
    inputs = torch.stack(found) if found else rows.new_empty(0, size - 1)
    return Isolated(inputs, counts, errors)


def _agreement(products: Tensor, energy: Tensor, noise: float) -> Tensor:
    """Return ``[n, n]`` bool: which rows are parallel within the noise."""
    both = energy.unsqueeze(0) * energy.unsqueeze(1)
    weight = both / (energy.unsqueeze(0) + energy.unsqueeze(1))
    sine = (1 - products.square() / both).clamp_min(0)
    return sine * weight <= noise + TIGHT * weight


def _gathered(agree: Tensor, energy: Tensor) -> list[Tensor]:
    """Return groups of row indices, the one with most support first.

    A row's support is what others that agree with it bring, each no more than itself: a weak row,
    which agrees with anything, is nobody's middle.
    """
    shared = agree * torch.minimum(energy.unsqueeze(0), energy.unsqueeze(1))
    shared.fill_diagonal_(0)
    support = shared.sum(dim=1)
    left = torch.ones(len(energy), dtype=torch.bool)
    groups = []
    while left.any():
        seed = int(torch.where(left, support, -torch.inf).argmax())
        chosen = agree[seed] & left
        chosen[seed] = True
        members = chosen.nonzero().flatten()
        groups.append(members)
        left &= ~chosen
        support = support - shared[:, members].sum(dim=1)
    return groups


def _least_squares(rows: Tensor, products: Tensor) -> tuple[Tensor, float]:
    """Return ``x`` (``[D]``) and ``sum g_i^2`` of rows ``g_i (x, 1)``, all together."""
    strength, vectors = torch.linalg.eigh(products)
    direction = vectors[:, -1] @ rows / strength[-1].clamp_min(1e-300).sqrt()
    return direction[:-1] / direction[-1], float(strength[-1] * direction[-1].square())


def noise_of(weight: Tensor, bias: Tensor, summands: int = 1) -> float:
    """Estimate the noise in a layer's gradient from the gradient alone.

    The quietest fiftieth of the rows heard nobody, if some rows did: theirs is the noise, unless a
    constant shows in it (all images are bright).  Where all entries are multiples of one value,
    they were rounded to it, each of the ``summands`` at random: by half of it at most.
    """
    rows = torch.cat([weight, bias.unsqueeze(1)], dim=1).double()
    quiet = rows[rows.square().sum(dim=1).argsort()[: max(2, len(rows) // 50)]]
    size = rows.shape[1]
    variance = quiet.square().mean(dim=1)
    constant = quiet.mean(dim=1).square() * size / variance.clamp_min(1e-300)
    white = float(constant.median()) < WHITE**2
    noise = sqrt(float(variance.mean())) if white else 0.0
    return max(noise, _rounding(rows) / 2 * sqrt(summands))


def _rounding(rows: Tensor) -> float:
    """Return the step of which all entries are multiples, or 0."""
    values = rows[rows != 0].abs()
    smallest = torch.unique(values)[:1000]
    apart = smallest.diff()
    apart = apart[apart > 1e-6 * smallest[-1:]]  # less is what float arithmetic made of equal ones
    if len(apart) < 2:
        return 0.0
    step = float(apart.min())
    steps = values[values < 1e5 * step] / step
    off = (steps - steps.round()).abs().max()
    return step if len(steps) > FEW and float(off) < 0.05 else 0.0
