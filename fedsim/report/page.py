"""From a report to one self-contained page."""

from typing import Any

import jinja2
import tomli_w
from markupsafe import Markup

from fedsim import registry
from fedsim.audit.metrics import METRICS
from fedsim.audit.schema import Leak, Report, Summary
from fedsim.audit.sentence import capitalized
from fedsim.report import figures, words
from fedsim.report.pairs import Pairs
from fedsim.report.style import STYLE
from fedsim.report.template import PAGE

_SHOWN_ROWS = 40


def render(report: Report, pairs: Pairs) -> str:
    """Return the page; it refers to nothing outside itself and runs no script."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "seconds": words.seconds,
        "size": words.size,
        "decibel": words.decibel,
        "figure": words.figure,
        "count": words.count,
        "share": words.share,
        "arguments": words.arguments,
        "unbroken": words.unbroken,
        "capitalize_first": capitalized,
    }
    times = report.federation.round_seconds
    channel = dict(report.federation.channel)
    name = channel.pop("name", None) or report.scenario.get("channel") or "plain"
    return environment.from_string(PAGE).render(
        report=report,
        leak=report.leak,
        federation=report.federation,
        accuracy=report.federation.accuracy,
        pairs=pairs,
        style=Markup(STYLE),
        mood=_mood(report),
        capabilities=words.CAPABILITIES,
        aggregated=report.attack is not None and report.attack.aggregated,
        hides=_hides(name),
        # The page shows the first few: of many clients, those who refused.
        detection=sorted(report.detection, key=lambda d: not d.verdict.startswith("refused")),
        unmasked=[line for line in report.federation.receipts if line.startswith("unmasked")],
        channel_name=name,
        channel_figures={k: _short(v) for k, v in channel.items()},
        mean_round=sum(times) / len(times) if times else None,
        shown=_SHOWN_ROWS,
        versions=report.environment.get("versions") or {},
        scenario=tomli_w.dumps(report.scenario),
        **(_leak_figures(report, report.leak) if report.leak else {}),
    )


def _hides(channel: str) -> bool:
    """Say whether a channel is one that should let the server read sums only."""
    found = registry.components("channel").get(channel.partition("(")[0])
    return bool(getattr(found, "aggregates", False))


def _mood(report: Report) -> str:
    """Color of the verdict: it leaks, it holds, it must not be believed, or nothing was judged."""
    if report.failed or report.stopped:
        return "broken"
    if report.membership is not None:
        return "leaks" if report.membership.accuracy > report.membership.guess else "holds"
    if report.leak is None:
        return ""
    above = report.leak.floor is None or report.leak.leak_rate > report.leak.floor.leak_rate
    return "leaks" if report.leak.leaked and above else "holds"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _leak_figures(report: Report, leak: Leak) -> dict[str, Any]:
    psnr = [e.psnr for e in report.examples if e.psnr is not None]
    ssim = [e.ssim for e in report.examples if e.ssim is not None]
    floor = leak.floor
    return {
        "bar": figures.share_bar(leak),
        "dashed": "Dashed: what a guess gets on average." if floor else "",
        "psnr_figure": figures.histogram(
            psnr,
            low=0,
            high=60,
            bins=30,
            label="PSNR (dB)",
            floor=floor.psnr.mean if floor else None,
            open_end=True,
        ),
        "ssim_figure": figures.histogram(
            ssim,
            low=0,
            high=1,
            bins=20,
            label="SSIM",
            floor=floor.ssim.mean if floor else None,
        ),
        "curve_figure": figures.curve(leak.curve, leak.psnr_limit),
        "metric_rows": [_metric_row(name, leak) for name in METRICS],
    }


def _metric_row(name: str, leak: Leak) -> dict[str, Any]:
    metric, summary = METRICS[name], getattr(leak, name)
    row: dict[str, Any] = {"title": metric.title, "meaning": metric.meaning, "reason": None}
    if summary is None:
        return {**row, "reason": leak.lpips_reason}
    guess: Summary | None = getattr(leak.floor, name) if leak.floor else None
    say = words.decibel if metric.unit == "dB" else words.figure
    best = summary.max if metric.higher_is_better else summary.min
    return {
        **row,
        "mean": say(summary.mean),
        "median": say(summary.median),
        "best": say(best),
        "guess": say(guess.mean) if guess else "none",
    }
