"""The page of a series: its table, and accuracy against leak rate."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from fedsim.files import write_atomically
from fedsim.report.style import STYLE
from fedsim.report.tradeoff import Point, tradeoff_figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{{ style }}</style>
</head><body>
<header><p class="kind">FedSim series</p><h1>{{ title }}</h1></header>
<main>
<section><h2>Run by run</h2><div class="table" tabindex="0" role="region" aria-label="Runs">
<table><thead><tr>{% for word in head %}<th scope="col">{{ word }}</th>{% endfor %}</tr></thead>
<tbody>{% for link, cells in rows %}<tr>
<th scope="row">{% if link %}<a href="{{ link }}">{{ cells[0] }}</a>{% else %}{{ cells[0] }}\
{% endif %}</th>
{% for cell in cells[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></section>
{% if figure %}<section><h2>Accuracy against leak rate</h2>
<figure><img alt="Accuracy against leak rate of each run" style="max-width: 100%"
src="data:image/png;base64,{{ figure }}"><figcaption>Up is a better model, left is more privacy. \
One point a run.</figcaption></figure></section>{% endif %}
</main></body></html>
"""


def write_series(
    page: Path,
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    points: Mapping[str, Point],
) -> Path:
    """Write a series' page, and its figure as a PNG of the same name where there are two points.

    Parameters
    ----------
    page : Path
        Ending in ``.html``.
    head : sequence of str
        Names of the columns.
    rows : sequence
        Where each run's report is, relative to the page ("" where there is none), and its cells.
    points : mapping of str to Point
        Leak rate and accuracy by run.
    """
    figure = ""
    if len(points) > 1:
        series = {name: [point] for name, point in points.items()}
        drawn = tradeoff_figure(series, page.with_suffix(".png"), page.stem)
        figure = base64.b64encode(drawn.read_bytes()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_PAGE).render(
        title=page.stem, head=head, rows=rows, figure=figure, style=Markup(STYLE)
    )
    write_atomically(page, text)
    return page
