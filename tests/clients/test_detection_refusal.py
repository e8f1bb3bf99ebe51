"""Refusal is part of the federation: it shows in the report, and the server gets nothing."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedsim import cli
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts, check
from fedsim.registry import components
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
    (row,) = [line for line in html_rows(folder) if ">3</th>" in line]
    assert "structure/duplicate-rows 1" in row
    assert "refused: structure refused the model" in row


def test_behind_secure_aggregation_too(tmp_path: Path) -> None:
    channel = {"channel": "secagg(max_weight=2)"}
    report, folder = reported(tmp_path, {**IMPRINT, **channel, "defenses": REFUSING})
    assert not len(SavedViews(folder / "views"))
    assert "every client refused" in report["verdict"]


def test_behind_secure_aggregation_all_may_refuse_round_after_round(tmp_path: Path) -> None:
    changes = {"channel": "secagg(max_weight=2)", "federation.rounds": 3}
    report, _ = reported(tmp_path, {**IMPRINT, **changes, "defenses": REFUSING})
    assert "every client refused" in report["verdict"]
    assert [one["refused"] for one in report["federation"]["refusals"]] == [4, 4, 4]
    assert len(report["detection"]) == 12


def test_who_accepted_before_secure_aggregation_halted_is_not_said_to_refuse(
    tmp_path: Path,
) -> None:
    changes = {"attack": "none", "channel": "secagg(max_weight=2)", "defenses": "wary(clients=3)"}
    report, _ = reported(tmp_path, changes)
    assert report["failed"] is None
    assert "every client" not in report["verdict"]
    assert (
        "3 of 4 clients refused in round 1 and secure aggregation halted; nothing reached the "
        "server" in report["verdict"]
    )


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


def test_all_checks_are_run_before_any_decides(tmp_path: Path) -> None:
    chain = f"wary | {REFUSING} | self-audit(refuse_above=20.0)"
    report, _ = reported(tmp_path, {**IMPRINT, "defenses": chain})
    for one in report["detection"]:
        assert {"wary", "structure/duplicate-rows", "self-audit"} <= set(one["checks"])
        assert "wary refused the model: I would rather not; structure refused" in one["verdict"]


def test_what_a_check_cannot_decide_is_told(tmp_path: Path) -> None:
    changes = {"attack": "none", "defenses": "transmit-snr(refuse_above=1.0) | d-snr"}
    report, folder = reported(tmp_path, {**changes, "federation.local": "fedsgd(batch_size=1)"})
    said = "accepted; undecidable: transmit-snr, transmit-snr/anywhere; undecidable: d-snr"
    assert [one["verdict"] for one in report["detection"]] == [said] * 4
    assert all(one["checks"] == {} for one in report["detection"])
    assert said in html_rows(folder)[0]


@pytest.mark.parametrize(
    "defense",
    ["d-snr(refuse_above=1.0)", "row-d-snr(alone=0.5)", "gradient-concentration(refuse_above=0.7)"],
)
def test_a_limit_that_could_never_decide_is_refused(defense: str, tmp_path: Path) -> None:
    changes = {"defenses": defense, "federation.local": "fedsgd(batch_size=1)"}
    with pytest.raises(ScenarioError, match="every batch is of one"):
        check(Parts(scenario(tmp_path, changes)))
    check(Parts(scenario(tmp_path, {"defenses": defense})))
    name = defense.partition("(")[0]
    check(Parts(scenario(tmp_path, {**changes, "defenses": name})))  # to report is no promise


def test_checks_stand_before_what_changes_the_upload(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="look at what was received before the rest acts"):
        check(Parts(scenario(tmp_path, {"defenses": "clip | d-snr"})))


def test_a_refused_attack_is_told_with_what_it_used_and_sent(tmp_path: Path) -> None:
    report, folder = reported(tmp_path, {**IMPRINT, "defenses": REFUSING})
    assert {"surrogate", "basics", "manipulation"} <= set(report["threat_model"]["used"])
    attack = report["attack"]
    assert (attack["name"], attack["reconstruction"]) == ("robbing-the-fed", None)
    assert attack["parameters_added"] == attack["sent"]["parameters"] - 610 > 0
    page = (folder / "report.html").read_text()
    assert "The attack is <strong>robbing-the-fed</strong>" in page
    assert "Accuracy of the model that clients got" in page
    assert "Nothing: every client refused" in page


def test_an_error_that_only_sounds_like_a_refusal_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Wary):
        def inspect(self, *_: Any) -> Verdict:
            raise OSError("the disk refused the write")

    plug_in(monkeypatch, "defense", "broken", Broken)
    with pytest.raises(RunFailed, match="the disk refused the write"):
        reported(tmp_path, {"attack": "none", "defenses": "broken"})


# -- the update ------------------------------------------------------------------------------------

SPARSE: dict[str, Any] = {
    "threat-model": "G",
    "attack": "robbing-the-fed(units=128, variant='sparse')",
    "data.dataset": "photo-tiles",
    "data.partition": "size(partition_sizes=[16, 16])",
    "federation.clients": 2,
    "federation.local": "fedavg(batch_size=1, lr=0.05)",
}


def test_what_several_steps_give_away_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """The first batch is of one image, and harmless; the update holds more."""
    lax, _ = reported(tmp_path / "lax", {**SPARSE, "defenses": "self-audit"})
    assert lax["leak"]["leaked"] > 4
    shares = [one["checks"]["self-audit/images"] for one in lax["detection"]]
    assert sum(shares) * 16 >= lax["leak"]["leaked"]
    report, folder = reported(tmp_path / "strict", {**SPARSE, "defenses": "self-audit(images=0.1)"})
    assert not len(SavedViews(folder / "views"))
    assert "every client refused" in report["verdict"]
    said = "self-audit refused to send the update: self-audit/images above the limit"
    assert {f["reason"] for f in report["federation"]["failures"]} == {said}


def test_noise_before_sending_saves_an_image(tmp_path: Path) -> None:
    """Beside DP-SGD's noise (sigma 1 at clip 1) one image through a perceptron is nothing."""
    changes = {"attack": "none", "federation.local": "fedsgd(batch_size=1, lr=0.1)"}
    report, _ = reported(
        tmp_path / "bare", {**changes, "defenses": "self-audit(refuse_above=20.0)"}
    )
    assert "every client refused" in report["verdict"]
    chain = "self-audit(refuse_above=20.0) | clip(norm=1.0) | gaussian(std=1.0)"
    report, _ = reported(tmp_path / "noised", {**changes, "defenses": chain})
    assert not report["federation"]["failures"]
    assert all(one["checks"]["self-audit"] < 20 for one in report["detection"])


# -- odds and ends ---------------------------------------------------------------------------------


def test_every_check_looks_at_models_with_batchnorm_in_train_mode(tmp_path: Path) -> None:
    names = [
        name
        for name, made in components("defense").items()
        if ".detection." in made.__module__ and made.inspect is not Defense.inspect  # type: ignore[attr-defined]
    ]
    changes = {
        "attack": "none",
        "data.dataset": "photo-tiles",
        "data.partition": "size(partition_sizes=[4, 4])",
        "federation.clients": 2,
        "federation.local": "fedsgd(batch_size=4, lr=0.1)",
        "model.name": "resnet20(width=4)",
        "model.batchnorm": "shared",
        "defenses": " | ".join(name for name in names if name != "wary"),
    }
    report, _ = reported(tmp_path, changes)
    assert not report["federation"]["failures"]
    for one in report["detection"]:
        found = {check.partition("/")[0] for check in one["checks"]}
        assert {"d-snr", "structure", "activity", "transmit-snr"} <= found


def test_the_command_ends_well_where_all_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.toml"
    file.write_text(scenario(tmp_path, {"attack": "none", "defenses": "wary"}).to_toml())
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.strip().endswith("report.html")


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
    assert report["verdict"].endswith("made no attack. 4 of 4 clients refused in round 1.")


def test_those_who_do_not_refuse_are_attacked(tmp_path: Path) -> None:
    report, folder = reported(tmp_path, {**IMPRINT, "defenses": "wary(clients=3)"})
    assert [view.senders for view in SavedViews(folder / "views")] == [(3,)]
    assert {example["client"] for example in report["examples"]} == {3}
    assert report["verdict"].endswith(" 3 of 4 clients refused in round 1.")
    page = (folder / "report.html").read_text()
    assert "<li>round 1: 3 of 4 clients refused</li>" in page
    reasons = {failure["reason"] for failure in report["federation"]["failures"]}
    assert reasons == {"wary refused the model: I would rather not"}


def test_of_many_clients_the_page_shows_those_who_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Last(Wary):
        def inspect(self, model: nn.Module, received: Tensors, probe: Batch, ctx: Any) -> Verdict:
            return Verdict(ctx.client < 41, {"last": 0.0}, "I came last" * (ctx.client == 41))

    plug_in(monkeypatch, "defense", "last", Last)
    _, folder = reported(tmp_path, {"attack": "none", "federation.clients": 42, "defenses": "last"})
    rows = html_rows(folder)
    assert len(rows) == 40
    assert "I came last" in rows[0]


def html_rows(folder: Path) -> list[str]:
    """Return the rows of the page's table of what clients thought."""
    page = (folder / "report.html").read_text()
    table = page.partition('aria-label="Detection"')[2].partition("</table>")[0]
    return table.partition("<tbody>")[2].split("</tr>")[:-1]
