"""Convolutions that forget as little as they can, and images from what they still tell.

Wang, Velipasalar, Gursoy, "Maximum Knowledge Orthogonality Reconstruction with Gradients in
Federated Learning", WACV 2024.  A pooling keeps one number of four.  The filters before it are made
to hand it the same map four times, shifted by (0, 0), (0, 1), (1, 0) and (1, 1) pixels of their own
resolution, so that each copy keeps what the others lose; all other filters copy.

*ReLU and max-pooling* (VGG).  The first convolution copies ``x`` and ``1 - x``.  After P poolings a
feature is the maximum of x, or of 1 - x, over a window of 2^P x 2^P pixels.  With the s last
poolings shifted each pixel lies in 4^s windows: the least of their maxima and the greatest of their
minima are its bounds, and the mean of the two is the guess.

*Sigmoid and average pooling* (LeNet).  The first convolution's copies shift the other way.  A
feature is a mean over a window, squashed once a convolution; unsquashed, it stands for the pixel at
the window's center.  Together the copies have a window at every pixel.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.building import Normalize

SHIFTS = ((0, 0), (0, 1), (1, 0), (1, 1))
# The authors' smoothing of the guess between bounds: a Gaussian so wide that it is nearly a mean.
SMOOTH_SIDE, SMOOTH_SIGMA = 5, 10.0
FITTING = "use mlp, lenet5 or vgg16"


@dataclass(frozen=True)
class Copying:
    """What becomes of one convolution.

    Attributes
    ----------
    name : str
    shift : {0, 1, -1}
        0: it copies its maps; otherwise it makes four of each, shifted that way.
    pixel : int
        Side of one pixel of its maps, in pixels of the image.
    border : int
        How many pixels of the image it leaves out above and to the left.
    """

    name: str
    shift: int
    pixel: int
    border: int


@dataclass(frozen=True)
class Plan:
    """What becomes of all convolutions, in order.

    ``pools`` says what a pooling keeps of its pixels, and ``window`` is the side of the windows
    that the last maps' values are of.
    """

    pools: Literal["max", "mean"]
    layers: tuple[Copying, ...]
    window: int

    def channels(self, colors: int) -> list[tuple[int, int]]:
        """Return how many channels of each convolution are read and written."""
        written, found = colors, []
        for index, layer in enumerate(self.layers):
            read = written
            written *= (2 if self.pools == "max" and index == 0 else 1) * (4 if layer.shift else 1)
            found.append((read, written))
        return found


def planned(layers: dict[str, nn.Module], colors: int) -> Plan:
    """Plan the convolutions of a network: shift before as many of its last poolings as fit.

    Parameters
    ----------
    layers : dict of str to nn.Module
        Those before the first linear layer, by name, in order.
    colors : int
        Channels of the image.

    Raises
    ------
    ValueError
        If a layer does not fit the attack, or a convolution has too few channels.
    """
    pools = _pools(layers)
    pooled = _pooled(layers)
    for shifted in range(sum(pooled.values()), -1, -1):
        plan = _plan(layers, pooled, shifted, pools)
        needed = [written for _, written in plan.channels(colors)]
        has = [one.out_channels for one in layers.values() if isinstance(one, nn.Conv2d)]
        if all(one <= other for one, other in zip(needed, has, strict=True)):
            return plan
        if pools == "mean":
            break  # without all its shifts there is no window at every pixel
    raise ValueError(
        f"images of {colors} channels need convolutions of {needed} channels, not {has}; for "
        "lenet5 write maps=[4, 16] for gray images and maps=[12, 48] for color"
    )


def _pools(layers: dict[str, nn.Module]) -> Literal["max", "mean"]:
    """Say what poolings keep; refuse layers after which a feature is no window of the image."""
    means = any(isinstance(layer, nn.Sigmoid | nn.AvgPool2d) for layer in layers.values())
    fitting: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Flatten)
    fitting += (nn.Sigmoid, nn.AvgPool2d) if means else (nn.ReLU, nn.MaxPool2d, Normalize)
    for name, layer in layers.items():
        if not isinstance(layer, fitting):
            raise ValueError(f"{name} is {type(layer).__name__}, which hides the image; {FITTING}")
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            plain = (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0)
        elif isinstance(layer, nn.Conv2d):
            odd = all(side % 2 and side > 1 for side in layer.kernel_size)
            plain = odd and layer.bias is not None and layer.groups == 1
            plain &= layer.stride == layer.dilation == (1, 1)
            plain &= means or layer.padding == tuple(side // 2 for side in layer.kernel_size)
        else:
            plain = True
        if not plain:
            raise ValueError(f"{name} pools, or strides, otherwise than planned for; {FITTING}")
    return "mean" if means else "max"


def _pooled(layers: dict[str, nn.Module]) -> dict[str, bool]:
    """Say of each convolution, by name, whether a pooling follows before the next one."""
    pooled: dict[str, bool] = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            pooled[name] = False
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            if not pooled or pooled[last := next(reversed(pooled))]:
                raise ValueError(f"{name} pools what no convolution prepared for it; {FITTING}")
            pooled[last] = True
    return pooled


def _plan(
    layers: dict[str, nn.Module],
    pooled: dict[str, bool],
    shifted: int,
    pools: Literal["max", "mean"],
) -> Plan:
    found, poolings, total = [], 0, sum(pooled.values())
    for name, before_pooling in pooled.items():
        layer = layers[name]
        assert isinstance(layer, nn.Conv2d)
        shift = int(before_pooling and poolings >= total - shifted)
        if pools == "mean" and poolings == 0:
            shift = -shift
        left_out = layer.kernel_size[0] // 2 - int(layer.padding[0])
        found.append(Copying(name, shift, 2**poolings, left_out * 2**poolings))
        poolings += before_pooling
    return Plan(pools, tuple(found), 2**poolings)


def overwrite(layers: dict[str, nn.Module], plan: Plan, colors: int) -> None:
    """Write the plan's filters into the convolutions, in place; channels to spare stay as they are.

    Standardization before the first convolution is undone by it.
    """
    normalize = next((one for one in layers.values() if isinstance(one, Normalize)), None)
    mean = normalize.mean.flatten() if normalize else torch.zeros(colors)
    std = normalize.std.flatten() if normalize else torch.ones(colors)
    for index, (copying, (read, _)) in enumerate(
        zip(plan.layers, plan.channels(colors), strict=True)
    ):
        conv = layers[copying.name]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        # (channel read, weight, bias) of each map, before it is shifted.
        maps = [(channel, 1.0, 0.0) for channel in range(read)]
        if index == 0:
            maps = [(c, float(std[c]), float(mean[c])) for c in range(colors)]
            if plan.pools == "max":
                maps += [(c, -weight, 1 - bias) for c, weight, bias in maps]
        middle = tuple(side // 2 for side in conv.kernel_size)
        shifts = SHIFTS if copying.shift else SHIFTS[:1]
        with torch.no_grad():
            conv.bias.zero_()
            conv.weight[: len(shifts) * len(maps)] = 0
            for row, ((down, right), (channel, weight, bias)) in enumerate(product(shifts, maps)):
                tap = middle[0] + copying.shift * down, middle[1] + copying.shift * right
                conv.weight[row, channel, tap[0], tap[1]] = weight
                conv.bias[row] = bias


def windows(plan: Plan) -> list[tuple[int, int]]:
    """Return where the first window of each group of maps starts, (down, right) in pixels."""
    starts = [(0, 0)]
    for layer in plan.layers:
        starts = [(down + layer.border, right + layer.border) for down, right in starts]
        if layer.shift:
            step = layer.shift * layer.pixel
            starts = [
                (d + step * down, r + step * right) for down, right in SHIFTS for d, r in starts
            ]
    return starts


def image_of(features: Tensor, plan: Plan, shape: tuple[int, int, int]) -> Tensor:
    """Return the image that the last maps speak of.

    Parameters
    ----------
    features : Tensor
        ``[F, h, w]``: all maps of the last layer before the linear ones.
    plan : Plan
    shape : tuple of int
        ``(C, H, W)``.

    Returns
    -------
    Tensor
        ``[C, H, W]`` in ``[0, 1]``.
    """
    if not plan.layers:
        return features.view(shape).clamp(0, 1)
    written = plan.channels(shape[0])[-1][1]
    groups = features[:written].view(len(windows(plan)), -1, *features.shape[1:])
    if plan.pools == "mean":
        return _from_means(groups, plan, shape)
    lower, upper = bounds(groups, plan, shape)
    kernel = torch.arange(SMOOTH_SIDE, dtype=features.dtype) - SMOOTH_SIDE // 2
    kernel = (-kernel.square() / (2 * SMOOTH_SIGMA**2)).exp()
    kernel = torch.outer(kernel, kernel) / kernel.sum().square()
    edge = [SMOOTH_SIDE // 2] * 4
    padded = functional.pad(((lower + upper) / 2).unsqueeze(1), edge, mode="replicate")
    smooth = functional.conv2d(padded, kernel.view(1, 1, SMOOTH_SIDE, SMOOTH_SIDE)).squeeze(1)
    return smooth.clamp(0, 1)


def bounds(groups: Tensor, plan: Plan, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return what each pixel is at least and at most, two ``[C, H, W]``.

    ``groups`` are ``[G, 2C, h, w]``: for each start of :func:`windows` the maxima of x, then those
    of 1 - x.  All starts and sides are multiples of the finest shift, the unit of the bounds.
    """
    colors, height, width = shape
    unit = min((layer.pixel for layer in plan.layers if layer.shift), default=plan.window)
    rows, columns = -(-height // unit), -(-width // unit)
    upper = groups.new_ones(2 * colors, rows, columns)
    for maxima, (down, right) in zip(groups, windows(plan), strict=True):
        spread = maxima.repeat_interleave(plan.window // unit, 1)
        spread = spread.repeat_interleave(plan.window // unit, 2)
        below, beside = down // unit, right // unit
        part = upper[:, below:, beside:]
        part.copy_(torch.minimum(part, spread[:, : rows - below, : columns - beside]))
    upper = upper.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, :height, :width]
    return 1 - upper[colors:], upper[:colors]


def _from_means(groups: Tensor, plan: Plan, shape: tuple[int, int, int]) -> Tensor:
    """Unsquash ``groups`` (``[G, C, h, w]``), and put each at the middle of its window.

    Pixels that are the middle of no window get the nearest that is.
    """
    values = groups
    for _ in plan.layers:
        values = values.clamp(3e-8, 1 - 3e-8).logit()
    starts = windows(plan)
    first = min(starts)
    rows, columns = (side * plan.window for side in groups.shape[2:])
    known = groups.new_zeros(shape[0], rows, columns)
    for one, (down, right) in zip(values, starts, strict=True):
        known[:, down - first[0] :: plan.window, right - first[1] :: plan.window] = one
    above, left = (start + plan.window // 2 for start in first)
    edge = [left, shape[2] - left - columns, above, shape[1] - above - rows]
    return functional.pad(known.unsqueeze(0), edge, mode="replicate")[0].clamp(0, 1)
