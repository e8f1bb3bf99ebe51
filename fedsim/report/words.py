"""Figures and facts in words for people."""

import re
from typing import Any

from fedsim.audit.sentence import percent

CAPABILITIES = {
    "updates": "what clients were sent and what they uploaded",
    "basics": "image size, number of classes, number of examples behind an upload",
    "details": "how clients train: learning rate, epochs, batch size, optimizer",
    "surrogate": "images like the clients' own, but none of theirs",
    "statistics": "class distribution and BatchNorm statistics of the clients",
    "manipulation": "changing the model before clients receive it",
    "selection": "choosing which clients take part",
}


def seconds(value: float | None) -> str:
    """Say a duration: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if value is None:
        return "not measured"
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(value: int | None) -> str:
    """Say a number of bytes: ``512 B``, ``12.3 MB``."""
    if value is None:
        return "not measured"
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB"


def decibel(value: float | None) -> str:
    """Say a PSNR; at the cap of 200 dB two images are the same."""
    if value is None:
        return "none"
    if value >= 200:
        return "identical"
    return f"{value:.1f} dB" if value < 60 else f"{value:.0f} dB"


def figure(value: float | None) -> str:
    """Say a figure without a unit, to three digits."""
    return "none" if value is None else f"{value:.3g}"


def count(value: int | None) -> str:
    """Say a number with thin separators: ``1 700 000``."""
    return "not measured" if value is None else f"{value:,}".replace(",", "\u202f")


def share(value: float | None) -> str:
    """Say a share in percent."""
    return "not measured" if value is None else percent(value)


def arguments(parameters: dict[str, Any]) -> str:
    """Say parameters as a scenario writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items()) or "defaults"


def unbroken(text: str) -> str:
    """Keep a figure and its unit or sign on one line."""
    return re.sub(r"(?<=[\d≥≤<>]) (?=%|dB|\d)", "\u00a0", text)
