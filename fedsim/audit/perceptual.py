"""LPIPS (Zhang et al., CVPR 2018) with its real backbone, or not at all.

The ``lpips`` package ships the linear heads; the AlexNet they were trained on is a file of its own.
It is looked for in the folder ``FEDSIM_WEIGHTS`` and in torch hub's cache, and downloaded if the
network answers (``FEDSIM_OFFLINE=1`` forbids that).  Random weights never go by this name.
"""

import hashlib
import os
import urllib.request
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.files import write_atomically

WEIGHTS = "alexnet-owt-7be5be79.pth"
_URL = f"https://download.pytorch.org/models/{WEIGHTS}"
_DIGEST = "7be5be79"
_SMALLEST = 64
_CHUNK = 64


class LpipsUnavailableError(RuntimeError):
    """There are no real weights here; the message says what to put where."""


def unavailable() -> str | None:
    """Return why LPIPS cannot be computed here, or None."""
    try:
        _network()
    except LpipsUnavailableError as error:
        return str(error)
    return None


@torch.no_grad()
def lpips(candidates: Tensor, truths: Tensor) -> Tensor:
    """Return the LPIPS distance (AlexNet), ``[N]`` float64, lower is more alike.

    Images ``[N, C, H, W]`` in ``[0, 1]``; gray is repeated to three channels, sides under 64 pixels
    are enlarged to 64 (bilinear), since the network was trained on larger images.

    Raises
    ------
    LpipsUnavailableError
        If the real weights are not at hand.
    """
    network = _network()
    values = [
        network(_prepare(a), _prepare(b)).reshape(-1).double()
        for a, b in zip(torch.split(candidates, _CHUNK), torch.split(truths, _CHUNK), strict=True)
        if len(a)
    ]
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def _prepare(images: Tensor) -> Tensor:
    images = torch.nan_to_num(images.detach().float(), nan=0.0).clamp(0, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    side = min(images.shape[-2:])
    if side < _SMALLEST:
        images = nn.functional.interpolate(
            images, scale_factor=_SMALLEST / side, mode="bilinear", align_corners=False
        )
    return images * 2 - 1


@cache
def _outcome(folders: tuple[Path, ...], offline: bool) -> nn.Module | str:
    """Return the network, or why there is none; a failed download is tried once a process."""
    try:
        return _assemble(_find(folders, offline))
    except LpipsUnavailableError as error:
        return str(error)


def _network() -> nn.Module:
    named = os.environ.get("FEDSIM_WEIGHTS")
    folders = [Path(named).expanduser()] if named else []
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    outcome = _outcome(tuple(folders), os.environ.get("FEDSIM_OFFLINE") == "1")
    if isinstance(outcome, str):
        raise LpipsUnavailableError(outcome)
    return outcome


def _find(folders: tuple[Path, ...], offline: bool) -> Path:
    for folder in folders:
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
    why = "FEDSIM_OFFLINE=1 forbids downloading"
    if not offline:
        try:
            return _download(folders[-1])
        except OSError as error:
            why = f"downloading failed ({error})"
    raise LpipsUnavailableError(
        f"LPIPS needs AlexNet's weights: put {WEIGHTS} (from {_URL}) into the folder that "
        f"FEDSIM_WEIGHTS names, or into {folders[-1]}; {why}"
    )


def _download(folder: Path) -> Path:
    with urllib.request.urlopen(_URL, timeout=5) as answer:
        content = answer.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, content)
    return folder / WEIGHTS


def _assemble(weights: Path) -> nn.Module:
    """Build the ``lpips`` network around the backbone in a file that is what its name says."""
    if not hashlib.sha256(weights.read_bytes()).hexdigest().startswith(_DIGEST):
        raise LpipsUnavailableError(
            f"{weights} is damaged: its SHA-256 does not begin with {_DIGEST}"
        )
    import lpips as package

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    backbone = torch.load(weights, map_location="cpu", weights_only=True)
    # The package cuts torchvision's ``features.<n>`` into ``slice<k>.<n>``.
    own = {name: backbone[f"features.{name.split('.', 1)[1]}"] for name in _slices(network)}
    network.get_submodule("net").load_state_dict(own, strict=True)
    return network.eval()


def _slices(network: nn.Module) -> list[str]:
    return list(network.get_submodule("net").state_dict())
