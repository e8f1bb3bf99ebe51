"""The attack that a defense or a channel names as the one that knows of it can act on it."""

from pathlib import Path
from typing import Any

import pytest

from fedsim import registry
from fedsim.parts import Parts, check
from tests.benchmarks.defense_rows import Row, against, rows
from tests.fedsim.small import scenario

NAMED = [row for row in rows() if row.adversary]
#: What a defense asks for.
ASKED: dict[str, dict[str, Any]] = {
    "distributed-dp": {"federation.clients": 8},
    "dropout": {"model.batchnorm": "private"},
    "lr-perturbation": {"federation.local": "fedavg(epochs=3, batch_size=1, lr=0.01)"},
}


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_it_passes_every_check_against_the_middle_strength(tmp_path: Path, row: Row) -> None:
    manipulates, keys = against(row)
    changes = {
        "data.dataset": "photo-tiles",
        "model.name": "convnet(stride=2)",
        "federation.local": f"fedsgd(batch_size={8 if manipulates else 1}, lr=0.1)",
        **row.keys,
        **keys,
    }
    check(Parts(scenario(tmp_path, {**changes, **ASKED.get(row.name, {})})))


@pytest.mark.parametrize("kind", ["defense", "channel"])
def test_everything_names_one_but_detectors(kind: str) -> None:
    """What a detector lets pass is its own table: docs/detection.md."""
    components = registry.components(kind).items()
    unnamed = [n for n, made in components if not made.adversary]  # type: ignore[attr-defined]
    assert [n for n in unnamed if n != "plain" and n not in DETECTORS] == []


DETECTORS = {
    name
    for name, made in registry.components("defense").items()
    if ".detection." in made.__module__
}
