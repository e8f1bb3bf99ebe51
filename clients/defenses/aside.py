"""Forward and backward passes on the side: what is trained, its statistics too, stays as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsim.defense import Batch, Tensors


def logits(model: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] = {}) -> Tensor:
    """Return what a model makes of images ``[B, C, H, W]``, with some of its parameters replaced.

    BatchNorm normalizes as it would, and keeps its running statistics.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found: Tensor = functional_call(model, {**buffers, **parameters}, (images,))
    return found


def entering(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters one of a model's layers, ``[B, ...]``, and the logits ``[B, K]``."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        made = logits(model, images)
    finally:
        handle.remove()
    return seen[-1], made


def gradient_of(model: nn.Module, batch: Batch, *, create_graph: bool = False) -> Tensors:
    """Return the gradient of the mean cross-entropy on a batch, by parameter name.

    With ``create_graph`` it can be differentiated again, by the images.
    """
    loss = cross_entropy(logits(model, batch[0]), batch[1])
    return slopes(loss, model, create_graph=create_graph)


def slopes(loss: Tensor, model: nn.Module, *, create_graph: bool = False) -> Tensors:
    """Return a loss's gradient by parameter name; zero for a parameter that had no part in it."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss,
        list(parameters.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, found, strict=True))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the fully connected layers by name, in the order in which they are registered."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def the_step(trainee: nn.Module | None, batch: Batch | None) -> tuple[nn.Module, Batch]:
    """Return model and examples of a step that is under way."""
    if trainee is None or batch is None:
        raise ValueError("there is no step under way: this acts on a step's gradient only")
    return trainee, batch
