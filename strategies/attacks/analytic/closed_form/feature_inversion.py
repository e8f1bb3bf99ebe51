"""From the input of a network's first fully connected layer back to the images.

The server knows the layers before it, f: ``min_x mean_i 1 - cos(f(x)_i, z_i) + tv TV(x)`` over
images in ``[0, 1]``, by Adam with a rate that falls on a cosine.  Kariyappa et al., "Cocktail Party
Attack", ICML 2023, Sec. 5 (feature inversion); their further term, the cosine between gradients, is
left out: it wants all labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from strategies.attacks.analytic.closed_form.blind_separation import total_variation


def features(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return what reaches a fully connected layer, ``[B, D]``, for images ``[B, C, H, W]``."""
    reached: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: reached.append(inputs[0])
    )
    try:
        model(images)
    finally:
        hook.remove()
    return reached[0]


def invert_features(
    model: nn.Module,
    layer: str,
    wanted: Tensor,
    start: Tensor,
    *,
    iterations: int,
    lr: float,
    tv: float,
    tell: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Return images ``[M, C, H, W]`` and the cosine ``[M]`` that each reached.

    Parameters
    ----------
    wanted : Tensor
        ``[M, D]``; only directions count.
    start : Tensor
        ``[M, C, H, W]`` in ``[0, 1]``.
    tell : callable
        Called with the step, now and then.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for step in range(iterations):
        optimizer.zero_grad()
        away = 1 - cosine_similarity(features(model, layer, images), wanted)
        # A sum, so that an image's way does not depend on how many others there are.
        loss = away.sum() + tv * len(images) * total_variation(images)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        if step % 50 == 0:
            tell(step)
    with torch.no_grad():
        return images.detach(), cosine_similarity(features(model, layer, images), wanted)
