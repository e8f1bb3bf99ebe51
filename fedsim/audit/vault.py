"""The vault: what clients really trained on, deposited for the auditor and never sent.

``client-<k>/round-<r>.sealed`` is one deposit: safetensors, sealed to the auditor's public key
(:mod:`fedsim.audit.sealing`), in folders of mode 0700 and files of mode 0600.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsim.audit import sealing
from fedsim.errors import RunFailed

_UPLOAD = "upload/"


@dataclass(frozen=True)
class VaultRecord:
    """What one client did in one round.

    Attributes
    ----------
    client, round : int
    examples : Tensor
        ``[N, C, H, W]`` in ``[0, 1]``: the images behind the update, before any defense.  Pixels
        of 8 bits may be deposited as they are (uint8, a quarter of the size); they are read back in
        ``[0, 1]`` all the same, in float64.
    labels : Tensor
        ``[N]`` int64.
    indices : Tensor
        ``[N]`` int64, positions in the client's own data set: what makes an image the same image
        in two rounds.
    receipts : sequence of dict
        One for each defense: ``name``, ``parameters``, ``changed``, ``cosine``, ``norm_ratio``,
        ``seconds``, and whatever figures the defense left.
    upload : dict of str to Tensor or None
        What was sent, as the client sent it, where it is kept.
    refused : str or None
        Why the client refused the model or to send its update, where it did; it then sent nothing.
    checks : mapping of str to float
        What the client measured on the model it received, and on its update.
    remarks : sequence of str
        What checks that refused nothing had to say: what they could not decide.
    cut_off : float
        Share of the upload's values that the channel cuts off, being too large for it.
    """

    client: int
    round: int
    examples: Tensor
    labels: Tensor
    indices: Tensor
    receipts: Sequence[Mapping[str, Any]] = ()
    upload: dict[str, Tensor] | None = None
    refused: str | None = None
    checks: Mapping[str, float] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    cut_off: float = 0.0


def deposit(root: Path, record: VaultRecord) -> Path:
    """Seal a record and put it in the vault, whole or not at all; the last deposit stands.

    Raises
    ------
    ValueError
        If examples, labels and indices are not of one length.
    OSError
        If the vault cannot be written.
    """
    if not len(record.examples) == len(record.labels) == len(record.indices):
        raise ValueError("a deposit needs one label and one index for every example")
    place = _place(record.client, record.round)
    path = root / f"{place}.sealed"
    for folder in (root, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(path, sealing.seal(_pack(record), place, sealing.public_key()))
    return path


class Vault:
    """The deposits of a run, each unsealed when asked for, in order of client and round.

    Raises
    ------
    RunFailed
        When a deposit was changed, or sealed to another auditor.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        found = [_numbers(path) for path in root.glob("client-*/round-*.sealed")]
        self.keys = sorted(key for key in found if key is not None)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[VaultRecord]:
        return (self._open(client, server_round) for client, server_round in self.keys)

    def record(self, client: int, server_round: int) -> VaultRecord | None:
        """Return what a client deposited in a round, or None."""
        if (client, server_round) not in self.keys:
            return None
        return self._open(client, server_round)

    def _open(self, client: int, server_round: int) -> VaultRecord:
        place = _place(client, server_round)
        sealed = (self.root / f"{place}.sealed").read_bytes()
        return _unpack(sealing.unseal(sealed, place, sealing.private_key()), place)


def collect(sources: Sequence[Path], into: Path) -> int:
    """Bring other machines' deposits into a run's vault; return how many were new.

    A source is a vault, or a run folder that has one.  A deposit that is there already is left
    alone if it says the same.

    Raises
    ------
    RunFailed
        If a source has no deposits, or one of them contradicts the vault.
    """
    new = 0
    for source in sources:
        root = source / "vault" if (source / "vault").is_dir() else source
        keys = Vault(root).keys
        if not keys:
            raise RunFailed(f"{source} is no vault: it has no client-<k>/round-<r>.sealed")
        new += sum(_collect_one(_place(*key), root, into) for key in keys)
    return new


def _collect_one(place: str, root: Path, into: Path) -> bool:
    sealed, path = (root / f"{place}.sealed").read_bytes(), into / f"{place}.sealed"
    key = sealing.private_key()
    content = sealing.unseal(sealed, place, key)
    if path.exists():
        if sealing.unseal(path.read_bytes(), place, key) != content:
            raise RunFailed(f"{root} and {into} disagree about {place}; nothing was overwritten")
        return False
    for folder in (into, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(path, sealed)
    return True


def move(left: Path, into: Path) -> None:
    """Move what clients left in a vault of this machine into a run's; nothing else moves.

    A link is not followed: what it points to is somebody else's.
    """
    if not left.is_dir() or left.is_symlink():
        return
    for place in (_place(*key) for key in Vault(left).keys):
        path = into / f"{place}.sealed"
        for folder in (into, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, (left / f"{place}.sealed").read_bytes())
    shutil.rmtree(left)


def _place(client: int, server_round: int) -> str:
    return f"client-{client}/round-{server_round}"


def _numbers(path: Path) -> tuple[int, int] | None:
    try:
        return int(path.parent.name.split("-")[1]), int(path.stem.split("-")[1])
    except ValueError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Write atomically; unlike other files of a run, never readable by others, even half done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _pack(record: VaultRecord) -> bytes:
    tensors = {
        "examples": record.examples,
        "labels": record.labels.to(torch.int64),
        "indices": record.indices.to(torch.int64),
        **{_UPLOAD + name: tensor for name, tensor in (record.upload or {}).items()},
    }
    facts = {
        "client": record.client,
        "round": record.round,
        "receipts": [dict(receipt) for receipt in record.receipts],
        "has_upload": record.upload is not None,
        "refused": record.refused,
        "checks": dict(record.checks),
        "remarks": list(record.remarks),
        "cut_off": record.cut_off,
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={"record": json.dumps(facts, sort_keys=True)})


def _unpack(content: bytes, place: str) -> VaultRecord:
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["record"])
        tensors = load(content)
        upload = {n.removeprefix(_UPLOAD): t for n, t in tensors.items() if n.startswith(_UPLOAD)}
        examples = tensors["examples"]
        if examples.dtype == torch.uint8:
            examples = examples.double() / 255  # what a float64 run trained on, to the last bit
        return VaultRecord(
            examples=examples,
            labels=tensors["labels"],
            indices=tensors["indices"],
            upload=upload if facts.pop("has_upload") else None,
            **facts,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFailed(f"vault file {place} is not a deposit: {error}") from error
