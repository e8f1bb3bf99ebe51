"""Gaussian noise on named tensors."""

import torch
from torch import Tensor

from fedsim.defense import Tensors


def normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of a tensor's shape and type, where the tensor is."""
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return noise.to(tensor.device)


def noised(tensors: Tensors, std: float, generator: torch.Generator) -> Tensors:
    """Return the tensors with independent noise of ``std`` on every coordinate."""
    return {name: tensor + std * normal(tensor, generator) for name, tensor in tensors.items()}
