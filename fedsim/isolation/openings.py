"""What an attack's process may read: code and the machine, nothing of a run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CODE = (".py", ".so", ".zip", ".egg", ".pth", ".pyz")
_METADATA = (".dist-info", ".egg-info", ".libs")
_INSTALLED = ("site-packages", "dist-packages")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/sys", "/dev", "/nix")


def openings() -> list[Path]:
    """Return what this process needs for reading: Python, its libraries, code, the machine."""
    program = str(Path(sys.executable).resolve().parent)
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, program}
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    found = {Path(path) for path in (*prefixes, *_SYSTEM, *libraries) if path}
    code = {path for entry in sys.path if entry for path in _code_in(Path(entry))} | {*_imported()}
    found |= {path for path in code if not any(path.is_relative_to(one) for one in prefixes)}
    return sorted({*filter(Path.exists, found), *_processes()})


def _code_in(folder: Path) -> Iterator[Path]:
    """Yield a folder of ``sys.path`` where packages are installed; else only the code in it.

    A checkout holds runs, scenarios and data as well, which are nobody's to import.
    """
    if folder.name in _INSTALLED or folder.is_file():
        yield folder
        return
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in (CODE if path.is_file() else _METADATA) or _is_package(path):
            yield path


def _is_package(path: Path) -> bool:
    named = path.is_dir() and not path.name.startswith(".")
    return named and (any(path.glob("*.py")) or any(path.glob("*/__init__.py")))


def _imported() -> Iterator[Path]:
    """Yield where imported packages lie, for those that came from outside ``sys.path``."""
    for name, module in list(sys.modules.items()):
        if "." not in name:
            file = getattr(module, "__file__", None)
            yield from map(Path, getattr(module, "__path__", [file] if file else []))


def _processes() -> Iterator[Path]:
    """Yield what ``/proc`` says of the machine and of this process, not of any other."""
    proc = Path("/proc")
    if proc.is_dir():
        yield Path("/proc/self").resolve()
        yield from (path for path in proc.iterdir() if not path.name.isdigit())
