"""The way of the pixels to the first fully connected ReLU layer of a model, and how to clear it.

Boenisch et al. (EuroS&P 2023), Sec. 5.2: a convolution with a single one in a filter hands one
channel on.  One of stride ``w`` needs ``w^2`` filters a channel, the one at another place in each.
Filters that are left over are made negative, so that their ReLU is silent: what the fully
connected layer reads is a permutation of the pixels, each value as it was.

The public normalization in front is undone on the way, by the first convolution or in the rows, so
that traps see pixels in ``[0, 1]``.  Whether it all worked is not reasoned but measured, with
images whose pixels all differ.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.models.building import Normalize

REMEDY = "use a model that starts with a ReLU layer: mlp(hidden=[1000])"
# Roundings of float32 parameters stay far below the distance of two pixels' values.
CLOSE = 1e-2


@dataclass(frozen=True)
class Passage:
    """Names of modules: the convolutions on the way, the layer, and the linear one after it."""

    convolutions: tuple[str, ...]
    layer: str
    after: str


@dataclass(frozen=True)
class PixelMap:
    """Where the layer reads each pixel: ``input[positions] = scale * pixel + offset``, ``[D]``."""

    positions: Tensor
    scale: Tensor
    offset: Tensor

    def rows(self, weight: Tensor, bias: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return rows of the layer (``[n, width]``, ``[n]``) that act on pixels as those given."""
        on_inputs = weight / self.scale
        full = torch.zeros(len(weight), width, dtype=weight.dtype)
        full[:, self.positions] = on_inputs
        return full, bias - on_inputs @ self.offset

    def pixels(self, inputs: Tensor) -> Tensor:
        """Map the layer's inputs at ``positions`` (``[K, D]``) to pixels, ``[K, D]``."""
        return (inputs - self.offset) / self.scale


def find_passage(model: nn.Module) -> Passage:
    """Find the first fully connected layer and what lies before and behind it.

    Raises
    ------
    ValueError
        If something else than convolutions and ReLU lies before it, or no ReLU and linear layer
        behind it.
    """
    called = _called(model)
    at = next((i for i, (_, m) in enumerate(called) if isinstance(m, nn.Linear)), None)
    if at is None:
        raise ValueError(f"this model has no fully connected layer to set traps in; {REMEDY}")
    for name, module in called[:at]:
        if not isinstance(module, Normalize | nn.Conv2d | nn.ReLU | nn.Flatten | nn.Identity):
            raise ValueError(
                f"pixels cannot be led through {name!r} ({type(module).__name__}) to the first "
                f"fully connected layer; {REMEDY}"
            )
    name, layer = called[at]
    behind = [(n, m) for n, m in called[at + 1 :] if not isinstance(m, nn.Identity | nn.Dropout)]
    kinds = [type(m) for _, m in behind[:2]]
    if kinds != [nn.ReLU, nn.Linear] or layer.bias is None:
        raise ValueError(
            f"{name!r}, the first fully connected layer, needs a bias, a ReLU and a linear layer "
            f"behind it; {REMEDY}"
        )
    convolutions = tuple(n for n, m in called[:at] if isinstance(m, nn.Conv2d))
    return Passage(convolutions, name, behind[1][0])


def _called(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules without children, in the order in which a forward pass calls them."""
    model = copy.deepcopy(model).eval()
    called: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not any(module.children()) and not isinstance(module, nn.Sequential):
            module.register_forward_hook(lambda m, *_, name=name: called.append((name, m)))
    with torch.no_grad():
        model(torch.zeros(1, *_shape(model), dtype=_dtype(model)))
    return called


def clear(model: nn.Module, passage: Passage, generator: torch.Generator) -> None:
    """Turn the convolutions into a permutation of the pixels, in place.

    Raises
    ------
    ValueError
        If a convolution has too few filters, too small a kernel, groups, or no bias.
    """
    carried = list(range(_shape(model)[0]))
    scale, offset = _as_it_is(carried)
    if passage.convolutions:
        scale, offset = _affine_of(model, passage.convolutions[0])
    for name in passage.convolutions:
        convolution = model.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        _refuse_unfit(name, convolution, len(carried))
        with torch.no_grad():
            carried = _lead_through(convolution, carried, scale, offset, generator)
        scale, offset = _as_it_is(carried)


def _as_it_is(channels: list[int]) -> tuple[Tensor, Tensor]:
    ones = torch.ones(len(channels), dtype=torch.float64)
    return ones, torch.zeros_like(ones)


def _affine_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return scale and offset ``[C]`` of what a module reads: ``scale * pixel + offset``."""
    shape = _shape(model)
    black, white = _read_by(model, name, torch.stack([torch.zeros(shape), torch.ones(shape)]))
    return (white - black)[:, 0, 0], black[:, 0, 0]


def _refuse_unfit(name: str, convolution: nn.Conv2d, channels: int) -> None:
    stride, kernel, padding = convolution.stride, convolution.kernel_size, convolution.padding
    places = stride[0] * stride[1]
    if convolution.groups != 1 or convolution.dilation != (1, 1) or convolution.bias is None:
        raise ValueError(f"{name!r} has groups, dilation or no bias: pixels cannot be led through")
    if isinstance(padding, str) or any(
        s + p > k for s, p, k in zip(stride, padding, kernel, strict=True)
    ):
        raise ValueError(f"the kernel of {name!r} does not reach all pixels of a stride")
    if channels * places > convolution.out_channels:
        raise ValueError(
            f"{name!r} has {convolution.out_channels} filters, and {channels * places} are needed "
            f"to lead {channels} channels through stride {stride[0]}; widen the model, or {REMEDY}"
        )


def _lead_through(
    convolution: nn.Conv2d,
    carried: list[int],
    scale: Tensor,
    offset: Tensor,
    generator: torch.Generator,
) -> list[int]:
    """Write one convolution; return its channels that carry pixels."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    fan = weight[0].numel()
    draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    silent = -draw.abs() / fan**0.5
    per_input = torch.ones(weight.shape[1], dtype=torch.float64)
    shift = torch.zeros_like(per_input)
    per_input[carried], shift[carried] = 1 / scale, -offset / scale
    # On pixels undone to [0, 1], negative weights give nothing above zero.
    weight.copy_(silent * per_input.view(1, -1, 1, 1))
    bias.copy_(silent.sum(dim=(2, 3)) @ shift)
    down, across = (int(p) for p in convolution.padding)
    filled = 0
    for channel in carried:
        for u in range(convolution.stride[0]):
            for v in range(convolution.stride[1]):
                weight[filled] = 0
                weight[filled, channel, down + u, across + v] = per_input[channel]
                bias[filled] = shift[channel]
                filled += 1
    return list(range(filled))


def pixel_map(model: nn.Module, layer: str) -> PixelMap:
    """Measure where the layer reads each pixel; ``[D]`` each, float64.

    Raises
    ------
    ValueError
        If some pixel does not reach it as it is.
    """
    shape = _shape(model)
    size = prod(shape)
    values = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(size, generator=generator) for _ in range(2)]
    shown = torch.stack(
        [torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)]
        + [values[order] for order in orders]
    )
    read = _read_by(model, layer, shown.view(4, *shape)).flatten(1)
    offset, scale = read[0], read[1] - read[0]
    alive = (scale.abs() > 1e-6 * scale.abs().max()).nonzero().flatten()
    told = ((read[2:, alive] - offset[alive]) / scale[alive] * size - 0.5).nan_to_num(-1.0)
    rank = told.round().long().clamp(0, size - 1)
    sources = torch.stack([order.argsort()[own] for order, own in zip(orders, rank, strict=True)])
    as_it_is = (sources[0] == sources[1]) & ((told - rank).abs() < CLOSE * size**0.5).all(dim=0)
    where = torch.full((size,), -1)
    where[sources[0][as_it_is].flip(0)] = alive[as_it_is].flip(0)
    if missing := int((where < 0).sum()):
        raise ValueError(
            f"{missing} of {size} pixels do not reach {layer!r}, the first fully connected layer; "
            f"{REMEDY}"
        )
    return PixelMap(where, scale[where], offset[where])


def _read_by(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return what a module gets to read of images ``[K, C, H, W]``, in float64."""
    model = copy.deepcopy(model).eval().double().cpu()
    with _listening(model.get_submodule(name)) as heard, torch.no_grad():
        model(images.double())
    return heard[0]


@contextmanager
def _listening(module: nn.Module) -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].clone()))
    try:
        yield heard
    finally:
        handle.remove()


def _shape(model: nn.Module) -> tuple[int, int, int]:
    spec: DataSpec = model.spec  # type: ignore[assignment]
    return spec.shape


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
