"""How like two images are: one figure for each image, never pooled over a batch.

Every function takes candidates and truths ``[N, C, H, W]``, clamps both to ``[0, 1]`` and returns
``[N]`` float64.  A pixel that is not a number counts as black.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.audit import perceptual

PSNR_CAP = 200.0
_SIGMA, _REACH = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Metric:
    """A metric and the facts about it that a report needs."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    meaning: str
    function: Callable[[Tensor, Tensor], Tensor]


def clamped(images: Tensor) -> Tensor:
    """Return images in float64, in ``[0, 1]``, without NaN."""
    return torch.nan_to_num(images.detach().double(), nan=0.0).clamp(0, 1)


def mse(candidates: Tensor, truths: Tensor) -> Tensor:
    """Return the mean squared error over an image's channels and pixels, ``[N]``."""
    return (clamped(candidates) - clamped(truths)).square().flatten(1).mean(dim=1)


def psnr(candidates: Tensor, truths: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, ``[N]``, capped at 200 (equal images)."""
    error = mse(candidates, truths)
    return (-10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()).clamp(max=PSNR_CAP)


def ssim(candidates: Tensor, truths: Tensor) -> Tensor:
    """Return structural similarity in ``[-1, 1]``, ``[N]``.

    Wang et al. 2004: Gaussian window of 11 pixels (sigma 1.5), range 1, mean over all pixels and
    channels; images are reflected at their borders, so they need at least 6 pixels a side.
    """
    height, width = candidates.shape[-2:]
    rows, columns = _window(height), _window(width).T
    x, y = clamped(candidates), clamped(truths)
    mean_x, mean_y = rows @ x @ columns, rows @ y @ columns
    variance_x = (rows @ (x * x) @ columns - mean_x * mean_x).clamp_min(0)
    variance_y = (rows @ (y * y) @ columns - mean_y * mean_y).clamp_min(0)
    covariance = rows @ (x * y) @ columns - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _window(side: int) -> Tensor:
    """Return the Gaussian window with reflected borders as a matrix ``[side, side]``.

    The window is separable, and two small products are far faster in float64 than a convolution.
    """
    taps = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    weights = torch.exp(-taps.square() / (2 * _SIGMA**2))
    weights /= weights.sum()
    places = (torch.arange(side).unsqueeze(1) + taps.long()).abs()
    places = torch.where(places >= side, 2 * (side - 1) - places, places)
    window = torch.zeros(side, side, dtype=torch.float64)
    return window.scatter_add_(1, places, weights.expand(side, -1))


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "psnr",
            "PSNR",
            "dB",
            True,
            "closeness pixel by pixel: 10 dB looks unrelated, 20 dB is recognizable, 30 dB is "
            "clear, above 60 dB is the image itself",
            psnr,
        ),
        Metric(
            "ssim",
            "SSIM",
            "",
            True,
            "likeness of structure: 1 is identical, 0 has nothing in common",
            ssim,
        ),
        Metric(
            "mse",
            "MSE",
            "",
            False,
            "mean squared difference of pixel values, which lie between 0 and 1",
            mse,
        ),
        Metric(
            "lpips",
            "LPIPS",
            "",
            False,
            "difference as a trained network (AlexNet) perceives it: 0 is identical, above 0.5 "
            "looks unrelated",
            perceptual.lpips,
        ),
    )
}
