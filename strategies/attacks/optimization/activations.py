"""What layers see on the way: penalties on the inputs of layers while the gradient is computed.

They cost no pass of their own: the operator's forward pass is read where it passes by.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor


class ActivationPrior(ABC):
    """A penalty on the inputs of some layers.

    Attributes
    ----------
    layers : tuple of str
        The modules whose inputs it wants.
    """

    layers: tuple[str, ...]

    @abstractmethod
    def __call__(self, inputs: Sequence[Tensor], progress: float = 1.0) -> Tensor:
        """Return penalty ``[T]``, differentiably, for inputs ``[T, B, ...]`` in layers' order."""

    def take(self, rows: Tensor) -> Self:  # noqa: ARG002
        """Return the penalty of some of the targets."""
        return self


class BatchNormDistance(ActivationPrior):
    """``weight sum_l (||mu_l(x) - mu_l|| + ||var_l(x) - var_l||)`` (Yin et al. 2021, Eq. 5).

    mu and var are over a batch and its positions, for each channel, of what layer l normalizes;
    the variance divides by the count, as BatchNorm itself does in training.

    Parameters
    ----------
    weight : float
    wanted : sequence of mapping
        For each target, each BatchNorm layer's mean and variance ``[C]`` by the layer's name.
    factors : mapping of str to float
        Of single layers, where they count for more than 1.
    """

    def __init__(
        self,
        weight: float,
        wanted: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.layers = tuple(wanted[0])
        self.factors = [weight * (factors or {}).get(name, 1.0) for name in self.layers]
        self.mean, self.variance = (
            [torch.stack([each[name][which] for each in wanted]) for name in self.layers]
            for which in (0, 1)
        )

    def __call__(self, inputs: Sequence[Tensor], progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """Return the distance ``[T]`` of batch statistics from those wanted."""
        total = inputs[0].new_zeros(len(inputs[0]))
        for place, seen in enumerate(inputs):
            columns = seen.transpose(1, 2).flatten(2)  # [T, C, B * positions]
            mean = columns.mean(dim=2)
            # half the time of var(); the slope through the mean is 0, for deviations sum to 0
            deviation = columns - mean.detach().unsqueeze(2)
            variance = torch.linalg.vecdot(deviation, deviation) / columns.shape[2]
            for found, wanted in (
                (mean, self.mean[place]),
                (variance, self.variance[place]),
            ):
                gap = found - wanted.to(found)
                total = total + self.factors[place] * torch.linalg.vector_norm(gap, dim=1)
        return total

    def take(self, rows: Tensor) -> Self:
        """Return the penalty of some of the targets."""
        chosen = object.__new__(type(self))
        chosen.layers, chosen.factors = self.layers, self.factors
        chosen.mean = [mean[rows] for mean in self.mean]
        chosen.variance = [variance[rows] for variance in self.variance]
        return chosen
