"""What an attack keeps of its work, so that a killed attempt is not lost.

``RUN/checkpoints/<attack>-<hash>/<name>.safetensors`` holds tensors and, as metadata, what the
attempt had used and how long it had worked.  The hash is over all that the attack is, knows and
sees: another expression, another grant or another view, and nothing is found.
"""

import contextlib
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim import registry
from fedsim.files import write_atomically
from fedsim.scenario import Scenario

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
# What of a scenario no attack sees or knows.
_ASIDE = ("title", "output.", "audit.")


def named(name: str) -> str:
    """Return a name if it is one that a checkpoint can have.

    Raises
    ------
    ValueError
        If it is not: it becomes a file's name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name for a checkpoint; write up to 100 of a-z, 0-9, '.', '_' and '-', "
            "a letter or digit first"
        )
    return name


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, which share no memory with anything."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, and which grants and oracles had been used when they were kept."""

    tensors: dict[str, Tensor]
    used: frozenset[str]
    oracles: frozenset[str]


class Checkpoints:
    """What was kept, by name, in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, Checkpoint] = {}

    def get(self, name: str) -> Checkpoint | None:
        """Return what was kept under a name, or None."""
        return self._kept.get(named(name))

    def put(self, name: str, checkpoint: Checkpoint) -> None:
        """Keep it, instead of what was kept under this name."""
        self._kept[named(name)] = checkpoint

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()


class SavedCheckpoints(Checkpoints):
    """What an attack on a run's views kept, in files beside them.

    Parameters
    ----------
    run : Path
        The run's folder.
    slug : str
        What the attack is called in names of files.
    scenario : Scenario
        Of the attack, which may know more or less than the run's own.
    found : callable
        Told when something that was kept before is handed out.

    Attributes
    ----------
    earlier : float
        Seconds that the attempts worked whose work was handed out.
    """

    def __init__(
        self, run: Path, slug: str, scenario: Scenario, found: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._run, self._slug, self._scenario, self._found = run, slug, scenario, found
        self._folder: Path | None = None  # views are read through when somebody asks
        self._started = time.perf_counter()
        self.earlier = 0.0

    @property
    def folder(self) -> Path:
        """Where they lie."""
        if self._folder is None:
            name = f"{self._slug}-{_digest(self._run, self._scenario)}"
            self._folder = self._run / "checkpoints" / name
        return self._folder

    def get(self, name: str) -> Checkpoint | None:
        """Return what was kept under a name; a damaged file is as good as none, and said to be."""
        path = self.folder / f"{named(name)}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                told = json.loads((stored.metadata() or {})["checkpoint"])
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            kept = Checkpoint(tensors, frozenset(told["used"]), frozenset(told["oracles"]))
            seconds = float(told["seconds"])
        except Exception as error:
            print(f"{path} is damaged ({error}); it is left out", file=sys.stderr, flush=True)
            return None
        self.earlier = max(self.earlier, seconds)
        self._found()
        return kept

    def put(self, name: str, checkpoint: Checkpoint) -> None:
        """Keep it, whole or not at all."""
        path = self.folder / f"{named(name)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "used": sorted(checkpoint.used),
            "oracles": sorted(checkpoint.oracles),
            "seconds": self.earlier + time.perf_counter() - self._started,
        }
        write_atomically(path, save(checkpoint.tensors, metadata={"checkpoint": json.dumps(told)}))

    def clear(self) -> None:
        """Remove the files, and the folder of all attacks' where it is empty then."""
        if not (self._run / "checkpoints").is_dir():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def _digest(run: Path, scenario: Scenario) -> str:
    """Hash the attack, its scenario but for what it does not see, and the files of the views."""
    attack = str(registry.parse(scenario.attack, "attack")[0])
    keys = {k: v for k, v in scenario.flat().items() if not k.startswith(_ASIDE)}
    hashed = hashlib.sha256(json.dumps({**keys, "attack": attack}, sort_keys=True).encode())
    for path in sorted((run / "views").glob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashed.update(f"{path.name} {digest}\n".encode())
    return hashed.hexdigest()[:16]
