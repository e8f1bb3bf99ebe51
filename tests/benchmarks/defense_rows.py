"""What the benchmarks of defenses run: each defense and channel there is, by expression."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim import registry
from fedsim.attack import Active, Attack, Manipulation
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.scenario import Scenario
from fedsim.threat import Capability


@dataclass(frozen=True)
class Row:
    """A defense, or a channel, at one strength.

    ``adversary`` is who knows of it, ``asked`` the scenario keys that it wants otherwise.
    """

    name: str
    expression: str
    channel: bool = False
    adversary: str = ""
    asked: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, str]:
        """The scenario's keys that put it in place."""
        return {"channel" if self.channel else "defenses": self.expression}


#: As many iterations and as much total variation as most who know of a defense get.
NOTHING = Row(
    "none", "none", adversary="bayes(iterations=200, tv=0.1, defense='laplace(scale=0.005)')"
)
#: What error feedback brings late, an observer of many rounds collects.
FEEDBACK = Row(
    "prune",
    "prune(ratio=0.9, feedback=True)",
    adversary="accumulation(then=\"bayes(iterations=200, tv=0.01, defense='prune')\")",
    asked={"federation.rounds": 16},
)
#: Mixtures with pruning on top, as Huang et al. (2021) combine them.  Un-mixing wants mixtures that
#: are all but exact, which no attack reads behind pruning.
COMBINATIONS = tuple(
    Row(
        f"{mixture} | prune",
        f"{mixture}(k={k}) | prune(ratio=0.9)",
        adversary="bayes(iterations=200, tv=0.01, defense='prune')",
    )
    for mixture in ("mixup", "instahide")
    for k in (4, 6)
)
# What ends a run as one that failed, and is an outcome all the same: the machine has no part in it.
NO_CANDIDATE, TURNED_AWAY, UNCHANGED = (
    "returned no candidate",
    "its upload is over the ",
    "is switched on and changed 0/",
)


def rows(*, every_strength: bool = False) -> Iterator[Row]:
    """Yield nothing at all, each defense that is no detector, each channel, and what is combined.

    A defense with strengths stands there with all of them, or with the middle one.
    """
    yield NOTHING
    made: Any  # a defense, or a channel: both say how strong they can be, and who knows of them
    for kind in ("defense", "channel"):
        for name, made in registry.components(kind).items():
            if name == "plain" or ".detection." in made.__module__:
                continue
            strengths: Sequence[str] = made.strengths or (name,)
            chosen = strengths if every_strength else strengths[len(strengths) // 2 :][:1]
            told = kind == "channel", made.adversary, made.adversary_setting
            yield from (Row(name, strength, *told) for strength in chosen)
    yield FEEDBACK
    yield from COMBINATIONS


def against(row: Row) -> tuple[bool, dict[str, Any]]:
    """Return whether a row's adversary changes the model, and the keys that put it in place.

    The threat model is the strongest that the kind of attack needs: E of passive ones, G of active
    ones, H of those that choose who trains.
    """
    attack: Attack = registry.build("attack", row.adversary, "attack")
    letter = "G" if isinstance(attack, Active) else "E"
    if Capability.SELECTION in attack.required:
        letter = "H"
    keys = {"threat-model": letter, "attack": row.adversary, **row.asked}
    return isinstance(attack, Manipulation), keys


def settled(error: str) -> dict[str, Any] | None:
    """Return the report of a run that ended in ``error``; None where another try may do better.

    ``nothing`` says that an attack was made and got nothing.
    """
    reason = error.splitlines()[0].removeprefix("failed: ").split(" (report:")[0]
    if NO_CANDIDATE in reason:
        return {"leak": None, "nothing": reason}
    _, unusable, why = reason.partition("no round had a usable reply: ")
    if unusable and all(one.startswith(TURNED_AWAY) for one in why.split("; ")):
        return {"leak": None, "nothing": "every upload was turned away"}
    if UNCHANGED in reason:
        return {"refused": reason}
    return None


class NotRunError(Exception):
    """A cell is not there, and is not to be run now."""


def on_page(page: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Return what a page's tables say: by heading and first cell, the text of each column.

    Cells that were finished elsewhere stand on the page alone.  Bars in cells are escaped there.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    heading, columns = "", list[str]()
    for line in page.read_text().splitlines() if page.exists() else []:
        if not line.startswith("| "):
            columns = []
            heading = line.removeprefix("## ") if line.startswith("## ") else heading
            continue
        texts = [text.strip().replace("\\|", "|") for text in re.split(r"(?<!\\)\|", line)[1:-1]]
        if columns:
            found[heading, texts[0]] = dict(zip(columns, texts, strict=True))
        columns = columns or texts
    return found


def measured(
    flat: dict[str, Any], out: Path, command: str, *, finished: bool = False
) -> dict[str, Any]:
    """Return a run's report, kept without its run.

    ``refused`` says why there is none, ``nothing`` that the attack got nothing (:func:`settled`).
    What failed otherwise is told, and not kept.

    Raises
    ------
    NotRunError
        If only what is ``finished`` is wanted, and this is not.
    """
    told = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]
    file = out / f"{flat['title']}-{told}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        refused = str(kept.get("refused", ""))
        if not refused.startswith("failed: "):
            return kept
        if (known := settled(refused)) is not None:
            return known
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
        known = settled(str(error))
        if known is None:
            return {"refused": f"failed: {error}".splitlines()[0].split(" (report:")[0]}
        report = known
    file.write_text(json.dumps(report))
    return report
