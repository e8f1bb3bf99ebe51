"""What no attack may open, wherever it lies."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedsim import seeds
from fedsim.audit.guard import Cell, own_keys
from fedsim.data.places import places
from fedsim.errors import RunFailed
from fedsim.isolation.openings import CODE, openings
from fedsim.parts import Parts
from fedsim.run_folder import RunFolder


def walls(parts: Parts, folder: RunFolder) -> list[Path]:
    """Return the run's folder and those beside it, ``$FEDSIM_HOME``, the auditor's keys, the
    places of data, what clients share on disk, and the scenario as it was typed.
    """
    run = [folder.path, folder.path.parent, seeds.home(), *own_keys()]
    return [*run, *places(parts.scenario.data.dataset), *parts.shared(), *_typed(folder)]


def cell(parts: Parts, folder: RunFolder) -> Callable[..., Any]:
    """Return ``seal(function, *args)``, for attack code that works while clients train.

    It runs in the range's own process, reads what an attack's process reads and the views of
    earlier rounds, and writes no file.
    """
    views = folder.path / "views"
    views.mkdir(exist_ok=True)  # the kernel opens what is there
    opened, devices = [*openings(), views], [Path("/dev")]
    walled = Cell(walls(parts, folder), opened, readable=[], writable=devices)

    def seal(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return walled(function, *args)
        except OSError as error:
            if error.errno is None:  # the guard's own
                raise
            remedy = "between rounds it reads code and earlier views, and writes nothing"
            raise RunFailed(f"{parts.scenario.attack} failed with {error}: {remedy}") from error

    return seal


def _typed(folder: RunFolder) -> Iterator[Path]:
    """Yield the files that this command names, and the one that made the run; others beside them.

    In a folder that holds code as well, that is just what is written like a scenario.
    """
    for word in [*sys.argv[1:], *shlex.split(folder.environment["command"])[1:]]:
        path = Path(word).absolute()
        # Path.is_file would raise at words that are no name: Flower's servers are given long ones.
        if os.path.isfile(path) and path.suffix not in CODE:  # noqa: PTH113
            yield path
            with_code = any(path.parent.glob("*.py"))
            yield from path.parent.glob("*.toml") if with_code else [path.parent]
