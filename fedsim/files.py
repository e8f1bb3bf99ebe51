"""Files that are whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a kill, never sees half of it.

    Raises
    ------
    OSError
        If the disk is full or the folder unwritable; the old content, if any, is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, without NaN (JSON has none)."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
