"""Files that are whole or absent, and read as what they should be or not at all."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedsim.errors import RunFailed

T = TypeVar("T")


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


def unwritable(folder: Path) -> str | None:
    """Say why a folder cannot be written to, or made; leave nothing behind."""
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    probe = there / f".fedsim-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, without NaN (JSON has none)."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: type[T]) -> T:
    """Read JSON that may come from elsewhere, and check that it has the shape of ``kind``.

    Raises
    ------
    RunFailed
        If the file is missing, is no JSON, or says something else.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError as error:
        raise RunFailed(f"{path} is missing") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise RunFailed(f"{path} is damaged: {what}") from error
