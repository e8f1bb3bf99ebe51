"""A small U-Net that tells what is wrong with an image: trained on pairs by whoever uses it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Denoiser(nn.Module):
    """Six 3 x 3 convolutions at full and half size, which tell the noise that is to be taken off.

    Parameters
    ----------
    channels : int
        Of images.
    width : int
        Channels at full size; twice as many at half size.
    """

    def __init__(self, channels: int, width: int = 24) -> None:
        super().__init__()

        def step(before: int, after: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.ReLU())

        self.above = nn.Sequential(step(channels, width), step(width, width))
        self.below = nn.Sequential(step(width, 2 * width, 2), step(2 * width, 2 * width))
        self.join = step(3 * width, width)
        self.out = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, noisy: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to clean images of the same shape."""
        fine = self.above(noisy)
        coarse = interpolate(self.below(fine), size=noisy.shape[2:], mode="nearest")
        noise: Tensor = self.out(self.join(torch.cat([fine, coarse], dim=1)))
        return noisy - noise

    @torch.no_grad()
    def cleaned(self, images: Tensor) -> Tensor:
        """Return images ``[N, C, H, W]`` without noise, in ``[0, 1]``."""
        parameter = next(self.parameters())
        clean: Tensor = self(images.to(parameter)).clamp(0, 1)
        return clean.to(images)
