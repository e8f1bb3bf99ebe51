"""Gaussian noise on named tensors.

Drawn in float64, whatever the tensors are.  A draw is ``sqrt(-2 ln u)`` times a cosine, and the
least ``u`` of float32 is ``2^-24``: no noise would ever leave 5.77 standard deviations, where a
normal draw does once in ``1.2e8``, and a value beyond tells for certain what the noise was to hide.
Of float64 the end is 8.57, once in ``1e17``.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedsim.defense import Tensors

#: Standard deviations, absolute or in units of a norm.  A million drowns any update, and what is
#: far above leaves float32.
Std = Annotated[float, Field(gt=0, le=1e6)]
#: One that may be zero: no noise, to see what clipping does alone.
StdOrNone = Annotated[float, Field(ge=0, le=1e6)]


def normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of a tensor's shape and type, where the tensor is."""
    return _drawn(tensor, generator).to(tensor)


def noised(tensors: Tensors, std: float, generator: torch.Generator) -> Tensors:
    """Return the tensors with independent noise of ``std`` on every coordinate.

    The sum is made in float64 and rounded to the tensor's type: of what is private already.
    """
    return {
        name: _drawn(tensor, generator).mul_(std).add_(tensor).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise of a tensor's shape, float64, on its device."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
