"""Rounding a tensor to a grid, and the bits that a grid costs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.defense import ClientContext, Defense, Tensors

#: Maps values in units of a grid's step to whole numbers.
Rounding = Callable[[Tensor], Tensor]


def nearest(units: Tensor) -> Tensor:
    """Round to the nearest whole number, halves to even."""
    return units.round()


def stochastically(generator: torch.Generator) -> Rounding:
    """Return a rounding up with the probability of the fraction: right on average.

    ``floor(u) + 1`` with probability ``u - floor(u)``; a whole number stays as it is.
    """

    def rounded(units: Tensor) -> Tensor:
        below = units.floor()
        draw = torch.rand(units.shape, generator=generator, dtype=units.dtype).to(units.device)
        return below + (draw < units - below)

    return rounded


def on_grid(tensor: Tensor, limit: Tensor, levels: int, rounding: Rounding) -> Tensor:
    """Return ``limit * sign(v) * xi / levels``, with ``levels * |v| / limit`` rounded to ``xi``.

    ``limit`` broadcasts, must be at least zero, and is what lies at the last of ``levels`` steps
    from zero; where it is zero the values are, too, and stay.
    """
    # One division for the step: a value on the grid divides to the same whole number again.
    step = limit / levels
    units = tensor.abs() / torch.where(step > 0, step, torch.ones_like(step))
    near = units.round()
    exact = (units - near).abs() <= 4 * torch.finfo(tensor.dtype).eps * near
    return tensor.sign() * rounding(torch.where(exact, near, units)) * step


def bits_of(symbols: int) -> int:
    """Return the bits of a fixed-length code of so many symbols."""
    return math.ceil(math.log2(symbols))


def tell_bits(
    defense: Defense, sent: Tensors, bits: dict[str, int], scales: int, ctx: ClientContext
) -> None:
    """Tell the auditor the bytes of a code with ``bits`` an entry and ``scales`` 32-bit scales.

    The values travel as floats all the same: what is told is what a code would save.
    """
    entries = sum(tensor.numel() for tensor in sent.values())
    coded = (sum(bits[name] * t.numel() for name, t in sent.items()) + 32 * scales) / 8
    dense = sum(tensor.numel() * tensor.element_size() for tensor in sent.values())
    ctx.effect(defense).figures |= {
        "bits_per_entry": 8 * coded / max(entries, 1),
        "bytes_coded": coded,
        "bytes_saved": dense - coded,
    }
