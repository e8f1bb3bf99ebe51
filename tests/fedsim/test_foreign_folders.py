"""A run folder from elsewhere is data: it moves nothing, and damage is told in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim import seeds
from fedsim.adversary import reconstruct
from fedsim.audit.vault import move
from fedsim.audit.verdict import judge
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts
from fedsim.run import write_report
from fedsim.run_folder import RunFolder
from tests.fedsim.small import scenario


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_inline(scenario(tmp_path, {"attack": "linear-inversion"}), "a test").parent


def changed(run: Path, name: str, **facts: object) -> None:
    told = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({**told, **facts}))


@pytest.mark.parametrize("outside", ["absolute", "relative"])
def test_a_run_id_that_is_a_path_moves_nothing(run: Path, tmp_path: Path, outside: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file.txt").write_text("keep me")
    (seeds.home() / "vaults").mkdir(parents=True, exist_ok=True)
    climb = "../" * len((seeds.home() / "vaults").parts)
    named = str(victim) if outside == "absolute" else climb + str(victim)[1:]
    changed(run, "environment.json", run_id=named)
    with pytest.raises(RunFailed, match=r"environment.json is damaged: run_id: .*integer"):
        RunFolder.open(run).gather_vault()
    assert (victim / "file.txt").read_text() == "keep me"


def test_only_deposits_are_brought_home_and_no_link_is_followed(run: Path, tmp_path: Path) -> None:
    sealed = next((run / "vault").glob("client-*/round-*.sealed"))
    left = tmp_path / "left"
    (left / sealed.parent.name).mkdir(parents=True)
    (left / sealed.parent.name / sealed.name).write_bytes(sealed.read_bytes())
    (left / "file.txt").write_text("not a deposit")
    link = tmp_path / "link"
    link.symlink_to(left)
    into = tmp_path / "vault"
    move(link, into)
    assert not into.exists()
    move(left, into)
    assert [p.name for p in into.rglob("*") if p.is_file()] == [sealed.name]
    assert into.stat().st_mode & 0o777 == 0o700
    assert not left.exists()


def gathered(folder: RunFolder) -> None:
    folder.gather_vault()
    write_report(folder)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no environment": ("environment.json", Path.unlink, "is missing"),
    "no JSON": ("environment.json", lambda p: p.write_text("x"), "environment.json is damaged"),
    "rounds in words": (
        "federation.json",
        lambda p: p.write_text('{"rounds": "x", "rounds_done": 3}'),
        "federation.json is damaged: rounds: Input should be a valid integer",
    ),
}


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_told_in_one_sentence(
    run: Path, name: str, damage: Callable[[Path], object], told: str
) -> None:
    damage(run / name)
    folder = RunFolder.open(run)
    with pytest.raises(RunFailed, match=told):
        gathered(folder)


def test_a_report_without_environment_is_still_written(run: Path) -> None:
    changed(run, "environment.json")
    (run / "environment.json").write_text("{}")
    RunFolder.open(run).gather_vault()
    assert judge(run).environment == {}


def test_a_view_that_is_none_is_named(run: Path) -> None:
    view = next((run / "views").glob("round-*"))
    view.write_bytes(b"\x80\x04garbage")
    folder = RunFolder.open(run)
    parts = Parts(folder.scenario)
    assert parts.attack is not None
    with pytest.raises(ScenarioError, match=f"{view.name}.*not a readable view"):
        reconstruct(parts, parts.attack, folder)
