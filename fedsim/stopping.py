"""Ending what is in the middle of something: a thread, and by Ctrl-C a long search.

A daemon thread inside PyTorch while Python shuts down takes the whole process with it (``abort``).
So whoever leaves a thread behind, interrupted or out of patience, ends it first.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

_PATIENCE = 5.0  # seconds; a step of Python is rarely longer, one matrix product


def stop(thread: threading.Thread, seconds: float = _PATIENCE) -> bool:
    """Raise ``SystemExit`` in a thread at its next step of Python; say whether it has ended.

    A thread that waits for the operating system takes it when that returns.
    """
    deadline = time.monotonic() + seconds
    if thread.ident is not None and thread.is_alive():
        raised = ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), raised)
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)  # not join(): interrupted, it takes the thread for ended
    return not thread.is_alive()


@contextlib.contextmanager
def first_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C say so and call ``act``; the second is a ``KeyboardInterrupt``.

    Only in the main thread, which alone gets signals, and only where Ctrl-C does what it does in
    Python: whoever handles it otherwise (Flower's processes) or not at all goes on to.
    """
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, usual)
        _say("finishing with the best so far; Ctrl-C again to end at once")
        act()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _say(text: str) -> None:
    """Write a line to stderr past Python's buffer, in which the signal may have come."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""  # a terminal's moving line
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{over}{text}\n".encode())
