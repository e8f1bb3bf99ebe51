"""Putting a module into any network.

What was there keeps its names, but for the one layer that gets company.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.defense import ClientContext


@dataclass(frozen=True)
class Called:
    """A module, as a forward pass meets it: shapes are those of one example."""

    name: str
    layer: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def called(model: nn.Module) -> list[Called]:
    """Return the modules without parts in the order in which one black image goes through them."""
    return [one for one in met(model) if not any(one.layer.children())]


def met(model: nn.Module) -> list[Called]:
    """Return the model's modules in the order in which one black image comes out of them."""
    found: list[Called] = []

    def note(name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(Called(name, layer, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))

        return hook

    hooks = [
        layer.register_forward_hook(note(name)) for name, layer in model.named_modules() if name
    ]
    spec: DataSpec = model.spec  # type: ignore[assignment]
    parameter, training = next(model.parameters()), model.training
    with torch.no_grad():  # in eval mode: BatchNorm's statistics stay as they are
        model.eval()(parameter.new_zeros(1, *spec.shape))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return found


def classifier(model: nn.Module) -> Called:
    """Return the last fully connected layer.

    Raises
    ------
    ValueError
        If the network has none.
    """
    linear = [one for one in called(model) if isinstance(one.layer, nn.Linear)]
    if not linear:
        raise ValueError("the network has no fully connected layer; use one that ends in it")
    return linear[-1]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def remembered(layer: nn.Module, prefix: str, ctx: ClientContext) -> None:
    """Give a module's parameters the values that they ended the last round with, if any did.

    ``ctx.store`` holds them from here on, under names that begin with ``prefix``.
    """
    for name, parameter in layer.named_parameters():
        key = f"{prefix}.{name}"
        if key in ctx.store:
            parameter.data.copy_(ctx.store[key])
        ctx.store[key] = parameter.detach()
