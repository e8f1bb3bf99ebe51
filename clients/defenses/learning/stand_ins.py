"""Images that stand in for private ones: how they are searched, and how like them they are."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fedsim.defense import ClientContext, Defense, Tensors

#: Shares of all iterations after which the rate falls to a tenth, as in Inverting Gradients.
DECAYS = (3 / 8, 5 / 8, 7 / 8)


def descended(
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    iterations: int,
    lr: float,
    *,
    box: tuple[Tensor, Tensor] | None = None,
    enough: Callable[[Tensor], bool] = lambda _: False,
) -> tuple[Tensor, int]:
    """Return what Adam makes of ``start``, and how many iterations it took.

    ``box`` are least and largest values, held to after each; ``enough`` ends the search.
    """
    free = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=lr)
    milestones = [max(1, int(share * iterations)) for share in DECAYS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for iteration in range(iterations):
        if enough(free.detach()):
            return free.detach(), iteration
        (free.grad,) = torch.autograd.grad(objective(free), free)
        optimizer.step()
        schedule.step()
        if box is not None:
            free.data.clamp_(*box)
    return free.detach(), iterations


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return structural similarity ``[B]`` of images ``[B, C, H, W]`` in ``[0, 1]``.

    Wang et al. 2004, with windows of 7 x 7 pixels (or the whole side), all weighed alike.
    """
    side = min(7, *first.shape[-2:])

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, side, stride=1)

    a, b = mean(first), mean(second)
    variances = mean(first.square()) - a.square() + mean(second.square()) - b.square()
    covariance = mean(first * second) - a * b
    luminance = (2 * a * b + 0.01**2) / (a.square() + b.square() + 0.01**2)
    return (luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).flatten(1).mean(dim=1)


def flat(tensors: Tensors) -> Tensor:
    """Return all tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def hard(labels: Tensor) -> Tensor:
    """Return labels ``[B]``, the likeliest where they are soft (``[B, K]``)."""
    return labels if labels.dim() == 1 else labels.argmax(dim=1)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise from ``U(0, 1)`` of a tensor's shape, type and device."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like)


def told(defense: Defense, ctx: ClientContext, **figures: float) -> None:
    """Tell the auditor the mean over this round's steps of some figures."""
    kept, steps = ctx.effect(defense).figures, ctx.step + 1
    for name, value in figures.items():
        words = name.replace("_", " ")
        kept[words] = kept.get(words, 0.0) + (value - kept.get(words, 0.0)) / steps
