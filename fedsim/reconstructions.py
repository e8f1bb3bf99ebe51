"""What an attack made of the views, saved: candidates, what it used, what it cost.

``reconstructions/<slug>.safetensors`` holds the tensors and, as metadata, the facts; the picture
of the same name is a sheet of the candidates, surest first.
"""

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedsim.attack import Cost, Reconstruction
from fedsim.errors import ScenarioError
from fedsim.files import write_atomically

_SHEET = 64


@dataclass(frozen=True)
class Facts:
    """Which attack this was and what it was given.

    Attributes
    ----------
    expression, name, paper : str
        ``paper`` as one line to print.
    used, oracles : tuple of str
        The grants and oracles that the attack really asked for.
    view_labels : tuple of str
        The views in order; ``Reconstruction.views`` counts in it.
    senders : tuple of tuple of int
        Whose updates each view holds.
    rounds : tuple of int
        The server round of each view.
    """

    expression: str
    name: str
    paper: str
    used: tuple[str, ...]
    oracles: tuple[str, ...]
    view_labels: tuple[str, ...]
    senders: tuple[tuple[int, ...], ...]
    rounds: tuple[int, ...]


def slug(expression: str) -> str:
    """Return a file name for an attack's expression; different expressions, different names."""
    name = re.sub(r"[^a-z0-9-]+", "-", expression.lower()).strip("-")
    if name == expression:
        return name
    return f"{name[:60].rstrip('-')}-{hashlib.sha256(expression.encode()).hexdigest()[:6]}"


def save(folder: Path, reconstruction: Reconstruction, facts: Facts) -> Path:
    """Save candidates and their picture sheet in ``folder``; return the path of the tensors.

    Raises
    ------
    ValueError
        If the parts of the reconstruction are not of one length, or name views that are not there.
    """
    _check(reconstruction, facts)
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps({**dataclasses.asdict(facts), **_told(reconstruction)})
    path = folder / f"{slug(facts.expression)}.safetensors"
    write_atomically(path, to_bytes(_tensors(reconstruction), metadata={"reconstruction": told}))
    if len(reconstruction.examples):
        write_atomically(path.with_suffix(".png"), sheet(reconstruction))
    return path


def pack(reconstruction: Reconstruction) -> tuple[dict[str, Any], bytes]:
    """Return a reconstruction as plain facts (cost and receipts) and safetensors."""
    return _told(reconstruction), to_bytes(_tensors(reconstruction))


def unpack(facts: Mapping[str, Any], content: bytes) -> Reconstruction:
    """Return what :func:`pack` packed.

    Raises
    ------
    Exception
        Of whatever kind, if it is not that.
    """
    cost = Cost(float(facts["seconds"]), int(facts["gradient_evaluations"]))
    receipts = tuple(str(receipt) for receipt in facts["receipts"])
    return Reconstruction(**from_bytes(content), cost=cost, receipts=receipts)


def _told(reconstruction: Reconstruction) -> dict[str, Any]:
    return {**dataclasses.asdict(reconstruction.cost), "receipts": list(reconstruction.receipts)}


def _tensors(reconstruction: Reconstruction) -> dict[str, Tensor]:
    found = {name: getattr(reconstruction, name) for name in ("examples", "views")}
    for name in ("labels", "scores", "present", "whose"):
        if getattr(reconstruction, name) is not None:
            found[name] = getattr(reconstruction, name)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def load(path: Path) -> tuple[Reconstruction, Facts]:
    """Load what :func:`save` saved.

    Raises
    ------
    ScenarioError
        If the file is not a saved reconstruction.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            told = json.loads((stored.metadata() or {})["reconstruction"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        cost = Cost(**{field.name: told.pop(field.name) for field in dataclasses.fields(Cost)})
        receipts = tuple(told.pop("receipts"))
        senders = tuple(tuple(who) for who in told.pop("senders"))
        told.update({key: tuple(value) for key, value in told.items() if isinstance(value, list)})
        facts = Facts(senders=senders, **told)
        return Reconstruction(**tensors, cost=cost, receipts=receipts), facts
    except Exception as error:
        raise ScenarioError("reconstructions", str(path), f"not readable: {error}") from error


def sheet(reconstruction: Reconstruction, limit: int = _SHEET) -> bytes:
    """Return a PNG of the first candidates, surest first where the attack says how sure it is."""
    images = reconstruction.examples
    if reconstruction.scores is not None:
        order = torch.argsort(reconstruction.scores, descending=True, stable=True)
        images = images[order]
    images = images[:limit]
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for at, image in enumerate(images):
        top, left = (at // columns) * (height + 1), (at % columns) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return png(canvas, scale=max(1, 64 // height))


def png(image: Tensor, scale: int = 1) -> bytes:
    """Return an image ``[C, H, W]`` in ``[0, 1]`` (C = 1 or 3) as PNG, each pixel ``scale`` wide.

    Values outside the range are clamped; what is not a number is black.
    """
    pixels = np.nan_to_num(image.detach().float().cpu().numpy(), nan=0.0).clip(0, 1)
    array = np.ascontiguousarray((pixels * 255).round().astype(np.uint8).transpose(1, 2, 0))
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _check(reconstruction: Reconstruction, facts: Facts) -> None:
    count = len(reconstruction.examples)
    if reconstruction.examples.ndim != 4:
        shape = list(reconstruction.examples.shape)
        raise ValueError(f"candidates must be [M, C, H, W], not {shape}")
    for name in ("views", "labels", "scores", "present", "whose"):
        tensor = getattr(reconstruction, name)
        if tensor is not None and tensor.shape != (count,):
            raise ValueError(f"{name} must be [{count}], not {list(tensor.shape)}")
        if name != "scores" and tensor is not None and tensor.is_floating_point():
            raise ValueError(f"{name} must be integers, not {tensor.dtype}")
    if (reconstruction.present is None) != (reconstruction.whose is None):
        raise ValueError("present and whose belong together")
    views = reconstruction.views
    if count and not 0 <= int(views.min()) <= int(views.max()) < len(facts.view_labels):
        raise ValueError(f"candidates name views outside the {len(facts.view_labels)} there are")
    if not len(facts.view_labels) == len(facts.senders) == len(facts.rounds):
        raise ValueError("every view needs its label, senders and round")
