"""Accuracy against leak rate, for several runs: what a defense costs and what it buys."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

#: Leak rate and accuracy, both in ``[0, 1]``, and what the point is called.
Point = tuple[float, float, str]
IN_A_COLUMN = 30  # names that the legend's column holds


def tradeoff_figure(
    series: Mapping[str, Sequence[Point]],
    path: Path,
    title: str,
    hollow: Mapping[str, Point] | None = None,
) -> Path:
    """Draw one line for each series, weakest point first, and write a PNG.

    Parameters
    ----------
    series : mapping of str to sequence of Point
        By name; one of a single point is drawn as a point.
    path : Path
        Of the PNG.
    title : str
        What the runs have in common.
    hollow : mapping of str to Point, optional
        Of series, one more point, which no line joins.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    markers = "os^vD<>pP*X"
    for place, (name, points) in enumerate(series.items()):
        leaks, accuracies, words = zip(*points, strict=True)
        style = f"C{place % 10}{markers[place % len(markers)]}-"
        axes.plot(leaks, accuracies, style, label=name, linewidth=1, markersize=5, alpha=0.85)
        if hollow and name in hollow:
            leak, accuracy, _ = hollow[name]
            axes.plot(leak, accuracy, style[:-1], fillstyle="none", markersize=9)
        for leak, accuracy, word in zip(leaks, accuracies, words, strict=True):
            if word:
                axes.annotate(word, (leak, accuracy), fontsize=6, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
    axes.set(xlabel="leak rate: private images that came back", ylabel="accuracy after training")
    axes.set(title=title, xlim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    columns = ceil(len(series) / IN_A_COLUMN)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    figure.savefig(path, dpi=120)
    return path
