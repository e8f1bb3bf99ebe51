"""Ending a thread that is in the middle of something.

A daemon thread inside PyTorch while Python shuts down takes the whole process with it (``abort``).
So whoever leaves a thread behind, interrupted or out of patience, ends it first.
"""

import ctypes
import threading
import time

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
