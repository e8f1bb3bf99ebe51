"""Each defense against fixed attacks and the one that knows of it: docs/methods/defenses.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/defense_table.py [--only NAME ...]
        [--finished] [--out runs/defenses] [--page docs/methods/defenses.md]

The same 64 CIFAR-10 images for all (training images 0, 100 ... 6300).  Passive attacks get one
image a client, from 64 clients; an imprint gets 8 images from each of 8.  Accuracy is of a
federation of its own: 8 clients, 4,000 images, ten rounds.  Finished cells are kept in ``--out``,
one file each, so that the command goes on where it stopped; delete them when a method changes.
``--finished`` runs nothing; ``--only`` runs the rows of some names.  What is not run and not there
either stands as the page has it: it was finished elsewhere.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from cifar_images import cifar
from defense_rows import NotRunError, Row, against, measured, on_page, rows

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/defense_table.py"
IMAGES = 64
ONE_EACH = {"federation.clients": IMAGES, "federation.local": "fedsgd(batch_size=1, lr=0.1)"}
#: Attack and federation of each group of columns.
ATTACKS: dict[str, dict[str, Any]] = {
    "ratio": {
        **ONE_EACH,
        "threat-model": "A",
        "attack": "linear-inversion",
        "model.name": "mlp(hidden=[256])",
    },
    "matching": {
        **ONE_EACH,
        "threat-model": "B",
        "attack": "inverting-gradients(iterations=200, tv=1e-2)",
        "model.name": "convnet(stride=2)",
    },
    "imprint": {
        "threat-model": "G",
        "attack": "robbing-the-fed(units=128)",
        "model.name": "convnet(stride=2)",
        "federation.clients": 8,
        "federation.local": "fedsgd(batch_size=8, lr=0.1)",
    },
}
# What is tried where a defense cannot be put in place, or refuses what its client holds.
VARIATIONS: dict[str, dict[str, Any]] = {
    "": {},
    " (three steps)": {"federation.local": "fedavg(epochs=3, batch_size=1, lr=0.01)"},
    " (train mode)": {"model.batchnorm": "private"},
    " (8 a client)": {
        "federation.clients": 8,
        "federation.local": "fedsgd(batch_size=8, lr=0.1)",
    },
    " (32 a client)": {
        "federation.clients": 2,
        "federation.local": "fedsgd(batch_size=32, lr=0.1)",
    },
}
TRAINING = {
    "title": "accuracy",
    "model.name": "convnet(stride=2)",
    "federation.clients": 8,
    "federation.rounds": 10,
    "federation.local": "fedavg(epochs=1, batch_size=32, lr=0.05)",
    "audit.baseline": False,
}
HEAD = """# Every defense against its attackers

The same 64 CIFAR-10 images for all (training images 0, 100 ... 6300); a cell is leaked images at
PSNR 20 dB, mean PSNR in dB, mean SSIM, and labels rightly named. Leaked images are of 64, or of as
many as clients trained on, where that is told. `ratio`: `linear-inversion` on an `mlp`, one image a
client. `matching`: `inverting-gradients`, 200 iterations, on a `convnet`, one image a client.
`imprint`: `robbing-the-fed` with 128 bins before a `convnet`, 8 images from each of 8 clients.
`adaptive`: the attack that the defense names, the strongest found among those that know of it; of
`label-smoothing` and `emulated-ppfl` that is one that does not, and undefended the control of those
that count on Laplace noise. It works on the federation of `matching` or `imprint` but for what it
asks for (`adversary_setting`: more rounds, in which noise is averaged or what was kept back comes).
A defense is worth what its worst column says: each is another federation, and one that knows of the
defense need not be the strongest there is. Accuracy: ten rounds of 8 clients with 4,000 images, and
the seconds and bytes sent up of these rounds. In parentheses is what was changed where a defense
does nothing, or refuses: three local steps, the network in train mode, 8 or 32 images a client.
"nothing": every client refused or was turned away, or the attack returned nothing. One seed; cells
are of several commits. Rows that are missing were not run. LPIPS is not computed: its weights were
not at hand. Seconds are of a machine that did other things too; [what a defended round
costs](defenses-overhead.md) was measured in turns.

One command: `{command}`.

| defense | ratio | matching | imprint | adaptive | accuracy | seconds | MB up |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def cell(row: Row, title: str, out: Path, *, finished: bool) -> str:
    """Return what an attack got from behind a defense."""
    flat = {"title": title, "data.dataset": cifar(out, range(0, 6400, 100), "sixty-four")}
    flat |= ATTACKS[title] | row.keys
    return told(flat, out, finished=finished)


def named(row: Row, dataset: str) -> dict[str, Any]:
    """Return the scenario of the attack that a defense names."""
    manipulates, keys = against(row)
    usual = ATTACKS["imprint" if manipulates else "matching"]
    return {"title": "adaptive", "data.dataset": dataset, **usual, **row.keys, **keys}


def adaptive(row: Row, out: Path, *, finished: bool) -> str:
    """Return what the attack that a defense names got."""
    if not row.adversary:
        return ""
    flat = named(row, cifar(out, range(0, 6400, 100), "sixty-four"))
    return f"`{row.adversary}`: {told(flat, out, finished=finished)}"


def varied(
    flat: dict[str, Any], out: Path, command: str, *, finished: bool = False
) -> tuple[dict[str, Any], str]:
    """Return the report of the first variation that leaks or could, and which it was.

    An attack that was made and got nothing is an answer; so is a run that failed.
    """
    first = None
    for note, changes in VARIATIONS.items():
        report = measured({**flat, **changes}, out, command, finished=finished)
        failed = report.get("refused", "").startswith("failed: ")
        if failed or "nothing" in report or report.get("leak"):
            return report, note
        first = first or report
    assert first is not None
    return first, ""


def told(flat: dict[str, Any], out: Path, *, finished: bool) -> str:
    """Run, and tell the figures."""
    report, note = varied(flat, out, COMMAND, finished=finished)
    if "refused" in report:
        return f"refused: {report['refused'].split(';')[0]}"
    leak = report["leak"]
    if not leak:
        return "nothing" + note
    labels = leak["label_accuracy"]
    right = "" if labels is None else f", {labels:.2f}"
    private = leak["private_examples"]
    of = "" if private == IMAGES else f" of {private}"
    figures = f"{leak['leaked']}{of}, {leak['psnr']['mean']:.1f}, {leak['ssim']['mean']:.2f}"
    return figures + right + note


def trained(
    flat: dict[str, Any], out: Path, command: str, *, finished: bool = False
) -> dict[str, Any]:
    """Return the report of a federation that only trains, in train mode where it has to be."""
    report = measured(flat, out, command, finished=finished)
    if "refused" in report:
        changes = VARIATIONS[" (train mode)"]
        varied = measured({**flat, **changes}, out, command, finished=finished)
        return report if "refused" in varied else varied
    return report


def accuracy(row: Row, out: Path, *, finished: bool) -> tuple[str, str, str]:
    """Return accuracy, seconds and megabytes sent up of a federation that only trains."""
    flat = TRAINING | row.keys | {"data.dataset": cifar(out, range(4000), "four-thousand")}
    report = trained(flat, out, COMMAND, finished=finished)
    if "federation" not in report:
        why = report.get("refused") or report["nothing"]
        return f"refused: {why.split(';')[0]}", "", ""
    found = report["federation"]
    after, up = found["accuracy"]["after"], found["bytes_up"] / 1e6
    return f"{after:.3f}", f"{found['seconds']:.0f}", f"{up:.0f}"


def line(row: Row, out: Path, before: dict[str, str], *, finished: bool) -> str:
    """Return a row of the table; cells that are not there are those that it had ``before``.

    Raises
    ------
    NotRunError
        If an attack's is in neither.
    """
    cells = [f"`{row.expression}`"]
    for title in (*ATTACKS, "adaptive"):
        try:
            if title == "adaptive":
                cells.append(adaptive(row, out, finished=finished))
            else:
                cells.append(cell(row, title, out, finished=finished))
        except NotRunError:
            if title not in before:
                raise
            cells.append(before[title])
    try:
        cells += accuracy(row, out, finished=finished)
    except NotRunError:
        cells += [
            before.get("accuracy", "not run"),
            before.get("seconds", ""),
            before.get("MB up", ""),
        ]
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def table(out: Path, page: Path, *, only: list[str] | None, finished: bool) -> str:
    """Return the page; without the rows that have nowhere been run."""
    before, lines = on_page(page), []
    for row in rows():
        keep = finished or not (only is None or row.name in only)
        had = before.get(("", f"`{row.expression}`"), {})
        try:
            lines.append(line(row, out, had, finished=keep))
        except NotRunError:
            continue
    return HEAD.format(command=COMMAND) + "\n".join(lines) + "\n"


def main() -> None:
    """Fill every cell that is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/defenses"))
    parser.add_argument("--page", type=Path, default=Path("docs/methods/defenses.md"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    text = table(given.out.absolute(), given.page, only=given.only, finished=given.finished)
    given.page.write_text(text)


if __name__ == "__main__":
    main()
