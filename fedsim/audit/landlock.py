"""The kernel's own wall around attack code, where the kernel has one (Linux 5.13, Landlock).

Python's audit hooks see what Python opens; a library that reads files in C++ or Rust raises none.
Landlock refuses the calling thread, whatever language it opens files in.  It only knows what is
*allowed*, so everything is, except the sealed paths and the listing of the folders above them.
A thread that is restricted stays so: attack code gets one of its own, which ends with it.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# include/uapi/linux/landlock.h; the system calls' numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_PR_SET_NO_NEW_PRIVS = 38


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def restrict_thread(sealed: Sequence[Path], readable: Sequence[Path] = ()) -> bool:
    """Keep the calling thread from reading what lies under ``sealed``, but for ``readable``.

    Returns
    -------
    bool
        Whether the kernel does so; False on other systems and older kernels.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    handled = ctypes.c_uint64(_READ_FILE | _READ_DIR)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if ruleset < 0:
        return False
    try:
        walls = tuple(os.path.realpath(path) for path in sealed)
        for path in [*_open_paths("/", walls), *(os.path.realpath(p) for p in readable)]:
            with suppress(OSError):  # gone since, or nobody's to open
                _allow(libc, ruleset, path)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _open_paths(folder: str, walls: tuple[str, ...]) -> Iterator[str]:
    """Yield the largest hierarchies below a folder that hold no wall."""
    with os.scandir(folder) as entries:
        paths = [entry.path for entry in entries if not entry.is_symlink()]
    for path in paths:
        if path in walls:
            continue
        if any(wall.startswith(path + os.sep) for wall in walls):
            yield from _open_paths(path, walls)
        else:
            yield path


def _allow(libc: ctypes.CDLL, ruleset: int, path: str) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        access = _READ_FILE | (_READ_DIR if Path(path).is_dir() else 0)
        rule = _PathBeneath(access, handle)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(handle)
