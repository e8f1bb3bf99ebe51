"""Some CIFAR-10 images as a data set of their own, for the benchmarks."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def stored(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (uint8) and labels of one file of CIFAR-10."""
    folder = os.environ.get("FEDSIM_TEST_DATA")
    if folder is None:
        raise SystemExit("FEDSIM_TEST_DATA names no folder with cifar10/train_1.npz")
    with np.load(Path(folder) / "cifar10" / f"{name}.npz") as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()


def cifar(out: Path, places: Sequence[int], name: str) -> str:
    """Write some training images, and test images beside them; return the data set's expression."""
    file = (out / f"{name}.safetensors").absolute()
    if not file.exists():
        (images, labels), (others, theirs) = stored("train_1"), stored("test_1")
        chosen = torch.tensor(places)
        content = {
            "images": images[chosen].contiguous(),
            "labels": labels[chosen].contiguous(),
            "test_images": others.contiguous(),
            "test_labels": theirs.contiguous(),
        }
        save_file(content, file, metadata={"classes": json.dumps([str(c) for c in range(10)])})
    return f"tensors(path='{file}')"
