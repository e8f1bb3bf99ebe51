"""The attack's own process: it walls itself in, lets the attack work, and hands back what it made.

Everything but the attack itself is at the other end of the line, and is asked for.
"""

import os
import pickle
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save
from torch import Tensor

from fedsim import reconstructions
from fedsim.attack import Attack, Reconstruction
from fedsim.audit.guard import sealed
from fedsim.audit.landlock import restrict
from fedsim.checkpoints import named, plain
from fedsim.data import DataSpec, Split
from fedsim.errors import NotGranted
from fedsim.isolation import wire
from fedsim.isolation.openings import openings
from fedsim.threat import Basics, Capability, Knowledge, Statistics, TrainingDetails
from fedsim.view import ServerView

_EVERY = 0.05  # seconds between two words on progress; whoever shows them passes most over
# Where libraries keep what they compile and download, if not below HOME.
_CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


@dataclass(frozen=True)
class Task:
    """What a child is told before anything else, beside the attack.

    ``walls`` are paths that it must not open; ``seed`` is the attack's own; ``views`` how many
    there are; ``threads`` how many the range's own threads compute with.
    """

    walls: tuple[str, ...]
    threads: int
    views: int
    threat_model: str
    spec: DataSpec
    seed: int
    device: torch.device
    batchnorm: str
    clients: int
    known: tuple[Tensor, ...]


class Line:
    """The child's end: one question at a time, whichever thread asks."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._lock, self._told = line, threading.RLock(), 0.0
        self._stopping = False

    def task(self) -> tuple[Task, Attack]:
        """Wait for what there is to do; the attack's module is imported on the way."""
        told, content = wire.receive(self._line)
        sys.path[:] = told["sys_path"]
        task, attack = pickle.loads(content)
        return task, attack

    def ask(self, question: str, *about: Any) -> Any:
        """Ask the range.

        Raises
        ------
        NotGranted
            As ``Knowledge`` does; what else goes wrong there is raised here too.
        """
        with self._lock:
            wire.send(self._line, {"say": "ask", "question": question, "about": about})
            told, content = wire.receive(self._line)
            if told.get("stop"):  # the one thing that comes unasked, and once
                self._stopping = True
                told, content = wire.receive(self._line)
        answer = pickle.loads(content)  # the range's own making
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def tell(self, say: str, content: bytes = b"", **facts: Any) -> None:
        """Tell the range something that it does not answer."""
        with self._lock:
            wire.send(self._line, {"say": say, **facts}, content)

    def stopping(self) -> bool:
        """Say whether the range asked for the best so far; a look costs microseconds."""
        with self._lock:
            if not self._stopping and self._something_came():
                self._stopping = bool(wire.receive(self._line)[0].get("stop"))
        return self._stopping

    def _something_came(self) -> bool:
        try:
            return bool(self._line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:  # BlockingIOError where there is nothing
            return False

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the attack is, unless that was just told."""
        now = time.monotonic()
        if done >= total or now - self._told >= _EVERY:
            self._told = now
            self.tell("progress", done=int(done), total=int(total), text=str(text))


class Views(Sequence[ServerView]):
    """The views, each asked for when it is read, without the number of examples."""

    def __init__(self, ask: Callable[..., Any], count: int) -> None:
        self._ask, self._count = ask, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ServerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServerView]: ...
    def __getitem__(self, index: int | slice) -> ServerView | list[ServerView]:
        if isinstance(index, slice):
            return [self._ask("view", at) for at in range(self._count)[index]]
        view: ServerView = self._ask("view", range(self._count)[index])
        return view


class AskedKnowledge(Knowledge):
    """Knowledge whose every grant is at the other end of the line, and recorded there."""

    def __init__(self, line: Line, task: Task) -> None:
        super().__init__(
            task.threat_model,
            data=task.spec,
            training=None,
            seed=task.seed,
            device=task.device,
            batchnorm=task.batchnorm,
            clients=task.clients,
            known=task.known,
            progress=line.progress,
        )
        self._ask, self._line = line.ask, line
        self._given: Split | None = None

    @property
    def used(self) -> frozenset[Capability]:
        """What was asked for and granted."""
        return frozenset(self._ask("used"))

    @property
    def oracles_used(self) -> frozenset[str]:
        """Which oracle grants were used."""
        return frozenset(self._ask("oracles_used"))

    def require(self, capability: Capability) -> None:
        """Have the use of a capability recorded."""
        self._ask("require", capability.value)

    @property
    def basics(self) -> Basics:
        """Input shape, classes, public mean and standard deviation."""
        basics: Basics = self._ask("basics")
        return basics

    def num_examples(self, view: ServerView) -> int:
        """Return how many examples this update was computed on."""
        if view.label in self._num_examples:  # of views that the attack itself made
            return self._num_examples[view.label] or 0
        return int(self._ask("num_examples", view.round, view.senders))

    @property
    def training(self) -> TrainingDetails:
        """How honest clients train."""
        training: TrainingDetails = self._ask("training")
        return training

    @property
    def surrogate(self) -> Split:
        """Data like the clients' and disjoint from theirs; they come over once."""
        if self._given is None:
            self._given = self._ask("surrogate")
        return self._given

    def statistics(self, client: int) -> Statistics:
        """Return one client's class distribution."""
        statistics: Statistics = self._ask("statistics", client)
        return statistics

    def oracle(self, name: str, view: ServerView) -> Any:
        """Return what no threat model grants; only where the scenario names the oracle."""
        return self._ask("oracle", name, view.round, view.senders)

    def kept(self, name: str) -> dict[str, Tensor]:
        """Return what an attempt before kept under a name, or nothing."""
        found: dict[str, Tensor] = self._ask("kept", named(name))
        return found

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name until the attack is done: the range writes them down."""
        self._line.tell("keep", save(plain(tensors)), name=named(name))

    def forget(self) -> None:
        """Drop nothing: that is the range's, when it has what the attack made."""

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for the best so far."""
        return self._line.stopping()


def main(connection: socket.socket, scratch: Path) -> None:
    """Do one task; whatever goes wrong is told."""
    line = Line(connection)
    try:
        task, attack = line.task()
        opened = _wall_in(task, scratch)
        with sealed([Path(wall) for wall in task.walls], opened, tell=lambda d: _refused(line, d)):
            result: object = attack.reconstruct(
                Views(line.ask, task.views), AskedKnowledge(line, task)
            )
        if not isinstance(result, Reconstruction):
            line.tell("nothing", returned=type(result).__name__)
            return
        facts, content = reconstructions.pack(result)
        line.tell("done", content, facts=facts)
    except BaseException as error:
        _tell_error(line, error)


def _wall_in(task: Task, scratch: Path) -> list[Path]:
    """Leave this process nothing to look at; return what it may read."""
    sys.argv = [""]
    for name in [name for name in os.environ if name.startswith("FEDSIM_")]:
        del os.environ[name]
    os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    for name in _CACHES:
        os.environ.pop(name, None)
    os.chdir(scratch)
    torch.set_num_threads(task.threads)
    opened = [*openings(), scratch]
    own = [scratch, Path("/dev"), *(path for path in opened if path.parent == Path("/proc"))]
    restrict(task.walls, opened, [path for path in own if path.exists()])
    return opened


def _refused(line: Line, deed: str) -> None:
    line.tell("refused", deed=deed)


def _tell_error(line: Line, error: BaseException) -> None:
    kind = NotGranted if isinstance(error, NotGranted) else type(error)
    guard = isinstance(error, PermissionError) and error.errno is None and kind is not NotGranted
    line.tell(
        "error",
        kind="refusal" if guard else kind.__name__,
        value=isinstance(error, ValueError),
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )
