"""Starting the process that attacks are forked from; this module is light, so that it can be early.

Libraries take the server as long to load as they take the range, at the same time.
"""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from fedsim.isolation import server


class ForkServer:
    """The one server of this process, started when first wanted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.control: socket.socket | None = None
        self.owner = 0

    def start(self) -> None:
        """Start it, where there is none yet; it loads its libraries meanwhile."""
        with self.lock:
            self._running()

    def request(self, how: bytes, files: list[int]) -> None:
        """Ask for a child with these open files; a server that died is replaced."""
        with self.lock:
            try:
                socket.send_fds(self._running(), [how], files)
            except OSError:
                self.control = None
                socket.send_fds(self._running(), [how], files)

    def _running(self) -> socket.socket:
        if self.control is None or self.owner != os.getpid():  # a fork's server is its parent's
            ours, theirs = socket.socketpair()
            with theirs:
                subprocess.Popen(
                    server.code("main", theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self.control, self.owner = ours, os.getpid()
        return self.control


def _environment() -> dict[str, str]:
    """Return this process's environment without the range's variables.

    OpenMP's threads spin while they wait, which on a busy machine costs a hundred times what they
    compute; a process that has more of them than cores, as this one, spins less by itself.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    kept = {name: v for name, v in os.environ.items() if not name.startswith("FEDSIM_")}
    return {"GOMP_SPINCOUNT": "1000", **kept, "PYTHONPATH": path}


SERVER = ForkServer()
