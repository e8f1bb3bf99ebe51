"""What images look like, whatever the update: penalties on candidates.

A prior returns its derivative with its value, as objectives do.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Prior(ABC):
    """A penalty on images."""

    @abstractmethod
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return penalty ``[T]`` and its derivative, for images ``[T, B, C, H, W]``."""


class TotalVariation(Prior):
    """``weight * (mean |dx/dh| + mean |dx/dw|)``, anisotropic (Geiping et al. 2020, Sec. 4).

    Parameters
    ----------
    weight : float
    std : sequence of float
        Per channel; the penalty is on images divided by it, as the paper's are.
    """

    def __init__(self, weight: float, std: Sequence[float]) -> None:
        self.scale = weight / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return penalty ``[T]`` and its derivative ``[T, B, C, H, W]``."""
        if self.scale.device != images.device or self.scale.dtype != images.dtype:
            self.scale = self.scale.to(images)  # once: a transfer would make the device wait
        penalty = images.new_zeros(len(images))
        derivative = torch.zeros_like(images)
        for dim in (-2, -1):
            length = images.shape[dim] - 1
            if length == 0:
                continue
            near, far = images.narrow(dim, 0, length), images.narrow(dim, 1, length)
            step = far - near
            weight = self.scale / step[0].numel()
            pull = step.sign().mul_(weight)
            penalty += step.mul_(pull).flatten(1).sum(dim=1)  # x sign(x) = |x|
            derivative.narrow(dim, 1, length).add_(pull)
            derivative.narrow(dim, 0, length).sub_(pull)
        return penalty, derivative
