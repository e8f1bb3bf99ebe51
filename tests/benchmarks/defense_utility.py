"""Accuracy against leak rate, each defense at its strengths: docs/methods/defenses-utility.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py [--data digits cifar10]
        [--partitions iid dirichlet] [--attacks ratio imprint] [--only NAME ...] [--finished]
        [--out runs/defenses] [--page docs/methods/defenses-utility.md]

Accuracy is of a federation that only trains.  The leak rate is that of the
strongest of some of the fixed attacks of ``defense_table.py``, on 64 images of the same data.  Each
data set and partition gives a figure (PNG, beside the page).  Finished cells are kept in ``--out``,
and shared with the table; ``--finished`` draws the rows that have all theirs, and runs nothing.
"""

import argparse
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cifar_images import cifar
from defense_rows import NotRunError, Row, rows
from defense_table import ATTACKS, TRAINING, trained, varied

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

Each defense at three strengths (weakest first) where it has a strength. Leak rate: the share of
64 images that the strongest of these attacks returned at PSNR 20 dB or better: {attacks} (settings:
[defenses.md](defenses.md)). Accuracy: 8 clients, examples dealt out {partitions} (Dirichlet's alpha
is 0.5); `digits`: five rounds of one local epoch in batches of 8 at rate 0.1; `cifar10`: 4,000
images, ten rounds of one local epoch in batches of 32 at rate 0.05. "refused" under accuracy: the
defense cannot be put in place, or changes nothing there. What is missing was not run.

One command: `{command}`.
"""


@dataclass(frozen=True)
class Cells:
    """Where cells are kept, which attacks count, and whether any may be run."""

    out: Path
    attacks: list[str]
    finished: bool

    def leak(self, row: Row, data: str) -> tuple[float, str] | None:
        """Return the highest leak rate, and whose it is; None where no attack could be run."""
        small = "digits"
        if data == "cifar10":
            small = cifar(self.out, range(0, 6400, 100), "sixty-four")
        found: list[tuple[float, str]] = []
        for title in self.attacks:
            flat = {"title": title, "data.dataset": small, **ATTACKS[title], **row.keys}
            report, _ = varied(flat, self.out, COMMAND, finished=self.finished)
            if "refused" not in report:
                found.append((report["leak"]["leak_rate"] if report["leak"] else 0.0, title))
        return max(found, default=None)

    def accuracy(self, row: Row, data: str, partition: str) -> str:
        """Return the accuracy after training, or why there is none; "" where it was not run."""
        flat = TRAINING | row.keys | PARTITIONS[partition]
        if data == "digits":
            flat |= DIGITS
        else:
            flat |= {"data.dataset": cifar(self.out, range(4000), "four-thousand")}
        try:
            report = trained(flat, self.out, COMMAND, finished=self.finished)
        except NotRunError:
            return ""
        return (
            "refused" if "refused" in report else f"{report['federation']['accuracy']['after']:.3f}"
        )


def section(cells: Cells, data: str, partitions: list[str], chosen: list[Row], page: Path) -> str:
    """Return the table of one data set, and draw its figures beside the page."""
    lines = [f"| defense | leak rate | by | {' | '.join(f'accuracy, {p}' for p in partitions)} |"]
    lines.append("|" + " --- |" * (3 + len(partitions)))
    curves: dict[str, dict[str, list[Point]]] = {name: defaultdict(list) for name in partitions}
    for row in chosen:
        try:
            leaked = cells.leak(row, data)
        except NotRunError:
            continue
        found = {name: cells.accuracy(row, data, name) for name in partitions}
        if not any(found.values()):
            continue
        told = [f"`{row.expression}`".replace("|", "\\|")]
        told += [f"{leaked[0]:.2f}", leaked[1]] if leaked else ["refused", ""]
        told += found.values()
        lines.append(f"| {' | '.join(told)} |")
        for name, after in found.items():
            if leaked and after not in ("", "refused"):
                curves[name][row.name].append((leaked[0], float(after), ""))
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
    chosen = [r for r in rows(every_strength=True) if given.only is None or r.name in given.only]
    cells = Cells(given.out.absolute(), given.attacks, given.finished)
    text = HEAD.format(
        attacks=", ".join(f"`{name}`" for name in given.attacks),
        partitions=" and ".join(given.partitions),
        command=COMMAND,
    )
    for data in given.data:
        text += section(cells, data, given.partitions, chosen, given.page)
    given.page.write_text(text)


if __name__ == "__main__":
    main()
