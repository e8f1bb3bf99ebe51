"""What clients would have sent for candidate batches, T batches at once.

An operator maps candidates to updates, differentiably.  The plain one is the network's gradient
``F(x, y) = grad_w mean_b CE(f_w(x_b), y_b)`` for T independent batches under the same weights w:
restarts of one target and targets of one round share w.  What modules of the network add to the
clients' loss is in it (:mod:`fedsim.penalized`).  ``torch.func`` maps the gradient over the
batches, so that one call serves them all; a single batch takes the plain way, which has less
overhead.  Either result can be differentiated again.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import grad, replace_all_batch_norm_modules_, vmap

from fedsim.penalized import penalized_loss
from strategies.attacks.optimization.convolutions import is_narrow
from strategies.attacks.optimization.parametrizations import Candidate


class Operator(ABC):
    """Maps candidates to what clients would have sent, and to what layers saw on the way."""

    #: How many gradients of the network one candidate takes.
    evaluations: int = 1
    #: Whether the network's convolutions all have few channels.
    narrow: bool = False

    @abstractmethod
    def __call__(self, candidate: Candidate) -> tuple[list[Tensor], list[Tensor]]:
        """Return one update for each parameter, and the input of each layer that is read.

        The former are ``[T, *shape]``, or ``[*shape]`` where T is 1; the latter ``[T, B, ...]``.
        All can be differentiated.
        """

    def take(self, rows: Tensor) -> Self:  # noqa: ARG002
        """Return the operator of some of the targets."""
        return self


class BatchGradients(Operator):
    """Gradients of the clients' loss with respect to the named parameters.

    Parameters
    ----------
    model : nn.Module
        Owned from here on.  In train mode its BatchNorm layers lose their running statistics,
        which mapping cannot move and nothing here reads.
    names : sequence of str
        Parameters to differentiate; the others are constants.
    layers : sequence of str
        Modules whose inputs are read on the way.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], layers: Sequence[str] = ()) -> None:
        freeze(model, names)
        self.model, self.narrow = model, is_narrow(model)
        everything = dict(model.named_parameters())
        self.wanted = [everything[name] for name in names]
        self._constants = {name: everything[name].detach() for name in names}
        self._seen: dict[str, Tensor] = {}
        self._layers = tuple(layers)
        for name in self._layers:
            model.get_submodule(name).register_forward_pre_hook(self._reader(name))
        mapped = grad(self._loss_at, has_aux=True)
        self._each = vmap(mapped, in_dims=(None, 0, 0), randomness="different")

    def __call__(self, candidate: Candidate) -> tuple[list[Tensor], list[Tensor]]:
        """Return one gradient for each name, and what was read."""
        images, labels, _ = candidate
        if len(images) > 1:
            found, seen = self._each(self._constants, images, labels)
            return list(found.values()), list(seen)
        loss = penalized_loss(self.model, (images[0], labels[0]))
        gradients = torch.autograd.grad(
            loss, self.wanted, create_graph=True, materialize_grads=True
        )
        return list(gradients), [self._seen[name].unsqueeze(0) for name in self._layers]

    def _reader(self, name: str):  # type: ignore[no-untyped-def]
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[name] = inputs[0]

        return read

    def _loss_at(
        self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = penalized_loss(self.model, (images, labels), parameters)
        return loss, tuple(self._seen[name] for name in self._layers)


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Leave gradients to the named parameters, and BatchNorm in train mode without memory."""
    if model.training:
        replace_all_batch_norm_modules_(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
