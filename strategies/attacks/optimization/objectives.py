"""Distances between the gradients of candidates and the observed ones.

A distance works on all parameters flattened as one vector, and returns its derivative with its
value: the engine then needs one pass back through the network and no graph over the distance.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor


class Objective(ABC):
    """Distance to what was observed, for T targets at once."""

    observed: Tensor

    def __init__(self, observed: Tensor) -> None:
        """Keep what was observed, ``[T, P]``."""
        self.observed = observed

    @abstractmethod
    def __call__(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return distance ``[T]`` and its derivative ``[T, P]``; may overwrite ``gradients``."""

    def take(self, rows: Tensor) -> Self:
        """Return the objective of some of the targets."""
        chosen = object.__new__(type(self))
        chosen.observed = self.observed[rows]
        return chosen


class SquaredDistance(Objective):
    """``||F - g||^2`` (Zhu et al. 2019, Eq. 3): knows the scale of g, and needs it to be right."""

    def __call__(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``||F - g||^2`` and ``2 (F - g)``."""
        difference = gradients.sub_(self.observed)
        return torch.linalg.vecdot(difference, difference), difference.mul_(2)


class Cosine(Objective):
    """``1 - cos(F, g)`` (Geiping et al. 2020, Eq. 4): blind to the scale of either."""

    def __init__(self, observed: Tensor) -> None:
        """Keep minus the direction of what was observed, ``[T, P]``: only differences need it."""
        super().__init__(-observed / torch.linalg.vector_norm(observed, dim=1, keepdim=True))

    def __call__(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``1 - cos`` and its derivative.

        Computed as ``|u - v|^2 / 2`` of the unit vectors, which keeps its digits near 0, where
        ``1 - u.v`` has none left.
        """
        inverse = torch.linalg.vector_norm(gradients, dim=1, keepdim=True).reciprocal_()
        gap = torch.addcmul(self.observed, gradients, inverse, out=gradients)  # u - v
        distance = torch.linalg.vecdot(gap, gap).div_(2)
        # (cos u - v) / |F|, and u = gap + v
        share = distance.unsqueeze(1)
        derivative = gap.mul_((1 - share) * inverse).addcmul_(self.observed, share * inverse)
        return distance, derivative
