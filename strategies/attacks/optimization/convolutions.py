"""Which convolutions take what is too small for oneDNN.

On the CPU PyTorch hands convolutions to oneDNN, which first packs what it reads into blocks of
channels.  For one or two images and few channels that takes longer than the sums: a gradient of
``lenet`` on one image and its derivative take two thirds of the time with PyTorch's own
convolutions.  With 32 to 64 channels the two are level (``convnet``) or oneDNN is the faster
(``resnet20``).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FEW_IMAGES, FEW_CHANNELS = 2, 31


def is_narrow(model: nn.Module) -> bool:
    """Say whether no convolution of a network has many channels, in or out."""
    widths = [
        max(module.in_channels, module.out_channels)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    return bool(widths) and max(widths) <= FEW_CHANNELS


@contextmanager
def convolutions_for(images: Tensor, narrow: bool) -> Iterator[None]:
    """Leave oneDNN out while a few images ``[T, B, C, H, W]`` go through a narrow network."""
    if not narrow or images.device.type != "cpu" or images.shape[:2].numel() > FEW_IMAGES:
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None):
        yield
