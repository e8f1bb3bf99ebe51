"""Which private images are shown beside what the attack made of them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsim import seeds
from fedsim.audit.schema import Example, Report
from fedsim.audit.vault import Vault
from fedsim.reconstructions import load, png

SHOWN = 24


@dataclass(frozen=True)
class Pair:
    """A private image and its match, as ``data:`` addresses; None where there is none."""

    example: Example
    label: str
    truth: str
    recovered: str | None


@dataclass(frozen=True)
class Pairs:
    """The pairs that leaked worst, and a random sample of all private images."""

    worst: Sequence[Pair] = ()
    sample: Sequence[Pair] = ()


def choose(folder: Path, report: Report) -> Pairs:
    """Choose at most 24 worst leaks and 24 random private images, and fetch their pictures.

    The sample is drawn with the run's own seed, whatever the attack did: a fair impression where
    the worst leaks are none.
    """
    if report.attack is None or report.attack.reconstruction is None or not report.examples:
        return Pairs()
    matched = [example for example in report.examples if example.psnr is not None]
    worst = sorted(matched, key=lambda example: example.psnr or 0.0, reverse=True)[:SHOWN]
    draw = seeds.generator(int(report.scenario.get("seed", 7)), "report", "sample")
    order = torch.randperm(len(report.examples), generator=draw).tolist()
    sample = [report.examples[at] for at in sorted(order[:SHOWN])]
    vault = Vault(folder / "vault")
    candidates = load(folder / "reconstructions" / report.attack.reconstruction)[0].examples
    truths: dict[tuple[int, int], dict[int, Tensor]] = {}

    def pair(example: Example) -> Pair:
        key = (example.client, example.round)
        if key not in truths:
            truths[key] = _images(vault, *key)
        recovered = None if example.match is None else _address(candidates[example.match])
        named = example.label < len(report.classes)
        label = report.classes[example.label] if named else str(example.label)
        return Pair(example, label, _address(truths[key][example.index]), recovered)

    return Pairs([pair(example) for example in worst], [pair(example) for example in sample])


def _images(vault: Vault, client: int, server_round: int) -> dict[int, Tensor]:
    record = vault.record(client, server_round)
    if record is None:
        return {}
    return dict(zip(record.indices.tolist(), record.examples, strict=True))


def _address(image: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
