"""The kernel's own wall around attack code, where the kernel has one (Linux 5.13, Landlock).

Python's audit hooks see what Python opens; a library that opens files in C++ or Rust raises none.
Landlock refuses the calling thread and whatever it starts, in every language: reading, writing,
and (Linux 6.7) TCP connections.  It only knows what is *allowed*, and a wall inside an allowed
folder is kept by allowing everything beside it.  What is restricted stays so: attack code gets a
process or a thread of its own, which ends with it.
"""

import ctypes
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# include/uapi/linux/landlock.h; the system calls' numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _TRUNCATE, _REFER = 1 << 1, 1 << 14, 1 << 13
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # make and remove, of every kind
_TCP = 0b11  # bind and connect


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class Rules:
    """What the kernel is to let a thread open, put together once, for any number of threads.

    A wall strictly inside something readable or writable is neither; where one is inside a wall,
    it is open: what is more specific holds.  Where a wall is a folder, the folders above it cannot
    be listed, nor files made in them.  What is not there yet stays closed, unless it comes to lie
    in something open.
    """

    def __init__(
        self,
        walls: Sequence[Path | str],
        readable: Sequence[Path | str] = ("/",),
        writable: Sequence[Path | str] = ("/",),
    ) -> None:
        self._ruleset: int | None = None
        if (version := _version()) < 1:
            return
        self._libc = ctypes.CDLL(None, use_errno=True)
        read, write = _READ_FILE | _READ_DIR, _WRITE_FILE | _CHANGE_FOLDER
        write |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
        handled = _Ruleset(read | write, _TCP if version >= 4 else 0)
        made = self._libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
        if made < 0:
            return
        self._ruleset = made
        weakref.finalize(self, os.close, made)
        kept = tuple(os.path.realpath(wall) for wall in walls)
        for root in _resolved(readable):
            if not any(wall.startswith(_inside(root)) and _is_folder(wall) for wall in kept):
                _allow(self._libc, made, root, _READ_DIR)
            for path in _open_paths(root, kept):
                _allow(self._libc, made, path, read)
        for root in _resolved(writable):
            for path in _open_paths(root, kept):
                _allow(self._libc, made, path, write)

    def enforce(self) -> bool:
        """Hold the calling thread, and all it starts, to them; say whether the kernel does so."""
        if self._ruleset is None:
            return False
        self._libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return bool(self._libc.syscall(_RESTRICT_SELF, self._ruleset, 0) == 0)


def restrict(
    walls: Sequence[Path | str],
    readable: Sequence[Path | str] = ("/",),
    writable: Sequence[Path | str] = ("/",),
) -> bool:
    """Leave the calling thread, and all it starts, nothing to open but what :class:`Rules` allow.

    Returns
    -------
    bool
        Whether the kernel does so; False on other systems and older kernels.
    """
    return Rules(walls, readable, writable).enforce()


def _version() -> int:
    """Return which Landlock the kernel has; 0 or less is none."""
    if not sys.platform.startswith("linux"):
        return 0
    version: int = ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _VERSION)
    return version


def _resolved(paths: Iterable[Path | str]) -> list[str]:
    return sorted({os.path.realpath(path) for path in paths})


def _inside(folder: str) -> str:
    return folder.rstrip(os.sep) + os.sep


def _is_folder(path: str) -> bool:
    """Say whether a wall is a folder, or will be: what is not there yet counts as one."""
    return not Path(path).is_file()


def _open_paths(root: str, walls: tuple[str, ...]) -> Iterator[str]:
    """Yield the largest hierarchies in ``root`` that hold no wall."""
    inside = [wall for wall in walls if wall.startswith(_inside(root))]
    if not inside:
        yield root
        return
    with suppress(OSError), os.scandir(root) as entries:
        paths = [entry.path for entry in entries if not entry.is_symlink()]
        for path in paths:
            if path not in inside:
                yield from _open_paths(path, tuple(inside))


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    """Add a rule; what is gone since, or nobody's to open, stays closed."""
    with suppress(OSError):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not Path(path).is_dir():
                access &= _READ_FILE | _WRITE_FILE | _TRUNCATE
            rule = _PathBeneath(access, handle)
            libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
        finally:
            os.close(handle)
