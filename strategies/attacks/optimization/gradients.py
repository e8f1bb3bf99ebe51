"""The gradients that candidate batches would have had, T batches at once.

``F(x, y) = grad_w mean_b CE(f_w(x_b), y_b)`` for T independent batches under the same weights w:
restarts of one target and targets of one round share w.  ``torch.func`` maps the gradient over the
batches, so that one call serves them all; a single batch takes the plain way, which has less
overhead.  Either result can be differentiated again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn.functional import cross_entropy


class BatchGradients:
    """Gradients of mean cross-entropy with respect to the named parameters.

    Parameters
    ----------
    model : nn.Module
        Owned from here on.  In train mode its BatchNorm layers lose their running statistics,
        which mapping cannot move and nothing here reads.
    names : sequence of str
        Parameters to differentiate; the others are constants.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if model.training:
            replace_all_batch_norm_modules_(model)
        self.model = model
        everything = dict(model.named_parameters())
        for name, parameter in everything.items():
            parameter.requires_grad_(name in names)
        self.wanted = [everything[name] for name in names]
        self._constants = {name: everything[name].detach() for name in names}
        self._each = vmap(grad(self._loss_at), in_dims=(None, 0, 0), randomness="different")

    def __call__(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return one gradient for each name, ``[T, *shape]``; plain ``[*shape]`` where T is 1.

        Parameters
        ----------
        images : Tensor
            ``[T, B, C, H, W]``, values in ``[0, 1]``.
        labels : Tensor
            ``[T, B]`` int64, or probabilities ``[T, B, K]``.
        """
        if len(images) > 1:
            return list(self._each(self._constants, images, labels).values())
        loss = cross_entropy(self.model(images[0]), labels[0])
        return list(
            torch.autograd.grad(loss, self.wanted, create_graph=True, materialize_grads=True)
        )

    def _loss_at(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(self.model, parameters, (images,)), labels)
