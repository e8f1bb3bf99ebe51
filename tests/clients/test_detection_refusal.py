"""Refusal is part of the federation: it shows in the report, and the server gets nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.engines.inline import run_inline
from fedsim.view import SavedViews
from tests.fedsim.small import plug_in, scenario

IMPRINT = {"threat-model": "G", "attack": "robbing-the-fed(units=8)"}
REFUSING = "structure(duplicate_rows=0.05)"


def reported(folder: Path, changes: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    page = run_inline(scenario(folder, changes), "a test")
    report: dict[str, Any] = json.loads(page.with_suffix(".json").read_text())
    return report, page.parent


@dataclass(frozen=True, kw_only=True)
class Wary(Defense):
    """Refuses in some rounds, at some clients."""

    rounds: int = 1
    clients: int = 99
    changes_upload = False

    def inspect(
        self, model: nn.Module, received: Tensors, probe: Batch, ctx: ClientContext
    ) -> Verdict:
        refuses = ctx.round <= self.rounds and ctx.client < self.clients
        return Verdict(not refuses, {"wary": float(refuses)}, "I would rather not")


@pytest.fixture(autouse=True)
def _wary(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "defense", "wary", Wary)


def test_where_all_refuse_the_server_learns_nothing(tmp_path: Path) -> None:
    report, folder = reported(tmp_path, {**IMPRINT, "defenses": REFUSING})
    assert not len(SavedViews(folder / "views"))
    assert not list((folder / "reconstructions").glob("*"))
    assert report["failed"] is None
    assert report["stopped"] is None
    assert report["leak"] is None
    assert "every client refused" in report["verdict"]
    assert "the server could read nothing" in report["verdict"]
    assert report["federation"]["accuracy"]["before"] == report["federation"]["accuracy"]["after"]
    assert [one["client"] for one in report["detection"]] == [0, 1, 2, 3]
    for one in report["detection"]:
        assert one["verdict"].startswith("refused: structure refused the model: structure/dup")
        assert one["checks"]["structure/duplicate-rows"] == 1
    assert "refused" in (folder / "report.html").read_text()


def test_behind_secure_aggregation_too(tmp_path: Path) -> None:
    channel = {"channel": "secagg(max_weight=2)"}
    report, folder = reported(tmp_path, {**IMPRINT, **channel, "defenses": REFUSING})
    assert not len(SavedViews(folder / "views"))
    assert "every client refused" in report["verdict"]


def test_other_defenses_that_never_came_to_act_are_no_failure(tmp_path: Path) -> None:
    report, _ = reported(tmp_path, {**IMPRINT, "defenses": f"{REFUSING} | clip(norm=1.0)"})
    assert report["failed"] is None


def test_the_reply_to_the_server_holds_no_score(tmp_path: Path) -> None:
    report, _ = reported(tmp_path, {**IMPRINT, "defenses": "self-audit(refuse_above=20.0)"})
    score = report["detection"][0]["checks"]["self-audit"]
    assert score > 20
    for failure in report["federation"]["failures"]:
        assert f"{score:.1f}" not in failure["reason"]
        assert failure["reason"].endswith("self-audit above the limit")


def test_an_honest_model_is_not_refused(tmp_path: Path) -> None:
    report, _ = reported(tmp_path, {"attack": "none", "defenses": REFUSING})
    assert {one["verdict"] for one in report["detection"]} == {"accepted"}
    assert not report["federation"]["failures"]


def test_a_false_alarm_of_all_clients_ends_an_honest_run_in_peace(tmp_path: Path) -> None:
    report, _ = reported(tmp_path, {"attack": "none", "defenses": "wary"})
    assert report["failed"] is None
    assert "every client refused" in report["verdict"]


def test_a_refused_round_costs_that_round_only(tmp_path: Path) -> None:
    changes = {"attack": "none", "defenses": "wary", "federation.rounds": 3}
    report, _ = reported(tmp_path, changes)
    verdicts = {(d["round"], d["client"]): d["verdict"] for d in report["detection"]}
    assert all(v.startswith("refused") == (round == 1) for (round, _), v in verdicts.items())
    assert report["federation"]["rounds_done"] == 3
    assert len(report["federation"]["failures"]) == 4


def test_those_who_do_not_refuse_are_attacked(tmp_path: Path) -> None:
    report, folder = reported(tmp_path, {**IMPRINT, "defenses": "wary(clients=3)"})
    assert [view.senders for view in SavedViews(folder / "views")] == [(3,)]
    assert {example["client"] for example in report["examples"]} == {3}
