"""Accuracy against leak rate, each defense at its strengths: docs/methods/defenses-utility.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py [--data digits cifar10]
        [--partitions iid dirichlet] [--attacks ratio imprint] [--only NAME ...] [--finished]
        [--out runs/defenses] [--page docs/methods/defenses-utility.md]

Accuracy is of a federation that only trains.  The leak rate is that of the strongest attack that is
known, on 64 images of the same data: ``--attacks`` are run; at the middle strength, on CIFAR-10,
all columns of ``defense_table.py`` are, the attack that the defense names too; what is finished of
others counts.  Each data set and partition gives a figure (PNG, beside the page).  Finished cells
are kept in ``--out``, and shared with the table; ``--finished`` draws the rows that have those of
``--attacks`` and runs nothing; ``--only`` runs rows of some names, and draws what is finished of
the others too.
"""

import argparse
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cifar_images import cifar
from defense_rows import NotRunError, Row, rows
from defense_table import ATTACKS, TRAINING, named, trained, varied

from fedsim.report.tradeoff import Point, tradeoff_figure

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py"
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
HEAD = """# What defenses cost in accuracy, and what they buy

Each defense at three strengths (weakest first) where it has a strength. Leak rate: the share of 64
images that the strongest of the attacks under "of" returned at PSNR 20 dB or better, and by which;
settings: [defenses.md](defenses.md). {attacks} are against each strength; `matching`, and
`adaptive`, the attack that the defense names, which is of the middle strength, are against that,
and where they have been run. In parentheses is the federation that the leak is of, where a defense
needs another than one image a client (`imprint`: 8): three local steps, the network in train mode,
8 or 32 images a client. Accuracy is of the server's model, as it stands there: clients of
`digestnn`, `pefl(private=True)`, `spn` and `fedkl` use it with a part of their own, which is not
measured. 8 clients, examples dealt out {partitions} (Dirichlet's alpha is 0.5); `digits`: five
rounds of one local epoch in batches of 8 at rate 0.1; `cifar10`: 4,000 images, ten rounds of one
local epoch in batches of 32 at rate 0.05. "refused" under accuracy: the defense cannot be put in
place, or changes nothing there. One seed. What is missing was not run.

One command: `{command}`.
"""


@dataclass(frozen=True)
class Leaks:
    """The highest leak rate, which attack's in which federation, and of which attacks."""

    rate: float
    by: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Cells:
    """Where cells are kept, which attacks are run, and which rows (all, or of some names)."""

    out: Path
    attacks: list[str]
    finished: bool
    only: list[str] | None

    def leak(self, row: Row, data: str) -> Leaks | None:
        """Return the highest leak rate that is known; None where no attack could be run."""
        small = "digits"
        if data == "cifar10":
            small = cifar(self.out, range(0, 6400, 100), "sixty-four")
        middle = row in list(rows())
        scenarios = {
            title: {"title": title, "data.dataset": small, **keys, **row.keys}
            for title, keys in ATTACKS.items()
        }
        if middle and row.adversary:
            scenarios["adaptive"] = named(row, small)
        found: dict[str, tuple[float, str]] = {}
        for title, flat in scenarios.items():
            wanted = title in self.attacks
            run = self.runs(row) and (wanted or (middle and data == "cifar10"))
            try:
                report, note = varied(flat, self.out, COMMAND, finished=not run)
            except NotRunError:
                if wanted:
                    raise
                continue
            if "refused" not in report:
                rate = report["leak"]["leak_rate"] if report["leak"] else 0.0
                found[title] = rate, title + note
        if not found:
            return None
        rate, by = max(found.values(), key=lambda one: one[0])
        return Leaks(rate, by if rate else "", tuple(found))

    def runs(self, row: Row) -> bool:
        """Say whether a row's cells may be run."""
        return not self.finished and (self.only is None or row.name in self.only)

    def accuracy(self, row: Row, data: str, partition: str) -> str:
        """Return the accuracy after training, or why there is none; "" where it was not run."""
        flat = TRAINING | row.keys | PARTITIONS[partition]
        if data == "digits":
            flat |= DIGITS
        else:
            flat |= {"data.dataset": cifar(self.out, range(4000), "four-thousand")}
        try:
            report = trained(flat, self.out, COMMAND, finished=not self.runs(row))
        except NotRunError:
            return ""
        if "federation" not in report:
            return "refused"
        return f"{report['federation']['accuracy']['after']:.3f}"


def section(cells: Cells, data: str, partitions: list[str], page: Path) -> str:
    """Return the table of one data set, and draw its figures beside the page."""
    after = " | ".join(f"accuracy, {name}" for name in partitions)
    lines = [f"| defense | leak rate | by | of | {after} |"]
    lines.append("|" + " --- |" * (4 + len(partitions)))
    curves: dict[str, dict[str, list[Point]]] = {name: defaultdict(list) for name in partitions}
    for row in rows(every_strength=True):
        try:
            leaked = cells.leak(row, data)
        except NotRunError:
            continue
        found = {name: cells.accuracy(row, data, name) for name in partitions}
        if not any(found.values()):
            continue
        told = [f"`{row.expression}`".replace("|", "\\|")]
        told += ["refused", "", ""]
        if leaked:
            told[1:] = f"{leaked.rate:.2f}", leaked.by, ", ".join(leaked.of)
        told += found.values()
        lines.append(f"| {' | '.join(told)} |")
        for name, accuracy in found.items():
            if leaked and accuracy not in ("", "refused"):
                curves[name][row.name].append((leaked.rate, float(accuracy), ""))
    for name in (name for name in partitions if curves[name]):
        picture = page.with_name(f"{page.stem}-{data}-{name}.png")
        tradeoff_figure(curves[name], picture, f"{data}, {name}")
        lines += ["", f"![Accuracy against leak rate, {data}, {name}]({picture.name})"]
    return f"\n## {data}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Fill every cell that is not there yet, and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=["digits", "cifar10"])
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
