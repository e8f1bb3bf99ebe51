"""Where data lie on this machine: what attack code may not open, whichever set the clients hold."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fedsim import registry

_SHIPPED = (("sklearn", "datasets/data"), ("sklearn", "datasets/images"), ("skimage", "data"))
_CODE = (".py", ".pyi", ".pyc")


def places(expression: str) -> list[Path]:
    """Return the files and folders that a data set may be read from.

    They are whatever its arguments name (``root=``, ``path=``), the caches of the libraries that
    fetch data, and the pictures that ship inside packages: a set of the same kind tells too much
    as well.
    """
    return [*_named(expression), *_caches(), *shipped()]


def _named(expression: str) -> Iterator[Path]:
    for one in registry.parse(expression, "data.dataset"):
        for value in one.arguments.values():
            path = Path(value).expanduser().absolute() if isinstance(value, str) and value else None
            if path is not None and os.path.exists(path):  # noqa: PTH110 - never raises
                yield path


def _caches() -> list[Path]:
    home = Path.home()
    hub = Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface"))
    return [hub, home / ".cache" / "scikit-image", home / "scikit_learn_data"]


def shipped() -> list[Path]:
    """Return the files of data inside scikit-learn and scikit-image; their code stays open."""
    found = []
    for package, folder in _SHIPPED:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            inside = Path(spec.origin).parent / folder
            found += [path for path in inside.iterdir() if path.suffix not in (*_CODE, "")]
    return sorted(found)
