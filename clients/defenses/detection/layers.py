"""The layers of a received model, told by their arrays: what any architecture has.

A detector cannot trust the names or the classes that a server sent; it looks at shapes.  A weight
of two dimensions is a linear layer, one of three or more a convolution, each read as a matrix with
one row for each unit or filter.
"""

import torch
from torch import Tensor, nn

from clients.per_example import per_example_gradients
from fedsim.defense import Batch, Tensors

# Squares of what is smaller vanish in float32, and a server may well scale its gradients so far.
SMALL = 1e-12


def matrices(arrays: Tensors) -> Tensors:
    """Return every weight as a matrix ``[rows, fan-in]``, in the model's order."""
    return {
        name: tensor.flatten(1)
        for name, tensor in arrays.items()
        if tensor.ndim >= 2 and tensor.is_floating_point()
    }


def unread(arrays: Tensors) -> list[str]:
    """Return the arrays in which values could lie that no check here reads, in the model's order.

    Those of whole numbers, and those of one dimension that are longer than any weight has rows (a
    bias, a norm's scale and its statistics are not).  No model that comes with the range has any.
    """
    rows = max((len(matrix) for matrix in matrices(arrays).values()), default=0)
    return [
        f"{name} (not read)"
        for name, tensor in arrays.items()
        if tensor.numel() > 1
        and (not tensor.is_floating_point() or (tensor.ndim < 2 and len(tensor) > rows))
    ]


def linear(arrays: Tensors) -> Tensors:
    """Return the weights of linear layers, ``[rows, fan-in]``."""
    return {name: t for name, t in matrices(arrays).items() if arrays[name].ndim == 2}


def bias_name(weight: str) -> str:
    """Return what the bias that goes with a weight is called."""
    return weight.removesuffix("weight") + "bias"


def bias_of(arrays: Tensors, weight: str) -> Tensor | None:
    """Return the bias ``[rows]`` that goes with a weight, if there is one."""
    bias = arrays.get(bias_name(weight))
    fits = bias is not None and bias.shape == arrays[weight].shape[:1]
    return bias if fits else None


def hidden(arrays: Tensors, classes: int) -> Tensors:
    """Return the linear layers but the head: the last one, if it has one row for each class.

    In an honest head one row is often moved by the one image of its class.
    """
    found = linear(arrays)
    last = next(reversed(found), None)
    if last is not None and len(found[last]) == classes:
        del found[last]
    return found


def classes_of(model: nn.Module, batch: Batch) -> int:
    """Return how many logits a model gives."""
    training = model.training
    with torch.no_grad():
        count = int(model.eval()(batch[0][:1]).shape[1])
    model.train(training)
    return count


def gradient_norms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the length of every example's gradient, ``[B]`` float64, for each weight."""
    found: dict[str, list[Tensor]] = {}
    for chunk in per_example_gradients(model, batch):
        for name, gradients in chunk.items():
            if gradients.ndim >= 3:  # one dimension more than the weight
                found.setdefault(name, []).append(lengths(gradients.flatten(1)))
    return {name: torch.cat(parts) for name, parts in found.items()}


def lengths(vectors: Tensor) -> Tensor:
    """Return the L2 norm along the last dimension, float64."""
    if float(torch.linalg.vector_norm(vectors, ord=float("inf"))) < SMALL:
        vectors = vectors.double()
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1).double()
    return norms
