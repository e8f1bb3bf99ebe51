"""Distances between the gradients of candidates and the observed ones.

A distance works on all parameters flattened as one vector, and returns its derivative with its
value: the engine then needs one pass back through the network and no graph over the distance.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from strategies.attacks.optimization.state import Stateful


class Objective(Stateful, ABC):
    """Distance to what was observed, for T targets at once."""

    observed: Tensor

    def __init__(self, observed: Tensor) -> None:
        """Keep what was observed, ``[T, P]``."""
        self.observed = observed

    @abstractmethod
    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return distance ``[T]`` and its derivative ``[T, P]``; may overwrite ``gradients``.

        ``progress`` in ``[0, 1]`` is of iterations, for distances that change on the way.
        """

    def take(self, rows: Tensor) -> Self:
        """Return the objective of some of the targets."""
        chosen = copy.copy(self)
        chosen.observed = self.observed[rows]
        return chosen


class SquaredDistance(Objective):
    """``||F - g||^2`` (Zhu et al. 2019, Eq. 3): knows the scale of g, and needs it to be right."""

    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return ``||F - g||^2`` and ``2 (F - g)``."""
        difference = gradients.sub_(self.observed)
        return torch.linalg.vecdot(difference, difference), difference.mul_(2)


class Cosine(Objective):
    """``1 - cos(F, g)`` (Geiping et al. 2020, Eq. 4): blind to the scale of either."""

    def __init__(self, observed: Tensor) -> None:
        """Keep minus the direction of what was observed, ``[T, P]``: only differences need it."""
        super().__init__(-observed / torch.linalg.vector_norm(observed, dim=1, keepdim=True))

    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
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


class LayerDistances(Objective):
    """``sum_l w_l ||F_l - g_l||``, l over parameters (Yin et al. 2021, Eq. 2, without the square).

    Parameters
    ----------
    observed : Tensor
        ``[T, P]``.
    sizes : sequence of int
        How many of the P numbers belong to each parameter.
    weights : sequence of float or None
        One for each parameter; all 1 where None.
    """

    def __init__(
        self, observed: Tensor, sizes: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(observed)
        self.sizes = list(sizes)
        ones = [1.0] * len(self.sizes)
        self.weights = observed.new_tensor(ones if weights is None else list(weights))

    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the sum of norms, and for each parameter ``w (F - g) / ||F - g||``."""
        difference = gradients.sub_(self.observed)
        pieces = torch.split(difference, self.sizes, dim=1)
        norms = [torch.linalg.vector_norm(piece, dim=1) for piece in pieces]
        lengths = torch.stack(norms, dim=1)  # [T, L]
        factors = self.weights / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
        for piece, factor in zip(pieces, torch.split(factors, 1, dim=1), strict=True):
            piece.mul_(factor)
        return lengths @ self.weights, difference


class AbsoluteDistance(Objective):
    """``||F - g||_1``: the likelihood of Laplace noise, and robust where few entries are wrong."""

    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return ``sum |F - g|`` and its sign."""
        difference = gradients.sub_(self.observed)
        return difference.abs().sum(dim=1), difference.sign_()


class Weighted(Objective):
    """Another objective on ``s F`` against ``s g``: entries weighed, or masked where s is 0.

    A cosine then weighs each layer by the square of its s (Xu et al. 2022), and entries that a
    sparsified update left out say nothing (Yang et al. 2023).

    Parameters
    ----------
    inner : callable
        Makes the objective of scaled updates ``[T, P]``.
    observed : Tensor
        ``[T, P]``.
    scale : Tensor
        ``[P]`` for all targets, or ``[T, P]``.
    """

    def __init__(
        self, inner: Callable[[Tensor], Objective], observed: Tensor, scale: Tensor
    ) -> None:
        super().__init__(observed)
        self.scale = scale.expand_as(observed)
        self.inner = inner(observed * self.scale)

    def __call__(self, gradients: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the inner distance, and its derivative times the scale."""
        distance, derivative = self.inner(gradients.mul_(self.scale), progress)
        return distance, derivative.mul_(self.scale)

    def take(self, rows: Tensor) -> Self:
        """Return the objective of some of the targets."""
        chosen = super().take(rows)
        chosen.scale, chosen.inner = self.scale[rows], self.inner.take(rows)
        return chosen


def for_each_layer(weights: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return ``[P]``: each layer's weight for each of its numbers, of the type of ``like``."""
    return torch.repeat_interleave(
        torch.tensor(weights, dtype=like.dtype, device=like.device),
        torch.tensor(sizes, device=like.device),
    )
