"""The attack that a defense or a channel names as the one that knows of it can act on it."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedsim import registry
from fedsim.parts import Parts, check
from tests.benchmarks.defense_rows import COMBINATIONS, Row, against, rows, settled
from tests.fedsim.small import scenario

NAMED = [row for row in rows() if row.adversary]
#: What a defense asks for.
ASKED: dict[str, dict[str, Any]] = {
    "distributed-dp": {"federation.clients": 8},
    "dropout": {"model.batchnorm": "private"},
    "fedkl": {"model.batchnorm": "private"},
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
    } | ASKED.get(row.name, {})
    if any(word in row.adversary for word in ("rounds=True", "accumulation")):  # of the same images
        sizes = [1] * changes.get("federation.clients", 4)
        changes["data.partition"] = f"size(partition_sizes={sizes})"
    check(Parts(scenario(tmp_path, changes)))


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: row.expression)
def test_combinations_of_the_table_are_chains(tmp_path: Path, row: Row) -> None:
    local = {"federation.local": "fedsgd(batch_size=8, lr=0.1)"}
    check(Parts(scenario(tmp_path, {"data.dataset": "photo-tiles", **local, **row.keys})))


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


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (
            "attack 'linear-inversion' returned no candidate (report: /a/b/report.html)",
            {"leak": None, "nothing": "attack 'linear-inversion' returned no candidate"},
        ),
        (
            "no round had a usable reply: its upload is over the L2 and the Linf bound; "
            "its upload is over the L2 bound",
            {"leak": None, "nothing": "every upload was turned away"},
        ),
        (
            "defense 'clip' is switched on and changed 0/80 uploads (report: /a/b/report.html)",
            {"refused": "defense 'clip' is switched on and changed 0/80 uploads"},
        ),
        ("no round had a usable reply: its upload is over the L2 bound; timed out", None),
        ("no round had a usable reply: no reply at all", None),
        ("bayes's process was killed", None),
    ],
)
def test_a_benchmark_keeps_what_is_an_outcome_and_no_other_failure(
    error: str, report: dict[str, Any] | None
) -> None:
    assert settled(error) == report
    assert settled(f"failed: {error}") == report  # as older cells have it


def test_an_attack_that_got_nothing_is_not_tried_in_other_federations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    table = importlib.import_module("defense_table")
    flat = {"title": "ratio", "attack": "linear-inversion"}
    written = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]
    kept = {"refused": "failed: attack 'x' returned no candidate (report: /a/report.html)"}
    (tmp_path / f"ratio-{written}.json").write_text(json.dumps(kept))
    report, note = table.varied(flat, tmp_path, "a test", finished=True)
    assert (report["leak"], note) == (None, "")
    assert report["nothing"] == "attack 'x' returned no candidate"
