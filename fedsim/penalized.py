"""Modules that add to the clients' training loss, and the loss that hears them.

They are part of the network that server and clients share, and so is what they add: attacks by
optimization, and those that learn from gradients, compute a client's gradient of this loss too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy


class Penalized(nn.Module, ABC):
    """A module that adds to the training loss."""

    @abstractmethod
    def penalty(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar that this module adds, given what it was fed, ``[B, ...]``."""


def penalized_loss(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return mean cross-entropy plus what each :class:`Penalized` module adds.

    Parameters
    ----------
    model : nn.Module
    batch : tuple of Tensor
        Images ``[B, C, H, W]``, labels ``[B]`` int64 or ``[B, K]`` soft.
    weights : mapping of str to Tensor or None
        Stand in for the model's parameters of these names, under ``torch.func`` too.
    """
    images, labels = batch
    added: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Penalized)
        added.append(layer.penalty(inputs[0], labels))

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in model.modules()
        if isinstance(layer, Penalized)
    ]
    try:
        outputs = (
            functional_call(model, dict(weights), (images,))
            if weights is not None
            else model(images)
        )
    finally:
        for hook in hooks:
            hook.remove()
    return sum(added, cross_entropy(outputs, labels))
