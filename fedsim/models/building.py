"""Models by expression, and which of their tensors travel.

What travels is every parameter and every floating-point buffer (BatchNorm's running statistics),
and down, not up, the ``indices`` of what is stored sparse; other integer buffers (BatchNorm's
counter) stay at home.  Models take images in ``[0, 1]`` and normalize inside
where they want it, so that any layer put before them reads pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedsim import registry, seeds
from fedsim.data.dataset import DataSpec
from fedsim.files import write_atomically


class Normalize(nn.Module):
    """Standardize images by public per-channel constants, which do not travel."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to zero mean and unit variance."""
        return (images - self.mean) / self.std


def build_model(expression: str, spec: DataSpec) -> nn.Module:
    """Build a model; its public facts are kept as ``model.spec``.

    Raises
    ------
    ScenarioError
        If no model has this name, or a parameter is wrong.
    """
    model: nn.Module = registry.build("model", expression, "model.name", spec)
    model.spec = spec  # type: ignore[assignment]
    return model


def initial_model(expression: str, spec: DataSpec, seed: int) -> nn.Module:
    """Build a model whose initial weights are repeatable from the public seed."""
    with seeds.seeded_globals(seeds.derive(seed, "model")):
        return build_model(expression, spec)


def travelling(model: nn.Module) -> dict[str, Tensor]:
    """Return what travels, by name: parameters, floating-point buffers and sparse indices."""
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() or is_index(name)
    }


def trained_tensors(model: nn.Module) -> int:
    """Return how many arrays of a model are trained."""
    return sum(parameter.requires_grad for parameter in model.parameters())


def is_buffer(name: str) -> bool:
    """Say whether a travelling array is a BatchNorm statistic rather than a parameter."""
    return name.endswith((".running_mean", ".running_var"))


def is_index(name: str) -> bool:
    """Say whether a travelling array says where sparse values lie; the server knows it already."""
    return name.rpartition(".")[2] == "indices"


def uploaded_names(model: nn.Module, batchnorm: str) -> list[str]:
    """Return the names a client uploads, in order: parameters, and statistics where shared."""
    names = [name for name in travelling(model) if not is_index(name)]
    return [name for name in names if batchnorm == "shared" or not is_buffer(name)]


def load_arrays(model: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Copy tensors or numpy arrays into a model in place.

    Raises
    ------
    ValueError
        If names or shapes are not exactly those of :func:`travelling`.
    """
    own = travelling(model)
    if missing := sorted(own.keys() ^ arrays.keys()):
        raise ValueError(f"arrays do not fit the model: {missing[:5]} missing or unknown")
    with torch.no_grad():
        for name, tensor in own.items():
            value = torch.as_tensor(arrays[name])
            if value.shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, not {list(tensor.shape)}")
            tensor.copy_(value)
        for name, buffer in model.named_buffers():
            if not buffer.is_floating_point() and not is_index(name):
                buffer.zero_()  # BatchNorm's counter: nothing of the last client stays


WEIGHTS = "model.safetensors"


def saved_weights(path: Path) -> dict[str, Tensor]:
    """Read a model's travelling arrays from a safetensors file, or from a run's folder.

    Raises
    ------
    OSError
        If there is no such file.
    SafetensorError
        If it is none of that kind.
    """
    return load_file(path / WEIGHTS if path.is_dir() else path)


def save_weights(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write a model's travelling arrays (numpy) into a run's folder, for runs after it."""
    tensors = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
    write_atomically(folder / WEIGHTS, save(tensors))
