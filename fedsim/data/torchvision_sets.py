"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from torchvision's files on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.data.dataset import DataSet, Split
from fedsim.registry import register


@register("dataset", "mnist")
def mnist(*, root: str, download: bool = False) -> DataSet:
    """Return MNIST, gray 28 x 28: 60,000 and 10,000 digits (LeCun et al. 1998).

    Parameters
    ----------
    root : str
        The folder that holds ``MNIST/raw/``.
    download : bool
        Whether to fetch missing files.

    Raises
    ------
    OSError
        If files are missing or broken, or cannot be fetched.
    """
    return _load("MNIST", "MNIST/raw", root, download)


@register("dataset", "fashion-mnist")
def fashion_mnist(*, root: str, download: bool = False) -> DataSet:
    """Return Fashion-MNIST, gray 28 x 28: 60,000 and 10,000 garments (Xiao et al. 2017).

    ``root`` holds ``FashionMNIST/raw/``; the rest is as for ``mnist``.
    """
    return _load("FashionMNIST", "FashionMNIST/raw", root, download)


@register("dataset", "cifar10")
def cifar10(*, root: str, download: bool = False) -> DataSet:
    """Return CIFAR-10, RGB 32 x 32: 50,000 and 10,000 photographs (Krizhevsky 2009).

    ``root`` holds ``cifar-10-batches-py/``; the rest is as for ``mnist``.  The files are pickles,
    which torchvision checks against the published MD5 sums before it opens them.
    """
    return _load("CIFAR10", "cifar-10-batches-py", root, download)


@register("dataset", "cifar100")
def cifar100(*, root: str, download: bool = False) -> DataSet:
    """Return CIFAR-100, RGB 32 x 32: 50,000 and 10,000 photographs (Krizhevsky 2009).

    ``root`` holds ``cifar-100-python/``; the rest is as for ``cifar10``.
    """
    return _load("CIFAR100", "cifar-100-python", root, download)


def _load(class_name: str, files: str, root: str, download: bool) -> DataSet:
    from torchvision import datasets  # slow to import: only where it is wanted

    folder = Path(root).expanduser().absolute()
    try:
        parts = [
            getattr(datasets, class_name)(folder, train=train, download=download)
            for train in (True, False)
        ]
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        remedy = "see whether the network allows it" if download else "or set download=True"
        raise OSError(
            f"{class_name} is not complete in {folder / files} ({error}); "
            f"put torchvision's files there, {remedy}"
        ) from error
    train, test = (Split(_channels_first(part.data), _labels(part.targets)) for part in parts)
    return DataSet(train, test, tuple(parts[0].classes))


def _channels_first(images: Any) -> Tensor:
    """Turn ``[N, H, W]`` or ``[N, H, W, C]`` into ``[N, C, H, W]``, uint8."""
    pixels = torch.as_tensor(images)
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    return pixels.permute(0, 3, 1, 2).contiguous()


def _labels(targets: Any) -> Tensor:
    return torch.as_tensor(targets, dtype=torch.int64)
