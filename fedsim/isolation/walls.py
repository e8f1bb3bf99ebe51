"""What no attack may open, wherever it lies."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from fedsim import seeds
from fedsim.audit.guard import own_keys
from fedsim.data.places import places
from fedsim.isolation.openings import CODE
from fedsim.parts import Parts
from fedsim.run_folder import RunFolder


def walls(parts: Parts, folder: RunFolder) -> list[Path]:
    """Return the run's folder and those beside it, ``$FEDSIM_HOME``, the auditor's keys, the
    places of data, and the scenario as it was typed.
    """
    run = [folder.path, folder.path.parent, seeds.home(), *own_keys()]
    return [*run, *places(parts.scenario.data.dataset), *_typed(folder)]


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
