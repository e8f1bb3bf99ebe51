"""A folder of pictures, one subfolder a class."""

from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fedsim.data.dataset import DataSet
from fedsim.data.holdout import hold_out
from fedsim.data.pictures import stack, to_tensor
from fedsim.registry import register


@register("dataset", "image-folder")
def image_folder(
    *,
    path: str,
    size: Annotated[int, Field(gt=0)] = 32,
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> DataSet:
    """Return the pictures of ``path/<class>/...`` as RGB squares, uint8, in order of their names.

    Parameters
    ----------
    path : str
        A folder as torchvision's ``ImageFolder`` wants it.
    size : int
        Side in pixels: each picture is resized to cover the square and its middle is cropped.
    test_fraction : float
        Share of each class that is held out, evenly spaced; the same ones every time.

    Raises
    ------
    ValueError, OSError
        If the folder is missing or holds no pictures, or a file is not readable as one.
    """
    from torchvision.datasets import ImageFolder  # slow to import: only where it is wanted

    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; path= names one, a subfolder a class"
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        wanted = f"{folder} wants one subfolder for each class with pictures in it"
        raise FileNotFoundError(f"{wanted} ({error})") from error
    images = stack([_read(file, size) for file, _ in found.samples])
    train, test = hold_out(images, torch.tensor(found.targets), test_fraction)
    return DataSet(train, test, tuple(found.classes))


def _read(file: str, size: int) -> Tensor:
    try:
        with Image.open(file) as picture:
            return to_tensor(picture, "RGB", size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable picture; repair or remove it") from error
