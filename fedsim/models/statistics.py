"""What BatchNorm layers see: mean and variance of each one's input over a batch."""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.data.dataset import DataSpec

#: By name of the layer: mean ``[C]`` and biased variance ``[C]`` of what goes into it, over the
#: batch and all places.
LayerStatistics = dict[str, tuple[Tensor, Tensor]]


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return a model's BatchNorm layers by name, in its order."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def layer_statistics(model: nn.Module, images: Tensor) -> LayerStatistics:
    """Return the statistics of each BatchNorm layer's input, on the model's device.

    BatchNorm is in the mode that the model is in; dropout is off.  The model is left as it is.

    Parameters
    ----------
    model : nn.Module
    images : Tensor
        ``[B, C, H, W]`` in ``[0, 1]``.
    """
    return {
        name: (values.mean(dim=1), values.var(dim=1, correction=0))
        for name, values in _inputs(model, images).items()
    }


def positions(model: nn.Module) -> dict[str, int]:
    """Return over how many values of one example each BatchNorm layer takes a channel's mean."""
    spec: DataSpec = model.spec  # type: ignore[assignment]
    # Two, because one value a channel is none to normalize by in train mode.
    blank = torch.zeros(2, *spec.shape)
    return {name: values.shape[1] // 2 for name, values in _inputs(model, blank).items()}


def _inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what goes into each BatchNorm layer, ``[C, B * H * W]``."""
    seen: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        seen[name] = inputs[0].transpose(0, 1).flatten(1)

    model = copy.deepcopy(model)  # its own forward pass moves running statistics
    for layer in model.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    for name, norm in batchnorm_layers(model).items():
        norm.register_forward_pre_hook(partial(look, name))
    with torch.no_grad():
        model(images.to(next(model.parameters())))
    return seen
