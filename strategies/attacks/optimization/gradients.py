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


class BatchGradients:
    """Gradients of soft-label cross-entropy with respect to the named parameters.

    Parameters
    ----------
    model : nn.Module
        Changed in train mode: its BatchNorm layers stop moving their running statistics, which
        mapping forbids and nothing here reads.
    names : sequence of str
        Parameters to differentiate; the others are constants.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if model.training:
            replace_all_batch_norm_modules_(model)
        everything = {name: p.detach() for name, p in model.named_parameters()}
        self.model = model
        self.wanted = {name: everything[name].clone().requires_grad_() for name in names}
        self.fixed = {name: p for name, p in everything.items() if name not in self.wanted}
        self._each = vmap(grad(self._loss), in_dims=(None, 0, 0), randomness="different")

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the named parameters, in order."""
        return [p.shape for p in self.wanted.values()]

    def __call__(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return one gradient ``[T, *shape]`` for each name.

        Parameters
        ----------
        images : Tensor
            ``[T, B, C, H, W]``, values in ``[0, 1]``.
        labels : Tensor
            ``[T, B, K]``, probabilities.
        """
        if len(images) > 1:
            constants = {name: p.detach() for name, p in self.wanted.items()}
            return list(self._each(constants, images, labels).values())
        loss = self._loss(self.wanted, images[0], labels[0])
        gradients = torch.autograd.grad(
            loss, list(self.wanted.values()), create_graph=True, materialize_grads=True
        )
        return [gradient.unsqueeze(0) for gradient in gradients]

    def _loss(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, {**parameters, **self.fixed}, (images,))
        return -(logits.log_softmax(dim=-1) * labels).sum() / len(images)
