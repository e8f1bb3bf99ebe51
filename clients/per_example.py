"""The gradient of every example of a batch, a few examples at a time.

``g_i = dl_i / dW`` with ``l_i`` the cross-entropy of example i.  By ``torch.func.vmap`` where the
examples do not touch each other; with BatchNorm in train mode they do, and ``l_i`` is then the loss
of example i in its batch (as in the released code of Garov et al., ICLR 2024), one backward pass
for each.  Where they must not touch (``alone``), each goes through the model by itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedsim.defense import Batch, Tensors

# Numbers held at once: 256 MB in float32.
AT_ONCE = 2**26
#: What PyTorch says where it cannot follow a model through vmap and grad: branches by values,
#: in-place writes, sizes that hang on values, NumPy, autograd functions without a rule.
UNFOLLOWED = ("vmap", "functorch", "Batching rule", "(vjp, jvp, grad, etc)", "access data pointer")


def per_example_gradients(
    model: nn.Module, batch: Batch, *, alone: bool = False
) -> Iterator[Tensors]:
    """Yield the gradients of consecutive examples, each ``[b, *shape]`` by parameter name.

    Parameters
    ----------
    model : nn.Module
        In the mode in which it would be trained; its buffers may move (BatchNorm).
    batch : tuple of Tensor
        Images ``[B, C, H, W]`` and labels ``[B]``.
    alone : bool
        Whether no example's gradient may depend on another example, whatever the model does.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    together = max(1, AT_ONCE // max(1, sum(p.numel() for p in parameters.values())))
    if _examples_touch(model) and not alone:
        yield from _one_by_one(model, parameters, batch, together)
        return
    for at in range(0, len(batch[1]), together):
        some = batch[0][at : at + together], batch[1][at : at + together]
        try:
            found = _at_once(model, parameters, some)
        except RuntimeError as error:
            # The server chose this architecture, and it may do what vmap cannot follow.
            if not any(words in str(error) for words in UNFOLLOWED):
                raise
            each = [(some[0][i : i + 1], some[1][i : i + 1]) for i in range(len(some[1]))]
            for these in each if alone else [some]:
                yield from _one_by_one(model, parameters, these, together)
        else:
            yield found


def _examples_touch(model: nn.Module) -> bool:
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return any(isinstance(m, norms) and m.training for m in model.modules())


def _at_once(model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch) -> Tensors:
    detached = {name: p.detach() for name, p in parameters.items()}

    def loss(own: Tensors, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, own, (image.unsqueeze(0),))
        return cross_entropy(logits, label.unsqueeze(0))

    every = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    gradients: Tensors = every(detached, *batch)
    return gradients


def _one_by_one(
    model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch, together: int
) -> Iterator[Tensors]:
    losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
    for chunk in torch.split(losses, together):
        found = [
            torch.autograd.grad(
                loss,
                list(parameters.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for loss in chunk
        ]
        stacked = [torch.stack(several) for several in zip(*found, strict=True)]
        yield dict(zip(parameters, stacked, strict=True))
