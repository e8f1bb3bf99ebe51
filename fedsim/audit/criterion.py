"""What counts as leaked: ``psnr>=20``, ``psnr>=18 and ssim>0.6``."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.audit import perceptual
from fedsim.audit.metrics import METRICS
from fedsim.errors import ScenarioError
from fedsim.registry import nearest

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_SIGNS = {">=": "≥", "<=": "≤", ">": ">", "<": "<"}
_CONDITION = re.compile(r"\s*([A-Za-z]\w*)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", re.I)
_KEY = "audit.criterion"


@dataclass(frozen=True)
class Criterion:
    """Conditions that must all hold: ``(metric, comparison, value)``."""

    conditions: tuple[tuple[str, str, float], ...]

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics it asks for."""
        return frozenset(name for name, _, _ in self.conditions)

    def holds(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return ``[N]`` bool from the metrics' ``[N]`` values."""
        met = [_COMPARISONS[sign](values[name], limit) for name, sign, limit in self.conditions]
        return torch.stack(met).all(dim=0)

    def limit(self, metric: str) -> float | None:
        """Return the value that a metric is held against, or None."""
        return next((limit for name, _, limit in self.conditions if name == metric), None)

    def spoken(self) -> str:
        """Say it for a reader: ``PSNR ≥ 20 dB``."""
        parts = []
        for name, sign, limit in self.conditions:
            metric = METRICS[name]
            parts.append(f"{metric.title} {_SIGNS[sign]} {limit:g} {metric.unit}".strip())
        return " and ".join(parts)


def parse_criterion(text: str) -> Criterion:
    """Parse a criterion.

    Raises
    ------
    ScenarioError
        If the text is not of the form ``metric>=value``, several joined by `` and ``; if there is
        no such metric; if a comparison points the wrong way; or if it asks for LPIPS where its
        weights are not at hand.
    """
    conditions = tuple(_parse_one(part, text) for part in re.split(r"\sand\s", text))
    criterion = Criterion(conditions)
    if "lpips" in criterion.metrics and (reason := perceptual.unavailable()):
        raise ScenarioError(_KEY, text, reason)
    return criterion


def _parse_one(part: str, text: str) -> tuple[str, str, float]:
    form = "write metric>=value (or >, <=, <), several joined by ' and ', as in psnr>=20"
    found = _CONDITION.fullmatch(part)
    if found is None:
        raise ScenarioError(_KEY, text, f"{form}; {part.strip()!r} is not of this form")
    name, sign = found[1].lower(), found[2]
    if name not in METRICS:
        raise ScenarioError(_KEY, text, f"no metric {name!r}; {nearest(name, list(METRICS))}")
    try:
        limit = float(found[3])
    except ValueError:
        raise ScenarioError(_KEY, text, f"{form}; {found[3]!r} is no number") from None
    if METRICS[name].higher_is_better != sign.startswith(">"):
        turned = sign.translate(str.maketrans("<>", "><"))
        raise ScenarioError(
            _KEY,
            text,
            f"this calls bad reconstructions leaked: {METRICS[name].title} is better when "
            f"{'higher' if METRICS[name].higher_is_better else 'lower'}; "
            f"write {name}{turned}{limit:g}",
        )
    return name, sign, limit
