"""Accuracy against leak rate, each defense at its strengths: docs/methods/defenses-utility.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py
        [--data digits cifar10 cifar10-500] [--partitions iid dirichlet]
        [--attacks ratio imprint] [--only NAME ...] [--finished]
        [--out runs/defenses] [--page docs/methods/defenses-utility.md]

Accuracy is of a federation that only trains.  Leak rates are of the attacks of
``defense_table.py``, on 64 images of the same data: ``--attacks`` are run against each strength; at
the middle strength, all are, the attack that the defense names too; what is finished of others is
drawn.  Each data set and partition gives a figure (PNG, beside the page).  Finished cells are kept
in ``--out``, and shared with the table; ``--finished`` runs nothing; ``--only`` runs rows of some
names.  What is not run and not there either stands as the page has it: it was finished elsewhere.
"""

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_images import cifar
from defense_rows import NotRunError, Row, on_page, rows
from defense_table import ATTACKS, IMAGES, TRAINING, named, trained, varied

from fedsim.report.tradeoff import Point, tradeoff_figure

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py"
ADAPTIVE = "adaptive"
# Even parts are the default: told by nothing, so that cells are those of the table.
PARTITIONS: dict[str, dict[str, str]] = {
    "iid": {},
    "dirichlet": {"data.partition": "dirichlet(alpha=0.5)"},
}
# Digits are few: smaller batches and a higher rate, or hardly anything is learned.
DIGITS = {
    "data.dataset": "digits",
    "federation.rounds": 5,
    "federation.local": "fedavg(epochs=1, batch_size=8, lr=0.1)",
}
FEW = "cifar10-500"  # for what takes minutes a round on 4,000 images
DEAR = ("none", "dcs2", "obscure", "refiner", "soteria")
ON_FEW = {"federation.local": "fedavg(epochs=1, batch_size=8, lr=0.05)"}
HEAD = """# What defenses cost in accuracy, and what they buy

Each defense at three strengths (weakest first) where it has a strength. Leak rate of each attack:
the share of the clients' 64 images, or of as many as they trained on where that is told, that it
returned at PSNR 20 dB or better; settings: [defenses.md](defenses.md). {attacks} are against each
strength; `matching`, and `adaptive`, the attack that the defense names, are against the middle one,
and where they have been run: strengths compare by column, and a defense is worth what its worst
column says. In parentheses is the federation that the leak is of, where a defense needs another
than one image a client (`imprint`: 8): three local steps, the network in train mode, 8 or 32 images
a client. "nothing": every client refused or was turned away, or the attack returned nothing.
Accuracy is of the server's model, as it stands there: clients of `digestnn`,
`pefl(private=True)`, `spn` and `fedkl` use it with a part of their own, which is not measured. 8
clients, examples dealt out {partitions} (Dirichlet's alpha is 0.5); `digits`: five rounds of one
local epoch in batches of 8 at rate 0.1; `cifar10`: 4,000 images, ten rounds of one local epoch in
batches of 32 at rate 0.05; `cifar10-500`, for defenses whose rounds of 4,000 take minutes: 500 of
them in batches of 8. "refused" under accuracy: the defense cannot be put in place, or changes
nothing there. One seed. What is missing was not run.

Figures: lines join the strengths of a defense at the highest leak rate of {attacks}; a hollow point
is the middle strength's of all attacks.

One command: `{command}`.
"""


@dataclass(frozen=True)
class Leak:
    """What one attack got: its leak rate, or None where there is none, and how that is told."""

    rate: float | None
    told: str


@dataclass(frozen=True)
class Cells:
    """Where cells are kept, which attacks are run, and which rows (all, or of some names)."""

    out: Path
    attacks: list[str]
    finished: bool
    only: list[str] | None

    def leaks(self, row: Row, data: str) -> dict[str, Leak]:
        """Return what each attack that was run got."""
        small = "digits"
        if data != "digits":
            small = cifar(self.out, range(0, 6400, 100), "sixty-four")
        middle = row in list(rows())
        scenarios = {
            title: {"title": title, "data.dataset": small, **keys, **row.keys}
            for title, keys in ATTACKS.items()
        }
        if middle and row.adversary:
            scenarios[ADAPTIVE] = named(row, small)
        found: dict[str, Leak] = {}
        for title, flat in scenarios.items():
            run = self.runs(row) and (middle or title in self.attacks)
            with suppress(NotRunError):
                found[title] = told(*varied(flat, self.out, COMMAND, finished=not run))
        return found

    def runs(self, row: Row) -> bool:
        """Say whether a row's cells may be run."""
        return not self.finished and (self.only is None or row.name in self.only)

    def accuracy(self, row: Row, data: str, partition: str) -> str:
        """Return the accuracy after training, or why there is none; "" where it was not run."""
        flat = TRAINING | row.keys | PARTITIONS[partition]
        if data == "digits":
            flat |= DIGITS
        elif data == FEW:
            flat |= ON_FEW | {"data.dataset": cifar(self.out, range(500), "five-hundred")}
        else:
            flat |= {"data.dataset": cifar(self.out, range(4000), "four-thousand")}
        try:
            report = trained(flat, self.out, COMMAND, finished=not self.runs(row))
        except NotRunError:
            return ""
        if "federation" not in report:
            return "refused"
        return f"{report['federation']['accuracy']['after']:.3f}"


def told(report: dict[str, Any], note: str) -> Leak:
    """Return a report's leak rate, and in which federation that is."""
    if "refused" in report:
        return Leak(None, "refused")
    leak = report["leak"]
    if not leak:
        return Leak(None, "nothing" + note)
    of = "" if leak["private_examples"] == IMAGES else f" of {leak['private_examples']}"
    return Leak(leak["leak_rate"], f"{leak['leak_rate']:.2f}{of}{note}")


def as_told(text: str) -> Leak:
    """Return what a cell of the page says."""
    first = text.split(" ", 1)[0]
    return Leak(float(first) if first[:1].isdigit() else None, text)


def section(cells: Cells, data: str, partitions: list[str], page: Path) -> str:
    """Return the table of one data set, and draw its figures beside the page."""
    drawn = list(there(cells, data, partitions, on_page(page)))
    attacks = [name for name in (*ATTACKS, ADAPTIVE) if any(name in leaks for _, leaks, _ in drawn)]
    after = [f"accuracy, {name}" for name in partitions]
    lines = [f"| defense | {' | '.join([*attacks, *after])} |"]
    lines.append("|" + " --- |" * (1 + len(attacks) + len(after)))
    curves: dict[str, dict[str, list[Point]]] = {name: defaultdict(list) for name in partitions}
    worst: dict[str, dict[str, Point]] = {name: {} for name in partitions}
    for row, leaks, found in drawn:
        of_attacks = [leaks[title].told if title in leaks else "" for title in attacks]
        name = f"`{row.expression}`".replace("|", "\\|")
        lines.append(f"| {' | '.join([name, *of_attacks, *found.values()])} |")
        each = highest(leaks[title] for title in cells.attacks)
        every = highest(leaks.values())
        for name, accuracy in found.items():
            if accuracy in ("", "refused"):
                continue
            if each is not None:
                curves[name][row.name].append((each, float(accuracy), ""))
            if every is not None and len(leaks) > len(cells.attacks):
                worst[name][row.name] = (every, float(accuracy), "")
    for name in (name for name in partitions if curves[name]):
        picture = page.with_name(f"{page.stem}-{data}-{name}.png")
        tradeoff_figure(curves[name], picture, f"{data}, {name}", hollow=worst[name])
        lines += ["", f"![Accuracy against leak rate, {data}, {name}]({picture.name})"]
    return f"\n## {data}\n\n" + "\n".join(lines) + "\n"


def there(
    cells: Cells, data: str, partitions: list[str], before: dict[tuple[str, str], dict[str, str]]
) -> Iterator[tuple[Row, dict[str, Leak], dict[str, str]]]:
    """Yield each row that has been run, here or on the page before, its leaks and accuracies."""
    for row in (row for row in rows(every_strength=True) if data != FEW or row.name in DEAR):
        had = before.get((data, f"`{row.expression}`"), {})
        leaks = {title: as_told(had[title]) for title in (*ATTACKS, ADAPTIVE) if had.get(title)}
        leaks |= cells.leaks(row, data)
        found = {
            name: cells.accuracy(row, data, name) or had.get(f"accuracy, {name}", "")
            for name in partitions
        }
        if set(cells.attacks) <= set(leaks) and any(found.values()):
            yield row, leaks, found


def highest(leaks: Iterable[Leak]) -> float | None:
    """Return the highest of some leak rates, None where there is none."""
    return max((leak.rate for leak in leaks if leak.rate is not None), default=None)


def main() -> None:
    """Fill every cell that is not there yet, and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=["digits", "cifar10", FEW])
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS))
    parser.add_argument("--attacks", nargs="+", default=["ratio", "imprint"], choices=ATTACKS)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/defenses"))
    parser.add_argument("--page", type=Path, default=Path("docs/methods/defenses-utility.md"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    cells = Cells(given.out.absolute(), given.attacks, given.finished, given.only)
    text = HEAD.format(
        attacks=" and ".join(f"`{name}`" for name in given.attacks),
        partitions=" and ".join(given.partitions),
        command=COMMAND,
    )
    for data in given.data:
        text += section(cells, data, given.partitions, given.page)
    given.page.write_text(text)


if __name__ == "__main__":
    main()
