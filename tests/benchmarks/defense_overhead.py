"""What a defended round costs over an undefended one: docs/methods/defenses-overhead.md.

    python tests/benchmarks/defense_overhead.py [--rounds 3] [--only NAME ...]
        [--one-step NAME ...] [--page docs/methods/defenses-overhead.md]

Photo tiles, a convnet, 4 clients, one local epoch of batches of 32.  Each defense is run between
two undefended federations, and its ratio is to the mean of the two, of the fastest round after the
first: so that what else the machine does weighs on both alike.  Those of ``--one-step`` take
minutes for a batch: they and their undefended federations take two rounds of one step.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

from defense_rows import NOTHING, Row, rows
from defense_table import trained

COMMAND = "python tests/benchmarks/defense_overhead.py"
SETTING: dict[str, Any] = {
    "title": "overhead",
    "data.dataset": "photo-tiles",
    "model.name": "convnet(stride=2)",
    "federation.clients": 4,
    "federation.local": "fedavg(epochs=1, batch_size=32, lr=0.05)",
    "audit.baseline": False,
}
ONE_STEP = {
    "federation.rounds": 2,
    "federation.local": "fedsgd(batch_size=32, lr=0.05)",
}
MORE = {"federation.clients": 8}
SLOW = ["dcs2", "obscure", "refiner", "soteria"]
HEAD = """# What a defended round costs

Photo tiles, `convnet(stride=2)`, 4 clients, one local epoch in batches of 32, one thread: seconds
of the fastest round after the first, as a ratio to undefended rounds before and after it, and bytes
sent up, as a ratio too. Ratios scatter by some 15 %: where nothing is added they lie between 0.85
and 1.15. "(one step)": one batch a round and two rounds, on both sides. Rows that are missing were
not run.

One command: `{command}`.

| defense | seconds a round | ratio | bytes up, ratio |
| --- | --- | --- | --- |
"""


def fastest(row: Row, changes: dict[str, Any]) -> tuple[float, float] | str:
    """Return seconds of the fastest round after the first and bytes up, or why there are none."""
    with tempfile.TemporaryDirectory() as out:
        report = trained(SETTING | row.keys | changes, Path(out), COMMAND)
    if "refused" in report:
        return f"refused: {report['refused'].split(';')[0]}"
    return min(report["federation"]["round_seconds"][1:]), report["federation"]["bytes_up"]


def line(row: Row, changes: dict[str, Any], note: str) -> str:
    """Return a row of the table; with more clients, where four are too few."""
    before, found, after = (fastest(one, changes) for one in (NOTHING, row, NOTHING))
    assert not isinstance(before, str)
    assert not isinstance(after, str)
    name = f"`{row.expression}`{note}".replace("|", "\\|")
    if isinstance(found, str) and "federation.clients" not in changes:
        return line(row, changes | MORE, f"{note} (8 clients)")
    if isinstance(found, str):
        return f"| {name} | {found} | | |"
    plain = (before[0] + after[0]) / 2
    return f"| {name} | {found[0]:.2f} | {found[0] / plain:.2f} | {found[1] / after[1]:.2f} |"


def main() -> None:
    """Run everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--one-step", nargs="*", default=SLOW)
    parser.add_argument("--page", type=Path, default=Path("docs/methods/defenses-overhead.md"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    text = HEAD.format(command=COMMAND)
    for row in rows():
        if given.only is None or row.name in given.only:
            short = row.name in given.one_step
            changes = ONE_STEP if short else {"federation.rounds": given.rounds}
            text += line(row, changes, " (one step)" if short else "") + "\n"
            given.page.write_text(text)


if __name__ == "__main__":
    main()
