"""What a defended round costs over an undefended one: docs/methods/defenses-overhead.md.

    python tests/benchmarks/defense_overhead.py [--rounds 3] [--turns 3] [--one-step NAME ...]
        [--only NAME ... --page FILE] [--page docs/methods/defenses-overhead.md]

Photo tiles, a convnet, 4 clients, one local epoch of batches of 32.  Undefended and defended
federations take turns, and what counts of each is the fastest round after the first: so that what
else the machine does weighs on both alike.  The ratio is the median over turns; the lowest and the
highest stand beside it.  Those of ``--one-step`` take minutes for a batch: they and their
undefended federations take two rounds of one step, in one turn.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from defense_rows import NOTHING, Row, measured, rows

COMMAND = "python tests/benchmarks/defense_overhead.py"
PAGE = Path("docs/methods/defenses-overhead.md")
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
# What is tried where a defense cannot be put in place, on both sides.
OTHERWISE: dict[str, dict[str, Any]] = {
    "": {},
    " (train mode)": {"model.batchnorm": "private"},
    " (8 clients)": {"federation.clients": 8},
}
SLOW = ["dcs2", "obscure", "refiner", "soteria"]
HEAD = """# What a defended round costs

Photo tiles, `convnet(stride=2)`, 4 clients, one local epoch in batches of 32, one thread: seconds
of the fastest round after the first, as a ratio to that of an undefended federation just after,
and bytes sent up, as a ratio too. Medians of {turns} turns; the lowest and the highest ratio are in
brackets, and what nothing costs (`none`) says how far they scatter. "(one step)": one batch a round
and two rounds, on both sides, in one turn. "(8 clients)": on both sides. "(train mode)": the
undefended network is without dropout and BatchNorm, and the same in either mode. Rows that are
missing were not run.

One command: `{command}`.

| defense | seconds a round | ratio | bytes up, ratio |
| --- | --- | --- | --- |
"""


def fastest(row: Row, changes: dict[str, Any]) -> tuple[float, float] | str:
    """Return seconds of the fastest round after the first and bytes up, or why there are none."""
    with tempfile.TemporaryDirectory() as out:
        report = measured(SETTING | row.keys | changes, Path(out), COMMAND)
    if "federation" not in report:
        return str(report.get("refused") or report["nothing"]).split(";")[0]
    return min(report["federation"]["round_seconds"][1:]), report["federation"]["bytes_up"]


def undefended(changes: dict[str, Any]) -> tuple[float, float]:
    """Return the same of an undefended federation with the same changes.

    Only its mode is left out: it has one, and refuses to be told.
    """
    kept = {key: value for key, value in changes.items() if key != "model.batchnorm"}
    found = fastest(NOTHING, kept)
    if isinstance(found, str):
        raise RuntimeError(f"the undefended federation was refused: {found}")
    return found


def line(row: Row, changes: dict[str, Any], turns: int, note: str) -> str:
    """Return a row of the table, with the first of ``OTHERWISE`` that is not refused."""
    name = f"`{row.expression}`".replace("|", "\\|")
    first = ""
    for otherwise, more in OTHERWISE.items():
        wanted = changes | more
        found = fastest(row, wanted)
        if isinstance(found, str):
            first = first or found
            continue
        pairs = [(found, undefended(wanted))]
        while len(pairs) < turns:
            again = fastest(row, wanted)
            assert not isinstance(again, str)
            pairs.append((again, undefended(wanted)))
        seconds = median(defended[0] for defended, _ in pairs)
        ratios = sorted(defended[0] / plain[0] for defended, plain in pairs)
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if turns > 1 else ""
        up = found[1] / pairs[0][1][1]
        said = f"{seconds:.2f} | {median(ratios):.2f}{spread} | {up:.2f}"
        return f"| {name}{note}{otherwise} | {said} |"
    return f"| {name}{note} | refused: {first} | | |"


def main() -> None:
    """Run everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--one-step", nargs="*", default=SLOW)
    parser.add_argument("--page", type=Path, default=None)
    given = parser.parse_args()
    if given.only is not None and given.page is None:
        parser.error(f"--only would leave nothing else on {PAGE}: say --page FILE too")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    text = HEAD.format(command=COMMAND, turns=given.turns)
    for row in rows():
        if given.only is None or row.name in given.only:
            short = row.name in given.one_step
            changes = ONE_STEP if short else {"federation.rounds": given.rounds}
            turns, note = (1, " (one step)") if short else (given.turns, "")
            text += line(row, changes, turns, note) + "\n"
            (given.page or PAGE).write_text(text)


if __name__ == "__main__":
    main()
