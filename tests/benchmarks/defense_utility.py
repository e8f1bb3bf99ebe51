"""Accuracy against leak rate, each defense at its strengths: docs/methods/defenses-utility.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py [--data digits cifar10]
        [--partitions iid dirichlet] [--attacks ratio imprint matching] [--only NAME ...]
        [--out runs/utility] [--page docs/methods/defenses-utility.md]

Accuracy is of a federation that only trains: 8 clients, ten rounds.  The leak rate is that of the
strongest of the fixed attacks of ``defense_table.py``, on 64 images of the same data.  Each data
set gives a figure (PNG, beside the page).  Finished cells are kept in ``--out``.
"""

import argparse
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from defense_rows import Row, cifar, measured, rows
from defense_table import ATTACKS, STEPS, TRAINING

from fedsim.report.tradeoff import Point, tradeoff_figure

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/defense_utility.py"
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet(alpha=0.5)"}
HEAD = """# What defenses cost in accuracy, and what they buy

Each defense at three strengths (weakest first) where it has a strength. Leak rate: the share of
64 images that the strongest of these attacks returned at PSNR 20 dB or better: {attacks} (settings:
[defenses.md](defenses.md)). Accuracy: 8 clients, ten rounds of one local epoch, {partitions}.

One command: `{command}`.
"""


def leak(row: Row, data: str, attacks: list[str], out: Path) -> tuple[float, str] | None:
    """Return the highest leak rate, and whose it is; None where no attack could be run."""
    small = cifar(out, range(0, 6400, 100), "sixty-four") if data == "cifar10" else "digits"
    found: list[tuple[float, str]] = []
    for title in attacks:
        flat = {"title": title, "data.dataset": small, **ATTACKS[title], **row.keys}
        if data == "digits":
            flat |= {"data.partition": "iid"}
        for local in (flat["federation.local"], STEPS):
            report = measured({**flat, "federation.local": local}, out, COMMAND)
            if "refused" not in report:
                found.append((report["leak"]["leak_rate"] if report["leak"] else 0.0, title))
                break
    return max(found, default=None)


def accuracy(row: Row, data: str, partition: str, out: Path) -> float | None:
    """Return the accuracy after ten rounds; None where the defense cannot be put in place."""
    many = cifar(out, range(4000), "four-thousand") if data == "cifar10" else "digits"
    flat: dict[str, Any] = TRAINING | row.keys | {"data.dataset": many}
    flat |= {"data.partition": PARTITIONS[partition]}
    report = measured(flat, out, COMMAND)
    return None if "refused" in report else report["federation"]["accuracy"]["after"]


def page(given: argparse.Namespace) -> str:
    """Fill every cell that is not there yet; return the page."""
    out = given.out.absolute()
    partitions = " and ".join(f"`{PARTITIONS[name]}`" for name in given.partitions)
    text = HEAD.format(attacks=", ".join(given.attacks), partitions=partitions, command=COMMAND)
    chosen = [r for r in rows(every_strength=True) if given.only is None or r.name in given.only]
    for data in given.data:
        text += f"\n## {data}\n\n| defense | leak rate | by | "
        text += " | ".join(f"accuracy, {name}" for name in given.partitions)
        text += " |\n|" + " --- |" * (3 + len(given.partitions)) + "\n"
        curves: dict[str, list[Point]] = defaultdict(list)
        for row in chosen:
            leaked = leak(row, data, given.attacks, out)
            found = [accuracy(row, data, name, out) for name in given.partitions]
            cells = [f"`{row.expression}`".replace("|", "\\|")]
            cells += [f"{leaked[0]:.2f}", leaked[1]] if leaked else ["refused", ""]
            cells += ["refused" if one is None else f"{one:.3f}" for one in found]
            text += "| " + " | ".join(cells) + " |\n"
            if leaked and found[0] is not None:
                curves[row.name].append((leaked[0], found[0], ""))
        picture = given.page.with_name(f"{given.page.stem}-{data}.png")
        tradeoff_figure(curves, picture, f"{data}, {given.partitions[0]}")
        text += f"\n![Accuracy against leak rate, {data}]({picture.name})\n"
    return text


def main() -> None:
    """Fill every cell that is not there yet, and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=["digits", "cifar10"])
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/utility"))
    parser.add_argument("--page", type=Path, default=Path("docs/methods/defenses-utility.md"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page(given))


if __name__ == "__main__":
    main()
