"""What is searched: variables, and the images and labels that they stand for."""

from abc import ABC, abstractmethod
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fedsim.data import DataSpec


class Candidate(NamedTuple):
    """T candidate batches.

    Attributes
    ----------
    images : Tensor
        ``[T, B, C, H, W]``, values in ``[0, 1]`` where the variables are in their box.
    labels : Tensor
        ``[T, B]`` int64, or probabilities ``[T, B, K]``.
    beside : Tensor or None
        ``[T, m]``: what else is searched, for operators that know what it means.
    """

    images: Tensor
    labels: Tensor
    beside: Tensor | None = None


class Parametrization(ABC):
    """Maps variables ``[T, n]`` to candidate batches, differentiably."""

    @abstractmethod
    def start(self, generator: torch.Generator) -> Tensor:
        """Draw where one restart begins, ``[n]``, on the CPU."""

    @abstractmethod
    def decode(self, variables: Tensor) -> Candidate:
        """Return the candidates that ``[T, n]`` variables stand for."""

    def finish(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to hand over: images in ``[0, 1]`` and labels ``[T, B]`` int64."""
        images, labels, _ = self.decode(variables)
        named = labels.argmax(dim=-1) if labels.is_floating_point() else labels
        return images.clamp(0, 1), named

    def box(self, variables: Tensor) -> None:  # noqa: B027
        """Bring variables back, in place, to where images have values in ``[0, 1]``."""

    def take(self, rows: Tensor) -> Self:  # noqa: ARG002
        """Return the parametrization of some of the targets."""
        return self


class Signed(torch.autograd.Function):
    """The identity, whose slope is handed back as its sign.

    For pixels that take signed steps beside variables that do not.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:  # noqa: ARG004
        """Return the images."""
        return images.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # noqa: ARG004
        """Return the sign."""
        return slope.sign()


class NormalizedPixels(Parametrization):
    """Pixels standardized by the public mean and standard deviation; labels known.

    Starts at N(0, 1) (Geiping et al. 2020).

    Parameters
    ----------
    spec : DataSpec
    labels : Tensor
        ``[T, B]`` int64, on the device to search on.
    dtype : torch.dtype
        Of the variables.
    boxed : bool
        Whether :meth:`box` clamps to the standardized ``[0, 1]``.
    """

    def __init__(self, spec: DataSpec, labels: Tensor, dtype: torch.dtype, boxed: bool) -> None:
        self.spec, self.labels, self.boxed = spec, labels, boxed
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=labels.device).view(-1, 1, 1)
            for values in (spec.mean, spec.std)
        )

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers ``[B * C * H * W]``."""
        return torch.randn(self.labels.shape[1] * prod(self.spec.shape), generator=generator)

    def decode(self, variables: Tensor) -> Candidate:
        """Return images and the labels as they are."""
        return Candidate(self.images(variables), self.labels)

    def images(self, variables: Tensor) -> Tensor:
        """Return what ``[T, n]`` standardized pixels show, ``[T, B, C, H, W]``."""
        standardized = variables.view(len(variables), self.labels.shape[1], *self.spec.shape)
        return torch.addcmul(self.mean, standardized, self.std)

    def box(self, variables: Tensor) -> None:
        """Clamp each channel to the standardized ``[0, 1]``."""
        if self.boxed:
            images = variables.view(len(variables), self.labels.shape[1], *self.spec.shape)
            low, high = -self.mean / self.std, (1 - self.mean) / self.std
            torch.clamp(images, low, high, out=images)

    def take(self, rows: Tensor) -> Self:
        """Return the parametrization of some of the targets."""
        return type(self)(self.spec, self.labels[rows], self.mean.dtype, self.boxed)


class PixelsAndLabels(Parametrization):
    """Pixels as they are, and labels as the softmax of free logits, searched together.

    Both start at N(0, 1) (Zhu et al. 2019).
    """

    def __init__(self, spec: DataSpec, batch_size: int) -> None:
        self.spec, self.batch_size = spec, batch_size
        self.pixels = batch_size * prod(spec.shape)

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers ``[B * (C * H * W + K)]``."""
        size = self.pixels + self.batch_size * self.spec.num_classes
        return torch.randn(size, generator=generator)

    def decode(self, variables: Tensor) -> Candidate:
        """Return images and the softmax of the label logits."""
        both = len(variables), self.batch_size
        images = variables[:, : self.pixels].view(*both, *self.spec.shape)
        logits = variables[:, self.pixels :].view(*both, self.spec.num_classes)
        return Candidate(images, logits.softmax(dim=-1))


class Pixels(Parametrization):
    """Pixels as they are, without a box; labels known.  Starts at N(0, 1) (Zhao et al. 2020).

    Parameters
    ----------
    spec : DataSpec
    labels : Tensor
        ``[T, B]`` int64, on the device to search on.
    """

    def __init__(self, spec: DataSpec, labels: Tensor) -> None:
        self.spec, self.labels = spec, labels

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers ``[B * C * H * W]``."""
        return torch.randn(self.labels.shape[1] * prod(self.spec.shape), generator=generator)

    def decode(self, variables: Tensor) -> Candidate:
        """Return the variables as images, and the labels."""
        return Candidate(variables.view(*self.labels.shape, *self.spec.shape), self.labels)

    def take(self, rows: Tensor) -> Self:
        """Return the parametrization of some of the targets."""
        return type(self)(self.spec, self.labels[rows])


class NormalizedPixelsAndLabels(Parametrization):
    """Standardized pixels, and labels as the softmax of free logits, searched together.

    Both start at N(0, 1).

    Parameters
    ----------
    spec : DataSpec
    batch_size : int
    like : Tensor
        Whose type and device variables have.
    boxed : bool
        Whether :meth:`box` clamps to the standardized ``[0, 1]``.
    """

    def __init__(self, spec: DataSpec, batch_size: int, like: Tensor, boxed: bool) -> None:
        self.spec, self.batch_size, self.like = spec, batch_size, like
        nobody = torch.empty(0, batch_size, dtype=torch.int64, device=like.device)
        self.pixels = NormalizedPixels(spec, nobody, like.dtype, boxed)
        self.size = batch_size * prod(spec.shape)

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers ``[B * (C * H * W + K)]``."""
        return torch.randn(self.size + self.batch_size * self.spec.num_classes, generator=generator)

    def decode(self, variables: Tensor) -> Candidate:
        """Return images and the softmax of the label logits."""
        images, logits = variables[:, : self.size], variables[:, self.size :]
        labels = logits.reshape(len(variables), self.batch_size, -1).softmax(dim=-1)
        return Candidate(self.pixels.images(images), labels)

    def box(self, variables: Tensor) -> None:
        """Clamp each channel to the standardized ``[0, 1]``."""
        self.pixels.box(variables[:, : self.size])
