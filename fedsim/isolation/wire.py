"""What goes over a line between two processes: a JSON object, and bytes beside it.

Towards the child the bytes are a pickle, of the range's own making.  Towards the parent they are
safetensors, which hold no code: nothing that attack code wrote is ever unpickled.
"""

import json
import socket
import struct
from typing import Any

_HEAD = struct.Struct("!QQ")
_PIECE = 1 << 20


def send(line: socket.socket, told: dict[str, Any], content: bytes = b"") -> None:
    """Send one message whole.

    Raises
    ------
    OSError
        If nobody listens any more.
    """
    text = json.dumps(told).encode()
    line.sendall(_HEAD.pack(len(text), len(content)) + text)
    line.sendall(content)


def receive(line: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Wait for one message.

    Raises
    ------
    EOFError
        If the other side is gone.
    ValueError
        If what comes is no message.
    """
    text, content = _HEAD.unpack(_read(line, _HEAD.size))
    told = json.loads(_read(line, text))
    if not isinstance(told, dict):
        raise ValueError(f"a message is an object, not {told!r}")
    return told, _read(line, content)


def _read(line: socket.socket, size: int) -> bytes:
    """Return so many bytes; memory grows with what comes, not with what was announced."""
    found = bytearray()
    while len(found) < size:
        try:
            piece = line.recv(min(_PIECE, size - len(found)))
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise EOFError("the line is closed")
        found += piece
    return bytes(found)
