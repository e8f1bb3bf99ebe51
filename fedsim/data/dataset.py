"""What a data set is here: two splits of images in memory, and public facts about them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedsim import registry


@dataclass(frozen=True)
class DataSpec:
    """Public facts about a task.

    ``shape`` is ``(C, H, W)``; ``mean`` and ``std`` are per channel, of values in ``[0, 1]``.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]``, uint8 or floating in ``[0, 1]``, and labels ``[N]`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return images in ``[0, 1]`` and labels of some examples."""
        images = self.images[indices]
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return images.to(dtype) / scale, self.labels[indices]

    def subset(self, indices: Tensor) -> "Split":
        """Return some examples as a split of their own."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class DataSet:
    """Disjoint train and test splits and the names of the classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def spec(self) -> DataSpec:
        """Public facts; mean and standard deviation over the train split."""
        images = self.train.images.double()
        if self.train.images.dtype == torch.uint8:
            images = images / 255
        mean = images.mean(dim=(0, 2, 3))
        std = images.std(dim=(0, 2, 3), correction=0).clamp_min(1e-6)
        channels, height, width = self.train.images.shape[1:]
        return DataSpec(
            (channels, height, width),
            len(self.classes),
            tuple(round(m, 4) for m in mean.tolist()),
            tuple(round(s, 4) for s in std.tolist()),
        )


@registry.announced("the clients' data")
@lru_cache(maxsize=4)
def load_dataset(expression: str) -> DataSet:
    """Load a data set by expression, once a process; never for attack code.

    Raises
    ------
    ScenarioError
        If the expression is wrong, or a file it names is missing or unreadable.
    """
    dataset: DataSet = registry.build("dataset", expression, "data.dataset")
    return dataset
