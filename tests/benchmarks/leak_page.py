"""The page and the figure of ``leak_by_clients.py``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from leak_settings import Setup
from torch import Tensor

matplotlib.use("svg")
import matplotlib.pyplot as plt

STRICT = 30.0
AXES = {"clients": "clients in the sum", "steps": "local steps"}
INTRO = """# Leak rate by clients behind SecAgg+, and by local steps

Every figure is the share of images that came back, matched one to one by the auditor: at 20 dB, in
parentheses at 30 dB. `law` is what is expected, in closed form. {data}.

![Leak rate by clients and by local steps]({figure})

One command writes this page and the figure: `{command}`.
It keeps finished federations in `runs/leak-by-clients`; the settings are those of
`tests/benchmarks/leak_settings.py`.
{findings}"""
BY_CLIENTS = """
## Behind SecAgg+, by clients

The real protocol (`secagg`, weights up to a client's number of images). The images at 2, 8 and 32
clients are the same as far as the federations go: 16 sums of 2 clients hold what one of 32 holds.
Which of them meet at one client differs, and moves shares by some hundredths: `loki` and
`sparse-linear-layer`, whose clients hold the same each time, go up and down together.

| attack | {points} | why |
| --- |{rules} --- |
"""
BY_STEPS = """
## With FedAvg, by local steps

Two clients, a round of T equal steps over all their images, float32 weights uploaded one by one
(`model-inconsistency`: as one sum; `secagg-unmasking`: through SecAgg+).

| attack | {points} | why |
| --- |{rules} --- |
"""
DATA = {
    "cifar10": "CIFAR-10, 1,000 test images as surrogate",
    "photo-tiles": "Photo tiles",
}


@dataclass(frozen=True)
class Row:
    """One attack along one axis: what its federations gave at each point."""

    setup: Setup
    points: dict[int, list[dict[str, Any]]]

    @property
    def refusal(self) -> str | None:
        """The reason, where it was refused everywhere."""
        reasons = [told[0].get("refused") for told in self.points.values()]
        return reasons[0] if all(reasons) else None

    def images(self, point: int) -> list[float | None]:
        """Return the PSNR of every image that was judged; None for one without a candidate."""
        return [psnr for told in self.points[point] for psnr in told.get("psnr", ())]

    def share(self, point: int, decibel: float) -> float | None:
        """Return the share at so many dB; None where nothing was judged."""
        images = self.images(point)
        if not images:
            return None
        return sum(psnr is not None and psnr >= decibel for psnr in images) / len(images)

    def guess(self, point: int) -> float:
        """Return the share that a guess without the updates reaches, the mean of federations."""
        floors = [told["floor"] or 0.0 for told in self.points[point] if "floor" in told]
        return sum(floors) / max(len(floors), 1)


def write_page(
    page: Path, rows: Sequence[Row], own: Tensor, absent: set[str], data: str, command: str
) -> None:
    """Write the page, and beside it the figure.

    ``own`` are the attacker's images ``[S, D]``; ``absent`` claim SecAgg+ and were not run.
    """
    figure = page.with_suffix(".svg")
    draw(figure, rows, own)
    text = INTRO.format(
        data=DATA[data], figure=figure.name, command=command, findings=findings(rows)
    )
    for axis, head in (("clients", BY_CLIENTS), ("steps", BY_STEPS)):
        there = [row for row in rows if row.setup.axis == axis]
        if not there:
            continue
        points = list(there[0].points)
        text += head.format(points=" | ".join(map(str, points)), rules=" --- |" * len(points))
        for row in there:
            if row.refusal is None:
                text += line(row, own)
        refused = [row for row in there if row.refusal is not None]
        if refused:
            text += "\nRefused before anybody trains:\n\n"
        text += "".join(f"- `{row.setup.name}`: {row.refusal}\n" for row in refused)
        if axis == "clients" and absent:
            text += f"\nNot run here: {', '.join(f'`{name}`' for name in sorted(absent))}.\n"
    page.write_text(text + settings(rows))


def findings(rows: Sequence[Row]) -> str:
    """Return what LOKI's share does between the fewest and the most clients."""
    for row in rows:
        if row.setup.name == "loki" and row.setup.axis == "clients":
            few, many = min(row.points), max(row.points)
            shares = [row.share(point, row.setup.criterion) or 0.0 for point in (few, many)]
            apart = abs(shares[1] - shares[0])
            return (
                f"\nLOKI takes {shares[0]:.3f} of the images at {few} clients and {shares[1]:.3f} "
                f"at {many}, {apart:.3f} apart (asked: at most 0.05).\n"
            )
    return ""


def line(row: Row, own: Tensor) -> str:
    """Return a table's line."""
    setup = row.setup
    cells = [cell(row, point, own) for point in row.points]
    label = f", {setup.label}" if setup.label else ""
    limit = "" if setup.criterion == 20 else f", at {setup.criterion:g} dB instead of 20"
    of = "" if setup.target is None else ", the target's images"
    return f"| `{setup.name}`{label}{limit}{of} | {' | '.join(cells)} | {setup.why} |\n"


def cell(row: Row, point: int, own: Tensor) -> str:
    """Return a figure, the stricter one, how many images, and the law."""
    share, strict = row.share(point, row.setup.criterion), row.share(point, STRICT)
    if share is None:
        return f"not possible: {row.points[point][0]['refused']}"
    law = row.setup.law
    expected = "" if law is None else f"; law {law(point, own):.2f}"
    guess = row.guess(point)
    floor = "" if guess < 0.005 else f"; a guess {guess:.2f}"
    return f"**{share:.2f}** ({strict:.2f}) of {len(row.images(point))}{expected}{floor}"


def settings(rows: Sequence[Row]) -> str:
    """Return what each row was run with."""
    text = "\n## Settings\n\n| attack | by | model | local training | images a client | sums |\n"
    text += "| --- | --- | --- | --- | --- | --- |\n"
    for row in rows:
        setup = row.setup
        if row.refusal is None and setup.label != "exact":
            local = setup.local.replace("{images}", str(setup.images))
            more = "" if setup.defenses == "none" else f"; `{setup.defenses}`"
            sums = " / ".join(str(len(told)) for told in row.points.values())
            text += f"| `{setup.attack}` | {setup.axis} | `{setup.model}` | `{local}`{more} "
            text += f"| {setup.images} | {sums} |\n"
    return text


# -- the figure ------------------------------------------------------------------------------------
def draw(file: Path, rows: Sequence[Row], own: Tensor) -> None:
    """Draw leak rate by clients and by local steps; dashed lines are laws."""
    plain = {"svg.fonttype": "none", "svg.hashsalt": "leak", "font.size": 9}
    with plt.rc_context(plain):
        canvas, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
        names = sorted({row.setup.shown for row in rows if row.refusal is None})
        colors = {name: plt.get_cmap("tab20")(at) for at, name in enumerate(names)}
        for axis, panel in zip(AXES, axes, strict=True):
            for row in rows:
                if row.setup.axis == axis and row.refusal is None:
                    _curve(panel, row, own, colors[row.setup.shown])
            panel.set_xscale("log", base=2)
            ticks = sorted(
                {point for row in rows if row.setup.axis == axis for point in row.points}
            )
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xlabel(AXES[axis])
            panel.set_ylim(-0.03, 1.03)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("leak rate (dashed: law)")
        axes[0].set_title("behind SecAgg+")
        axes[1].set_title("FedAvg")
        handles = [plt.Line2D([], [], color=colors[n], marker="o", label=n) for n in names]
        canvas.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        canvas.tight_layout(rect=(0, 0.1, 1, 1))
        canvas.savefig(file, format="svg", metadata={"Date": None})
        plt.close(canvas)


def _curve(panel: Any, row: Row, own: Tensor, color: Any) -> None:
    """Draw one attack's line and its law."""
    shares = [(point, row.share(point, row.setup.criterion)) for point in row.points]
    known = [(point, share) for point, share in shares if share is not None]
    panel.plot(*zip(*known, strict=True), color=color, marker="o", lw=1.5)
    if row.setup.law is not None:
        laws = [row.setup.law(point, own) for point, _ in known]
        panel.plot([point for point, _ in known], laws, color=color, ls="--", lw=1, alpha=0.7)
