"""While attack code runs, the truth is out of reach.

One audit hook (:pep:`578`), asleep until :func:`sealed` wakes it, refuses what attack code has no
business doing: touching a sealed path, walking memory or other threads' frames, starting processes,
opening connections, calling C through ``ctypes``.  A refused look at a sealed path fails the attack
even where the attack swallows the error.

This keeps honest people's code honest, and makes a cheat a deliberate crime against a visible wall.
It is no sandbox against hostile native code: what is sealed in the vault stays ciphertext to any
reader, but whoever must run code they do not trust keeps the auditor's private key on another
machine (:mod:`fedsim.audit.sealing`) and judges there.
"""

import _posixsubprocess
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from fedsim import seeds
from fedsim.audit import sealing
from fedsim.audit.landlock import restrict_thread
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
_FILE_EVENTS = ("os.", "glob.", "pathlib.", "shutil.", "sqlite3.")


@dataclass
class _Seal:
    """What is sealed now: resolved paths, the threads that were there before, what was tried.

    ``waiting`` is the thread that waits for the attack; interrupted, it may tidy up.
    """

    roots: tuple[str, ...]
    bystanders: frozenset[int]
    waiting: int | None = None
    attempts: list[str] = field(default_factory=list)


_active: list[_Seal] = []
_installed = threading.Lock()


def run_sealed(
    function: Callable[..., T],
    *args: Any,
    paths: Sequence[Path] = (),
    readable: Sequence[Path] = (),
) -> T:
    """Run attack code with ``paths`` and the range's own keys out of reach; return its result.

    It runs in a thread of its own, so that no chain of frames leads from it to its caller's
    variables, and so that the kernel can wall it in (:mod:`fedsim.audit.landlock`); ``readable``
    is what of the sealed paths its views are read from.

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
    caller, done = threading.get_ident(), threading.Event()

    def inside() -> None:
        try:
            restrict_thread([*paths, *_own_keys()], readable)
            with sealed(paths, waiting=caller) as tried:
                try:
                    outcome.append(function(*args))
                finally:
                    attempts.extend(tried)
        except BaseException as error:
            raised.append(error)
        done.set()

    thread = threading.Thread(target=inside, name="sealed", daemon=True)
    try:
        thread.start()
        done.wait()  # not join(): interrupted, it takes the thread for ended
    except BaseException:
        stop(thread)
        raise
    refused = bool(raised) and isinstance(raised[0], PermissionError)
    if attempts and not refused:  # it swallowed the refusal, or made another error of it
        raise PermissionError(f"attack code tried to {attempts[0]}, and hid the refusal")
    if raised:
        raise raised[0]
    return outcome[0]


def _own_keys() -> list[Path]:
    return [sealing.key_path(), seeds.home() / "secret.key"]


@contextmanager
def sealed(paths: Sequence[Path], *, waiting: int | None = None) -> Iterator[list[str]]:
    """Refuse everybody in this process the sealed paths, and attack code the ways around them.

    Yields the list of refused looks at sealed paths and memory, filled as they happen.  The
    auditor's private key and the secret stream's key are always sealed.
    """
    _install()
    roots = tuple(os.path.realpath(path) for path in [*paths, *_own_keys()])
    others = frozenset(t.ident for t in threading.enumerate() if t.ident is not None)
    seal = _Seal(roots, others - {threading.get_ident()}, waiting)
    hidden = os.environ.pop("FEDSIM_SECRET_KEY", None)
    _active.append(seal)
    try:
        yield seal.attempts
    finally:
        _active.remove(seal)
        if hidden is not None:
            os.environ["FEDSIM_SECRET_KEY"] = hidden


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
    for given in args[:2]:
        if not isinstance(given, str | bytes | os.PathLike):
            continue
        path = os.path.realpath(os.fsdecode(given))
        if any(path == root or path.startswith(root + os.sep) for root in seal.roots):
            _refuse(seal, f"touch a sealed path ({event} {path})")
        if path.startswith("/proc/") and path.endswith(("/mem", "/environ")):
            _refuse(seal, f"read a process's memory ({path})")
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
        seal.attempts.append(deed)
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
