"""What the benchmarks of defenses run: each defense and channel there is, by expression."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import registry
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.scenario import Scenario


@dataclass(frozen=True)
class Row:
    """A defense, or a channel, at one strength; ``adversary`` is who knows of it."""

    name: str
    expression: str
    channel: bool = False
    adversary: str = ""

    @property
    def keys(self) -> dict[str, str]:
        """The scenario's keys that put it in place."""
        return {"channel" if self.channel else "defenses": self.expression}


NOTHING = Row("none", "none")


def rows(*, every_strength: bool = False) -> Iterator[Row]:
    """Yield nothing at all, then each defense that is no detector, then each channel.

    A defense with strengths stands there with all of them, or with the middle one.
    """
    yield NOTHING
    for name, made in registry.components("defense").items():
        if ".detection." in made.__module__:
            continue
        strengths: Sequence[str] = getattr(made, "strengths", ()) or (name,)
        chosen = strengths if every_strength else strengths[len(strengths) // 2 :][:1]
        yield from (Row(name, s, adversary=getattr(made, "adversary", "")) for s in chosen)
    for name in registry.components("channel"):
        if name != "plain":
            yield Row(name, name, channel=True)


class NotRunError(Exception):
    """A cell is not there, and is not to be run now."""


def measured(
    flat: dict[str, Any], out: Path, command: str, *, finished: bool = False
) -> dict[str, Any]:
    """Return a run's report, kept without its run; ``refused`` says why there is none.

    Raises
    ------
    NotRunError
        If only what is ``finished`` is wanted, and this is not.
    """
    told = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]
    file = out / f"{flat['title']}-{told}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    if finished:
        raise NotRunError
    common = {"federation.threads": 1, "federation.timeout": 3000.0, "output.dir": str(out)}
    print(f"-- {flat['title']}: {flat.get('defenses') or flat.get('channel')}", flush=True)
    try:
        folder = run_inline(Scenario.from_flat({**common, **flat}), command).parent
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        report = {part: report[part] for part in ("federation", "attack", "defenses", "leak")}
        shutil.rmtree(folder)
    except ScenarioError as error:
        report = {"refused": error.remedy}
    except RunFailed as error:
        report = {"refused": f"failed: {error}".splitlines()[0]}
    file.write_text(json.dumps(report))
    return report
