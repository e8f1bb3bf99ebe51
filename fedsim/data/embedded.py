"""Real images that ship inside scikit-learn and scikit-image: no download, no path.

``digits``: the test part of the UCI Optical Recognition of Handwritten Digits set (Alpaydin and
Kaynak 1998).  ``lfw-faces``: 100 faces of Labeled Faces in the Wild (Huang et al. 2007) and 100
patches without a face.  ``photo-tiles``: tiles of ten color photographs.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedsim.data.dataset import DataSet, Split
from fedsim.data.holdout import hold_out
from fedsim.registry import register

# Standard deviation of a tile's values in [0, 1], within a channel, averaged over the channels:
# below it a tile is a piece of sky or margin and no picture of anything.
FLATTEST = 0.05


@register("dataset", "digits")
def digits() -> DataSet:
    """Return 1,797 handwritten digits, gray 8 x 8, values 0..16 scaled to ``[0, 1]``."""
    from sklearn.datasets import load_digits  # seconds: only where it is wanted

    images, labels = load_digits(return_X_y=True)
    scaled = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    train, test = hold_out(scaled, torch.from_numpy(labels).long())
    return DataSet(train, test, tuple("0123456789"))


@register("dataset", "lfw-faces")
def lfw_faces() -> DataSet:
    """Return 200 gray 25 x 25 patches, half of them faces, floating in ``[0, 1]``."""
    from skimage.data import lfw_subset

    images = torch.from_numpy(lfw_subset()).float().unsqueeze(1)
    train, test = hold_out(images, torch.arange(200) // 100)
    return DataSet(train, test, ("face", "no face"))


@register("dataset", "photo-tiles")
def photo_tiles(*, size: Literal[32, 64] = 32) -> DataSet:
    """Return RGB tiles of ten photographs, uint8; the label says which photograph.

    Each photograph is first reduced until its shorter side is at most ten tiles, so that a tile
    shows a thing and not a grain.  Test tiles come from the vertical strip between 55 % and 80 % of
    the width, train tiles from the left and the right of it: no pixel is in both.  Within a split
    neighbors overlap by half a tile.  Tiles flatter than ``FLATTEST`` are dropped.

    Parameters
    ----------
    size : {32, 64}
        Side of a tile in pixels.
    """
    photographs = _photographs()
    parts: list[tuple[Tensor, Tensor]] = []
    for label, load in enumerate(photographs.values()):
        for tiles in _tiles_of(_reduced(load(), shortest=10 * size), size):
            parts.append((tiles, torch.full((len(tiles),), label)))
    return DataSet(_joined(parts[0::2]), _joined(parts[1::2]), tuple(photographs))


def _photographs() -> dict[str, Callable[[], Any]]:
    """Return loaders of ``[H, W, 3]`` uint8 by class name."""
    from skimage import data

    return {
        "astronaut": data.astronaut,
        "cat": data.chelsea,
        "coffee": data.coffee,
        "rocket": data.rocket,
        "retina": data.retina,
        "galaxies": data.hubble_deep_field,
        "tissue": data.immunohistochemistry,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "temple": lambda: _sample_image("china.jpg"),
        "flower": lambda: _sample_image("flower.jpg"),
    }


def _sample_image(name: str) -> Any:
    """Return what ``sklearn.datasets.load_sample_image`` does, without its seconds of imports."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    with Image.open(Path(package.origin).parent / "datasets" / "images" / name) as image:
        return np.array(image)


def _reduced(photograph: Any, shortest: int) -> Tensor:
    """Return ``[3, H, W]`` uint8, its shorter side at most ``shortest``; never enlarged."""
    image = Image.fromarray(photograph)
    scale = min(1.0, shortest / min(image.size))
    width, height = (round(side * scale) for side in image.size)
    reduced = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(reduced)).permute(2, 0, 1)


def _tiles_of(photograph: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return train and test tiles ``[N, 3, size, size]`` from disjoint vertical strips."""
    width = photograph.shape[2]
    start, end = width * 55 // 100, width * 80 // 100
    sides = photograph[:, :, :start], photograph[:, :, end:]
    train = torch.cat([_cut(side, size) for side in sides])
    return _lively(train), _lively(_cut(photograph[:, :, start:end], size))


def _cut(region: Tensor, size: int) -> Tensor:
    windows = region.unfold(1, size, size // 2).unfold(2, size, size // 2)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)  # from [3, rows, columns, ...]


def _lively(tiles: Tensor) -> Tensor:
    contrast = (tiles.double() / 255).flatten(2).std(dim=2).mean(dim=1)  # [N]
    return tiles[contrast >= FLATTEST]


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Split:
    images, labels = zip(*parts, strict=True)
    return Split(torch.cat(images), torch.cat(labels))
