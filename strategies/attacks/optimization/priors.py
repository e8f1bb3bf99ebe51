"""What images look like, whatever the update: penalties on candidates.

A prior returns its derivative with its value, as objectives do.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from strategies.attacks.optimization.state import Stateful


class Prior(Stateful, ABC):
    """A penalty on images."""

    @abstractmethod
    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return penalty ``[T]`` and its derivative, for images ``[T, B, C, H, W]``.

        ``progress`` in ``[0, 1]`` is of iterations, for penalties that change on the way.
        """

    def take(self, rows: Tensor) -> Self:  # noqa: ARG002
        """Return the prior of some of the targets."""
        return self


class Differentiated(Prior):
    """A penalty whose derivative autograd finds."""

    @abstractmethod
    def value(self, images: Tensor) -> Tensor:
        """Return penalty ``[T]`` for images ``[T, B, C, H, W]``, differentiably."""

    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return penalty ``[T]`` and its derivative ``[T, B, C, H, W]``."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            penalty = self.value(leaf)
            (derivative,) = torch.autograd.grad(penalty.sum(), leaf)
        return penalty.detach(), derivative


class Scheduled(Prior):
    """Another prior, times a factor that changes with progress."""

    def __init__(self, prior: Prior, factor: Callable[[float], float]) -> None:
        self.prior, self.factor = prior, factor

    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return penalty ``[T]`` and its derivative, both times ``factor(progress)``."""
        factor = self.factor(progress)
        if factor == 0.0:
            return images.new_zeros(len(images)), torch.zeros_like(images)
        penalty, derivative = self.prior(images, progress)
        return factor * penalty, factor * derivative

    def take(self, rows: Tensor) -> Self:
        """Return the prior of some of the targets."""
        return type(self)(self.prior.take(rows), self.factor)

    def state(self) -> dict[str, Tensor]:
        """Return what the other prior remembers."""
        return self.prior.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Let the other prior go on."""
        self.prior.restore(state)


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

    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
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


class Norm(Prior):
    """``weight * ||x||`` of a whole batch of standardized images (Yin et al. 2021, Eq. 4)."""

    def __init__(self, weight: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.weight = weight
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the norm ``[T]`` and its derivative ``weight x / ||x|| / std``."""
        self.mean, self.std = self.mean.to(images), self.std.to(images)
        standardized = (images - self.mean) / self.std
        length = torch.linalg.vector_norm(standardized.flatten(1), dim=1)
        factor = self.weight / length.clamp_min(torch.finfo(length.dtype).tiny)
        return self.weight * length, standardized.mul_(factor.view(-1, 1, 1, 1, 1)).div_(self.std)


class PatchBorders(Differentiated):
    """``weight`` times the jumps across the borders of patches (Hatamizadeh et al. 2022, Eq. 8).

    For each border between two columns, or two rows, of patches: the norm of what images jump
    there; the sum of these.  0 on a constant image.

    Parameters
    ----------
    weight : float
    patch : int
        Side of a patch in pixels.
    """

    def __init__(self, weight: float, patch: int) -> None:
        self.weight, self.patch = weight, patch

    def value(self, images: Tensor) -> Tensor:
        """Return the sum of norms ``[T]``, over the images of a batch too."""
        total = images.new_zeros(len(images))
        for turned in (images, images.transpose(-1, -2)):
            sides = torch.arange(self.patch, turned.shape[-1], self.patch, device=images.device)
            jump = turned[..., sides] - turned[..., sides - 1]  # [T, B, C, H, borders]
            # the tiny shift keeps the root differentiable where nothing jumps
            norms = (jump.square().sum(dim=(2, 3)) + 1e-16).sqrt() - 1e-8
            total = total + norms.flatten(1).sum(dim=1)
        return self.weight * total


class Consensus(Prior):
    """``weight ||x - E(x)||`` to what the restarts of a view agree on (Yin et al. 2021, Eq. 11).

    Every so often the consensus is drawn anew: the pixel mean of a view's restarts, each shifted
    to where it correlates best with the plain mean (in place of the paper's RANSAC-flow) where
    ``registered``, else the plain mean ("lazy").  The engine must run the restarts of a view
    together.

    Parameters
    ----------
    weight : float
    views : int
        How many there are.
    begins : float
        Share of the iterations after which it pulls.
    every : float
        Share of the iterations between two drawings.
    registered : bool
    """

    def __init__(
        self, weight: float, views: int, *, begins: float, every: float, registered: bool
    ) -> None:
        self.weight, self.begins, self.every, self.registered = weight, begins, every, registered
        self.of = torch.arange(views)  # [T]: whose restart each problem is
        self.wanted: Tensor | None = None
        self.drawn = -1.0

    def __call__(self, images: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the norm ``[T]`` of what separates a batch from its consensus, and its slope."""
        if progress < self.begins or self.weight == 0:
            return images.new_zeros(len(images)), torch.zeros_like(images)
        if self.wanted is None or progress - self.drawn >= self.every:
            self.wanted, self.drawn = self.consensus(images), progress
        gap = images - self.wanted
        length = torch.linalg.vector_norm(gap.flatten(1), dim=1)
        tiny = torch.finfo(length.dtype).tiny
        slope = gap * (self.weight / length.clamp_min(tiny)).view(-1, 1, 1, 1, 1)
        return self.weight * length, slope

    def consensus(self, images: Tensor) -> Tensor:
        """Return, for each problem, what its view's restarts ``[T, B, C, H, W]`` agree on."""
        agreed = torch.empty_like(images)
        for view in torch.unique(self.of):
            own = (self.of == view).nonzero().squeeze(1).to(images.device)
            some = images[own]
            mean = some.mean(dim=0, keepdim=True)
            if self.registered:
                mean = shifted(some, mean).mean(dim=0, keepdim=True)
            agreed[own] = mean
        return agreed

    def take(self, rows: Tensor) -> Self:
        """Return the prior of some of the problems, who agree among themselves."""
        chosen = copy.copy(self)
        chosen.of = self.of[rows.cpu()]
        chosen.wanted = self.wanted[rows] if self.wanted is not None else None
        return chosen

    def state(self) -> dict[str, Tensor]:
        """Return the consensus ``[T, B, C, H, W]``, and when it was drawn."""
        if self.wanted is None:
            return {}
        return {"wanted": self.wanted, "drawn": torch.tensor(self.drawn, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a consensus of the same problems."""
        if state:
            self.wanted, self.drawn = state["wanted"], float(state["drawn"])


def shifted(images: Tensor, onto: Tensor) -> Tensor:
    """Return images ``[..., H, W]``, each moved (around the edge) to where it fits best.

    The shift is where the phase correlation with ``onto``, over all channels, is highest (Kuglin
    and Hines 1975); whole pixels, at most an eighth of a side.
    """
    height, width = images.shape[-2:]
    product = torch.fft.rfft2(onto) * torch.fft.rfft2(images).conj()
    product = product / product.abs().clamp_min(torch.finfo(images.dtype).tiny)
    fit = torch.fft.irfft2(product, s=(height, width)).sum(dim=-3)  # over channels
    down, across = (torch.fft.fftfreq(side, 1 / side).abs() for side in (height, width))
    near = (down.unsqueeze(1) <= height // 8) & (across <= width // 8)
    best = fit.masked_fill(~near.to(fit.device), -torch.inf).flatten(-2).argmax(dim=-1)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    moved = torch.empty_like(images)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in best.shape)).view(
        -1, best.dim()
    ):
        at = tuple(place.tolist())
        dy, dx = divmod(int(best[at]), width)
        moved[at] = images[at][..., (rows - dy) % height, :][..., (columns - dx) % width]
    return moved
