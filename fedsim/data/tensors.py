"""Data that is yours: one safetensors file, which holds no code.

Tensors ``images`` (``[N, C, H, W]``, uint8 or floating in ``[0, 1]``) and ``labels`` (``[N]``,
integers from 0), optionally ``test_images`` and ``test_labels``, and the names of the classes as a
JSON list under the metadata key ``classes``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim.data.dataset import DataSet, Split
from fedsim.files import write_atomically
from fedsim.registry import register


@register("dataset", "tensors")
def tensors(
    *, path: str, test_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
) -> DataSet:
    """Return the examples of one file.

    Parameters
    ----------
    path : str
        The ``.safetensors`` file.
    test_fraction : float or None
        Share at the end of the file that becomes the test split; 0.0 leaves the test split empty.
        ``None`` stands for the file's own test tensors, or 0.2 where it has none.

    Raises
    ------
    ValueError, OSError
        If the file is missing, is not such a file, or holds its own test split and a fraction is
        asked for.
    """
    file = Path(path).expanduser().absolute()
    stored, classes = _read(file)
    whole = _split(stored, "", file)
    test = _split(stored, "test_", file) if "test_images" in stored else None
    if test is not None and test_fraction is not None:
        raise ValueError(f"{file} has its own test split, so test_fraction= would be ignored")
    if test is None:
        count = int(len(whole) * (0.2 if test_fraction is None else test_fraction))
        cut = len(whole) - count
        test = Split(whole.images[cut:], whole.labels[cut:])
        whole = Split(whole.images[:cut], whole.labels[:cut])
    largest = max(int(part.labels.max()) for part in (whole, test) if len(part))
    names = classes or tuple(str(label) for label in range(largest + 1))
    if largest >= len(names):
        raise ValueError(f"{file} has a label {largest} and only {len(names)} classes")
    if whole.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{file}: train and test images differ in shape")
    return DataSet(whole, test, names)


def save_tensors(path: Path, split: Split, classes: Sequence[str]) -> None:
    """Write one split as such a file: all a SuperNode needs to be a client.

    The range of labels is the task's, not this file's, so ``classes`` has all of them.
    """
    content = {"images": split.images.contiguous(), "labels": split.labels.contiguous()}
    write_atomically(path, save(content, metadata={"classes": json.dumps(list(classes))}))


def _read(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; path= names a .safetensors file")
    try:
        with safe_open(file, framework="pt") as stored:
            names = json.loads((stored.metadata() or {}).get("classes", "[]"))
            content = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from error
    return content, tuple(map(str, names))


def _split(stored: dict[str, Tensor], prefix: str, file: Path) -> Split:
    """Return ``images`` and ``labels`` under a prefix, checked."""
    images, labels = stored.get(f"{prefix}images"), stored.get(f"{prefix}labels")
    if images is None or labels is None:
        raise ValueError(f"{file} needs {prefix}images and {prefix}labels; has {sorted(stored)}")
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        shapes = f"{list(images.shape)} and {list(labels.shape)}"
        raise ValueError(f"{file}: wanted images [N, C, H, W] and labels [N], N > 0; has {shapes}")
    if labels.is_floating_point() or labels.is_complex() or int(labels.min()) < 0:
        raise ValueError(f"{file}: {prefix}labels must be integers from 0")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{file}: {prefix}images must be uint8, or floating in [0, 1]")
    if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"{file}: {prefix}images must lie in [0, 1]; divide by their largest value"
        )
    return Split(images, labels.long())
