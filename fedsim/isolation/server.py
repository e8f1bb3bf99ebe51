"""The process that attack processes are forked from: libraries loaded, and nothing of any run.

It is started with ``python -c`` and an environment without ``FEDSIM_*``, so neither its command
line, its memory nor its files tell anything; loading libraries takes seconds, and forking
milliseconds, so one serves all the attacks of a process.  (``multiprocessing``'s own fork server
would hand every child ``sys.argv``, and run the main script again in it.)

Over ``control`` it gets, for each attack, four open files: the child's line, a line on which to
tell how the child ended, and what are its stdout and stderr.  Where the other end of the second
line closes, because the range lost interest or its life, the child is killed.
"""

import contextlib
import importlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsim.isolation import wire

FILES = 4
FORK, SPAWN = b"f", b"s"


def way(device: str) -> bytes:
    """Return how a child that computes on a device is made: forked, or as a fresh interpreter.

    Neither CUDA nor the frameworks of macOS survive a fork.
    """
    return FORK if device == "cpu" and sys.platform.startswith("linux") else SPAWN


def code(function: str, *arguments: object) -> list[str]:
    """Return the command of a fresh interpreter that calls one function of this module."""
    call = f"from {__name__} import {function}; {function}{arguments!r}"
    return [sys.executable, "-P", "-c", call]


def main(control: int) -> None:
    """Serve until the range ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the range's, which ends its children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # and tidy up
    _load()
    Server(socket.socket(fileno=control)).serve()


def _load() -> None:
    """Load what attacks need: what a child loads by itself costs every child its time."""
    with contextlib.suppress(Exception):  # a child comes upon it again, and tells
        for name in ("fedsim.isolation.child", "torch._dynamo"):  # torch.func needs the latter
            importlib.import_module(name)
        importlib.import_module("fedsim.registry").components("attack")


@dataclass
class _Child:
    pid: int
    ending: socket.socket
    scratch: Path


class Server:
    """Forks a child for each request, and tidies up after it."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.children: dict[int, _Child] = {}
        self.awake, wake = socket.socketpair()
        self.wake = wake
        self.awake.setblocking(False)
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())
        self.selector = selectors.DefaultSelector()
        self._watch(control, self.start)
        self._watch(self.awake, self.reap)
        self.serving = True

    def serve(self) -> None:
        """Start children as they are asked for, until the range is gone."""
        try:
            while self.serving:
                for key, _ in self.selector.select():
                    key.data()
        finally:
            for child in self.children.values():
                os.kill(child.pid, signal.SIGKILL)
                shutil.rmtree(child.scratch, ignore_errors=True)

    def start(self) -> None:
        """Start the child that is asked for."""
        try:
            how, files, _, _ = socket.recv_fds(self.control, 1, FILES)
        except ConnectionResetError:
            how = b""
        if not how:
            self.serving = False
            return
        line, ending, *outputs = files
        scratch = Path(tempfile.mkdtemp(prefix="fedsim-attack-"))
        pid = (self._fork if how == FORK else self._spawn)(line, outputs, scratch)
        child = _Child(pid, socket.socket(fileno=ending), scratch)
        self.children[pid] = child
        self._watch(child.ending, lambda: self.kill(child))
        for file in (line, *outputs):
            os.close(file)

    def kill(self, child: _Child) -> None:
        """End a child that nobody waits for."""
        if child.pid in self.children:  # not reaped just now
            self.selector.unregister(child.ending)
            os.kill(child.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Tell how children ended, and remove what they wrote."""
        self.awake.recv(4096)
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid not in self.children:
                return
            child = self.children.pop(pid)
            if child.ending in self.selector.get_map():
                self.selector.unregister(child.ending)
            shutil.rmtree(child.scratch, ignore_errors=True)
            try:
                wire.send(child.ending, {"ended": os.waitstatus_to_exitcode(status)})
            except OSError:  # nobody waits
                pass
            finally:
                child.ending.close()

    def _watch(self, file: socket.socket, act: Callable[[], None]) -> None:
        self.selector.register(file, selectors.EVENT_READ, act)

    def _fork(self, line: int, outputs: list[int], scratch: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.selector.close()
            for ours in (self.control, self.awake, self.wake):
                ours.close()
            for other in self.children.values():
                other.ending.close()
            for output, file in enumerate(outputs, start=1):
                os.dup2(file, output)
            attack(line, str(scratch))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _spawn(self, line: int, outputs: list[int], scratch: Path) -> int:
        out, err = outputs
        command = code("attack", line, str(scratch))
        process = subprocess.Popen(command, pass_fds=[line], stdout=out, stderr=err)
        process.returncode = 0  # it is reaped here, not there
        return process.pid


def attack(line: int, scratch: str) -> None:
    """Be the child."""
    from fedsim.isolation import child

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child.main(socket.socket(fileno=line), Path(scratch))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
