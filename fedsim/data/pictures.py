"""Pictures of any size to tensors of one size."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_tensor(picture: Image.Image, mode: str, size: int | None) -> Tensor:
    """Return ``[C, H, W]`` uint8.

    Parameters
    ----------
    picture : Image
        Any mode; the EXIF orientation is applied.
    mode : str
        ``"RGB"`` or ``"L"`` (gray).
    size : int or None
        Resize to cover ``size`` x ``size`` and crop the middle; ``None`` leaves it as it is.
    """
    upright = ImageOps.exif_transpose(picture).convert(mode)
    if size is not None:
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(upright))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def stack(images: Sequence[Tensor]) -> Tensor:
    """Return ``[N, C, H, W]``.

    Raises
    ------
    ValueError
        If sizes differ.
    """
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        found = " and ".join(f"{h}x{w}" for _, h, w in sorted(sizes)[:2])
        raise ValueError(f"pictures of different sizes ({found}); set size=32, for instance")
    return torch.stack(list(images))
