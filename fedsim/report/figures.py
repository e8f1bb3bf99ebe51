"""The page's figures: small SVG drawn by hand, in the page's own colors, light or dark.

Every coordinate is a number of ours; no text from a scenario enters a figure.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from fedsim.audit.schema import CurvePoint, Leak
from fedsim.audit.sentence import percent

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 40


def _x(share: float) -> float:
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)


def _y(share: float) -> float:
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def _svg(body: Sequence[str], title: str, height: int = HEIGHT) -> Markup:
    inside = "".join(body)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{inside}</svg>"
    )


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _axes(ticks: Sequence[tuple[float, str]], label: str, rates: Sequence[float]) -> list[str]:
    """Draw the frame: ``ticks`` along the bottom (share, words), ``rates`` up the side."""
    top = max(rates)
    body = []
    for rate in rates:
        y = _y(rate / top)
        body.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        words = f"{100 * rate:.0f} %"
        body.append(_text(_LEFT - 5, y + 4, words, "tick", "end"))
    for share, words in ticks:
        body.append(_text(_x(share), HEIGHT - _BOTTOM + 15, words, "tick"))
    body.append(_text(_x(0.5), HEIGHT - 6, label, "label"))
    return body


def share_bar(leak: Leak) -> Markup:
    """Draw the leak rate as a bar with its interval and the mark of a guess."""
    top, thick, wide = 8, 20, WIDTH - 4
    low, high = leak.interval

    def at(share: float) -> float:
        return round(2 + share * wide, 1)

    middle = top + thick / 2
    body = [
        f'<rect class="track" x="2" y="{top}" width="{wide}" height="{thick}"/>',
        f'<rect class="leaked" x="2" y="{top}" width="{round(leak.leak_rate * wide, 1)}" '
        f'height="{thick}"/>',
        f'<path class="whisker" d="M{at(low)} {middle}H{at(high)}'
        f'M{at(low)} {middle - 5}v10M{at(high)} {middle - 5}v10"/>',
    ]
    words = f"{percent(leak.leak_rate)} leaked, 95 % interval {percent(low)} to {percent(high)}"
    if leak.floor is not None:
        x = at(leak.floor.leak_rate)
        body.append(f'<path class="floor" d="M{x} {top - 6}v{thick + 12}"/>')
        words += f", a guess gets {percent(leak.floor.leak_rate)}"
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = f"{100 * share:.0f} %"
        body.append(_text(at(share), top + thick + 19, label, "tick", anchor))
    return _svg(body, words, top + thick + 24)


def histogram(
    values: Sequence[float],
    *,
    low: float,
    high: float,
    bins: int,
    label: str,
    floor: float | None,
    open_end: bool = False,
) -> Markup:
    """Draw the share of images in each bin of ``[low, high]``; values beyond count at the rim.

    ``floor`` is marked where a guess gets on average; ``open_end`` says "and more" at the high end.
    """
    counts = [0] * bins
    for value in values:
        at = int((value - low) / (high - low) * bins)
        counts[min(max(at, 0), bins - 1)] += 1
    shares = [count / max(len(values), 1) for count in counts]
    rates = _rates(max(shares, default=0.0))
    ticks = [(i / 4, f"{low + (high - low) * i / 4:g}") for i in range(5)]
    if open_end:
        ticks[-1] = (1.0, f"{high:g}+")
    body = _axes(ticks, label, rates)
    for at, share in enumerate(shares):
        if share:
            left, right, y = _x(at / bins), _x((at + 1) / bins), _y(share / rates[-1])
            body.append(
                f'<rect class="bar" x="{left + 0.5}" y="{y}" '
                f'width="{round(right - left - 1, 1)}" height="{round(_y(0) - y, 1)}"/>'
            )
    title = f"Distribution of {label} over {len(values)} images"
    if floor is not None:
        share = min(max((floor - low) / (high - low), 0.0), 1.0)
        body += _mark(share, f"guess {floor:.3g}", "floor")
        title += f"; a guess gets {floor:.3g} on average"
    return _svg(body, title)


def _mark(share: float, words: str, kind: str) -> list[str]:
    """Draw an upright line with its words above, kept inside the frame."""
    anchor = "start" if share < 0.15 else "end" if share > 0.85 else "middle"
    x = _x(share)
    return [
        f'<path class="{kind}" d="M{x} {_TOP}V{_y(0)}"/>',
        _text(x, _TOP - 8, words, f"{kind}-word", anchor),
    ]


def _rates(highest: float) -> list[float]:
    """Return round marks for the side, up to at least ``highest``."""
    for top in (0.1, 0.2, 0.4, 0.6, 0.8):
        if highest <= top:
            return [0.0, top / 2, top]
    return [0.0, 0.5, 1.0]


def curve(points: Sequence[CurvePoint], limit: float | None) -> Markup:
    """Draw the leak rate over the PSNR that one asks for, and the guess's; ``limit`` is marked."""
    last = points[-1].psnr
    ticks = [(i / 6, f"{last * i / 6:g}") for i in range(7)]
    body = _axes(ticks, "PSNR asked for (dB)", [0.0, 0.5, 1.0])
    if limit is not None and 0 <= limit <= last:
        body += _mark(limit / last, f"criterion {limit:g} dB", "limit")
    floor = [(p.psnr, p.floor) for p in points if p.floor is not None]
    if floor:
        body.append(f'<path class="floor" fill="none" d="{_line(floor, last)}"/>')
    rates = [(p.psnr, p.leak_rate) for p in points]
    body.append(f'<path class="curve" d="{_line(rates, last)}"/>')
    return _svg(body, "Share of private images that came back, by the PSNR one asks for")


def _line(points: Sequence[tuple[float, float]], last: float) -> str:
    return "M" + "L".join(f"{_x(x / last)} {_y(y)}" for x, y in points)
