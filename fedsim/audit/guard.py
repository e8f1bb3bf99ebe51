"""While attack code runs, Python itself says what it may not do, and who tried.

One audit hook (:pep:`578`), asleep until :func:`sealed` wakes it, refuses what attack code has no
business doing: touching a sealed path, walking memory or other threads' frames, starting processes,
opening connections, calling C through ``ctypes``.  A refused look at a sealed path fails the attack
even where the attack swallows the error.  It is the door-bell; the wall is the kernel's
(:mod:`fedsim.audit.landlock`), and ``Attack.reconstruct`` has a process of its own besides
(:mod:`fedsim.isolation`).
"""

import _posixsubprocess
import importlib
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from fedsim import seeds
from fedsim.audit import sealing
from fedsim.audit.landlock import Rules
from fedsim.stopping import stop

T = TypeVar("T")

# What reaches objects or frames that were never handed to the attack: nobody may, anywhere.
_MEMORY = {
    "gc.get_objects": "walk all objects in memory",
    "gc.get_referrers": "walk objects in memory",
    "gc.get_referents": "walk objects in memory",
    "sys._current_frames": "read other threads' frames",
    "sys._current_exceptions": "read other threads' frames",
    "threading.settrace": "trace other threads",
    "threading.setprofile": "trace other threads",
    "fedsim.private": "read what is private to the range:",
}
# What leaves the process.  Numerical libraries do some of it for honest reasons (torch.compile runs
# a compiler, scikit-learn counts cores), so these are judged by who asks.
_OUTSIDE = {
    "subprocess.Popen": "start a process",
    "os.system": "start a process",
    "os.exec": "start a process",
    "os.fork": "start a process",
    "os.forkpty": "start a process",
    "os.posix_spawn": "start a process",
    "os.spawn": "start a process",
    "pty.spawn": "start a process",
    "socket.connect": "open a connection",
    "socket.sendto": "open a connection",
    "socket.bind": "open a connection",
    "socket.getaddrinfo": "open a connection",
}
_LIBRARIES = ("torch", "torchvision", "triton", "numpy", "scipy", "sklearn", "joblib")
# What the command line may say as well: a key, and the scenario as typed.
_TOLD = ("FEDSIM_SECRET_KEY", "FEDSIM_COMMAND")
_FILE_EVENTS = ("os.", "glob.", "pathlib.", "shutil.", "sqlite3.")


@dataclass
class _Seal:
    """What is sealed now: resolved paths, who is told, the threads that were there before.

    ``openings`` are what inside a sealed path is open all the same; ``waiting`` is the thread that
    waits for the attack; interrupted, it may tidy up.
    """

    roots: tuple[str, ...]
    openings: tuple[str, ...]
    waiting: int | None
    tell: Callable[[str], None]
    bystanders: frozenset[int] = frozenset()

    def holds(self, path: str) -> bool:
        """Say whether a resolved path is sealed: what is more specific, wall or opening, holds."""
        wall = max((len(root) for root in self.roots if _within(path, root)), default=-1)
        return wall > max((len(one) for one in self.openings if _within(path, one)), default=-1)


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


_active: list[_Seal] = []
_installed = threading.Lock()


class Cell:
    """Walls around attack code that has no process of its own, put up once, for many calls.

    Each call gets a thread of its own, so that no chain of frames leads from it to its caller's
    variables, and so that the kernel can wall it in (:mod:`fedsim.audit.landlock`).

    Parameters
    ----------
    paths : sequence of Path
        What is sealed, beside the range's own keys.
    openings : sequence of Path
        What inside them is open all the same, for reading: the views of earlier rounds.
    readable, writable : sequence of Path
        What else the kernel leaves open, where it walls.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        openings: Sequence[Path] = (),
        *,
        readable: Sequence[Path] = (Path("/"),),
        writable: Sequence[Path] = (Path("/"),),
    ) -> None:
        self._roots, self._openings = _resolved([*paths, *own_keys()]), _resolved(openings)
        self._rules = Rules(self._roots, [*readable, *openings], writable)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Run attack code in here; return its result.

        Raises
        ------
        PermissionError
            If it tried what the seal forbids.
        BaseException
            Whatever the function raises.
        """
        outcome: list[T] = []
        raised: list[BaseException] = []
        attempts: list[str] = []
        seal = _Seal(self._roots, self._openings, threading.get_ident(), attempts.append)
        done = threading.Event()

        def inside() -> None:
            try:
                self._rules.enforce()
                with _awake(seal):
                    outcome.append(function(*args))
            except BaseException as error:
                raised.append(error)
            done.set()

        _run_to_its_end(inside, done)
        refused = bool(raised) and isinstance(raised[0], PermissionError)
        if attempts and not refused:  # it swallowed the refusal, or made another error of it
            raise hidden(attempts)
        if raised:
            raise raised[0]
        return outcome[0]


def _run_to_its_end(inside: Callable[[], None], done: threading.Event) -> None:
    """Run something in a thread, and wait; interrupted, end it."""
    imported = len(sys.modules)
    thread = threading.Thread(target=inside, name="sealed", daemon=True)
    try:
        thread.start()
        done.wait()  # not join(): interrupted, it takes the thread for ended
    except BaseException:
        stop(thread)
        raise
    finally:
        if len(sys.modules) != imported:  # to who was walled in, folders of code looked empty
            importlib.invalidate_caches()


def run_sealed(
    function: Callable[..., T],
    *args: Any,
    paths: Sequence[Path] = (),
    openings: Sequence[Path] = (),
) -> T:
    """Run attack code once in a :class:`Cell`; return its result."""
    return Cell(paths, openings)(function, *args)


def hidden(attempts: Sequence[str]) -> PermissionError:
    """Return the refusal of attack code that went on after it had been refused."""
    return PermissionError(f"attack code tried to {attempts[0]}, and hid the refusal")


def own_keys() -> list[Path]:
    """Return where the auditor's private key and the secret stream's key lie."""
    return [sealing.key_path(), seeds.home() / "secret.key"]


@contextmanager
def sealed(
    paths: Sequence[Path],
    openings: Sequence[Path] = (),
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Refuse everybody in this process the sealed paths, and attack code the ways around them.

    ``openings`` are what inside a sealed path is open all the same.  ``tell`` is told of every
    refused look at sealed paths and memory, as it happens.  The auditor's private key and the
    secret stream's key are always sealed.
    """
    seal = _Seal(_resolved([*paths, *own_keys()]), _resolved(openings), None, tell)
    with _awake(seal):
        yield


@contextmanager
def _awake(seal: _Seal) -> Iterator[None]:
    """Wake the hook, and hide what the process was started with."""
    _install()
    others = frozenset(t.ident for t in threading.enumerate() if t.ident is not None)
    seal.bystanders = others - {threading.get_ident()}
    hidden = {name: value for name in _TOLD if (value := os.environ.pop(name, None)) is not None}
    typed = sys.argv, sys.orig_argv
    sys.argv, sys.orig_argv = [""], [""]
    _active.append(seal)
    try:
        yield
    finally:
        _active.remove(seal)
        sys.argv, sys.orig_argv = typed
        os.environ.update(hidden)


def _resolved(paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(os.path.realpath(path) for path in paths)


def _install() -> None:
    """Add the hook once a process; Python never removes one.

    ``multiprocessing`` starts its fresh interpreters with a function that raises no event: give it
    one, or a child would run unwatched.
    """
    if not _installed.acquire(blocking=False):
        return
    fork_exec = _posixsubprocess.fork_exec

    def announced(*args: Any) -> int:
        sys.audit("os.spawn", *args[:2])
        return fork_exec(*args)

    _posixsubprocess.fork_exec = announced
    sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event == "open" or event.startswith(_FILE_EVENTS):
        for seal in _active:
            _refuse_paths(seal, event, args)
    if event in _MEMORY:
        detail = f" {args[0]}" if event == "fedsim.private" and args else ""
        if not _from_library():
            for seal in _active:
                _refuse(seal, _MEMORY[event] + detail)
    elif (event in _OUTSIDE or event.startswith("ctypes.")) and not _from_library():
        deed = _OUTSIDE.get(event, "call C code through ctypes")
        if any(threading.get_ident() not in seal.bystanders for seal in _active):
            raise PermissionError(f"attack code tried to {deed}")


def _refuse_paths(seal: _Seal, event: str, args: tuple[Any, ...]) -> None:
    for given in args[:1] if event == "open" else args[:2]:  # the second one of open is its mode
        if not isinstance(given, str | bytes | os.PathLike):
            continue
        path = os.path.realpath(os.fsdecode(given))
        if seal.holds(path):
            if event == "os.listdir" and os.fsdecode(given) in sys.path:  # an import looks around
                raise PermissionError(f"{path} is sealed")
            _refuse(seal, f"touch a sealed path ({event} {path})")
        if path.startswith("/proc/") and path.endswith(("/mem", "/environ", "/cmdline")):
            _refuse(seal, f"read a process's memory or command line ({path})")
        if event == "os.rename" and any(root.startswith(path + os.sep) for root in seal.roots):
            _refuse(seal, f"rename a folder that holds a sealed path ({path})")
        if event == "open" and _is_handle_on_ancestor(seal, path, args):
            _refuse(seal, f"open a folder that holds a sealed path ({path})")


def _is_handle_on_ancestor(seal: _Seal, path: str, args: tuple[Any, ...]) -> bool:
    """Say whether a folder above a sealed path is opened: paths relative to it would slip by.

    Only ``os.open`` gives a handle on a folder (its event has no mode); Python's own imports try
    ``open`` on every folder of ``sys.path``, which may well be above the runs, and expect to fail.
    """
    above = path.rstrip(os.sep) + os.sep
    if args[1] is not None or not any(root.startswith(above) for root in seal.roots):
        return False
    anonymous = getattr(os, "O_TMPFILE", 0)
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    return not (anonymous and flags & anonymous == anonymous)


def _refuse(seal: _Seal, deed: str) -> None:
    if threading.get_ident() == seal.waiting:
        return
    if threading.get_ident() not in seal.bystanders:
        seal.tell(deed)
    raise PermissionError(f"attack code tried to {deed}")


def _from_library() -> bool:
    """Say whether a numerical library asks: the innermost frame outside the standard library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_trusted):
            return True
        if not file.startswith((_standard, "<frozen ")) or file.startswith(_site):
            return False
        frame = frame.f_back
    return False


_paths = sysconfig.get_paths()
_standard = _paths["stdlib"] + os.sep
_site = tuple({_paths["purelib"] + os.sep, _paths["platlib"] + os.sep})
_trusted = tuple(folder + name + os.sep for folder in _site for name in _LIBRARIES)
