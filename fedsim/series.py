"""A folder of scenarios, run one after another and compared in one table."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim import registry
from fedsim.errors import NotGranted, RunFailed, ScenarioError
from fedsim.files import write_atomically
from fedsim.parts import Parts
from fedsim.report.series_page import write_series
from fedsim.report.tradeoff import Point
from fedsim.scenario import Scenario, parse_override

_HEAD = (
    "scenario",
    "accuracy",
    "after",
    "leaked",
    "PSNR mean",
    "best",
    "SSIM",
    "LPIPS",
    "labels",
    "floor PSNR",
    "seconds",
)


def run_series(
    folder: Path, run_one: Callable[[Path, list[str]], Path], overrides: list[str]
) -> str:
    """Run every scenario of a folder, in the order of their names; return the table, Markdown.

    It is written beside the last run folder, and so is a page with it and a figure of accuracy
    against leak rate.  A scenario that fails does not stop the others.  ``attack.NAME`` overrides
    pass by scenarios whose attack has no such argument.

    Raises
    ------
    ScenarioError
        Before anything runs: if there is no scenario in the folder, the attack or a key of one is
        wrong, or an override is of no attack among them.
    RunFailed
        After everything ran, if one of them failed.
    """
    given = _given(folder, overrides)
    rows: list[tuple[str, list[str]]] = []
    points: dict[str, Point] = {}
    failed: list[str] = []
    for place, (file, own) in enumerate(given.items(), start=1):
        print(f"[{place}/{len(given)}] {file}", flush=True)
        try:
            page = run_one(file, own)
        except (ScenarioError, RunFailed, NotGranted) as error:
            print(f"fedsim: {error}", file=sys.stderr, flush=True)
            failed.append(file.name)
            rows.append(("", [file.stem, f"failed: {str(error).splitlines()[0]}"]))
            continue
        report = json.loads((page.parent / "report.json").read_text())
        rows.append((str(page.relative_to(page.parents[1])), _row(file.stem, report)))
        points |= _point(file.stem, report)
        beside = page.parents[1] / f"{folder.absolute().name}.md"
        write_atomically(beside, _table(rows) + "\n")
        write_series(beside.with_suffix(".html"), _HEAD, rows, points)
    told = _table(rows)
    if failed:
        raise RunFailed(f"{', '.join(failed)} failed; the others:\n{told}")
    return told


def _given(folder: Path, overrides: list[str]) -> dict[Path, list[str]]:
    """Return the scenarios of a folder with the overrides that concern each, all checked."""
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ScenarioError("file", str(folder), "holds no scenario (*.toml)")
    given = {file: _fitting(file, overrides) for file in files}
    _check(given, overrides)
    return given


def _fitting(file: Path, overrides: list[str]) -> list[str]:
    """Return the overrides that concern this scenario: its attack has the argument they change."""
    found = registry.parse(Scenario.load(file).attack, "attack")
    known = registry.components("attack").get(found[0].name) if found else None
    arguments = registry.settable(known) if known else {}

    def fits(key: str) -> bool:
        table, _, name = key.partition(".")
        return table != "attack" or not name or name.partition(".")[0] in arguments

    return [text for text in overrides if fits(text.partition("=")[0].strip())]


def _check(given: Mapping[Path, list[str]], overrides: list[str]) -> None:
    """Refuse keys and attacks that are wrong, and overrides that every scenario passes by."""
    for text in overrides:
        if not any(text in own for own in given.values()):
            key, _, value = text.partition("=")
            remedy = "no attack in this folder has such an argument"
            raise ScenarioError(key.strip(), value.strip(), remedy)
    for file, own in given.items():
        changes = {key: value for text in own for key, value in parse_override(text).items()}
        _ = Parts(Scenario.load(file, changes)).attack


def _table(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for _, cells in rows)])


def _row(name: str, report: dict[str, Any]) -> list[str]:
    accuracy = report["federation"]["accuracy"]
    cells = [name, _number(accuracy["before"]), _number(accuracy["after"])]
    leak = report.get("leak")
    if not leak:
        return cells + [""] * (len(_HEAD) - len(cells))
    lpips, floor = leak["lpips"], leak["floor"]
    return [
        *cells,
        f"{leak['leaked']} of {leak['private_examples']}",
        f"{leak['psnr']['mean']:.1f}",
        f"{leak['psnr']['max']:.1f}",
        f"{leak['ssim']['mean']:.2f}",
        f"{lpips['mean']:.2f}" if lpips else "",
        _number(leak["label_accuracy"]),
        f"{floor['psnr']['mean']:.1f}" if floor else "",
        f"{report['attack']['seconds']:.0f}",
    ]


def _point(name: str, report: dict[str, Any]) -> dict[str, Point]:
    """Return a run's point of the figure, where it has one."""
    after, leak = report["federation"]["accuracy"]["after"], report.get("leak")
    return {} if after is None or not leak else {name: (leak["leak_rate"], after, "")}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
