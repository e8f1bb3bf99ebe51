"""A reconstruction that is cut off: what it kept is found again, and Ctrl-C asks for the best."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim import cli
from fedsim.attack import Reconstruction
from fedsim.checkpoints import SavedCheckpoints, named
from fedsim.data import DataSpec
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.reconstructions import load
from fedsim.registry import register
from fedsim.resume import resume
from fedsim.run_folder import RunFolder
from fedsim.stopping import first_interrupt
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import (
    Watching,
    attack_by,
    federated,
    gray,
    latest,
    plug_in,
    scenario,
    told,
)

ROOT = Path(__file__).parents[2]
SAID = "finishing with the best so far; Ctrl-C again to end at once"


@dataclass(frozen=True, kw_only=True)
class Patient(Watching):
    """Counts, keeping the count; what it finds kept it takes up."""

    pace: float = 0.01
    steps: ClassVar[int] = 10_000

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        before = knowledge.kept("count")
        first = done = int(before["done"]) if before else len(views[0].received) * 0
        for done in range(first + 1, first + self.steps + 1):
            knowledge.keep("count", {"done": torch.tensor(done)})
            knowledge.progress(done, first + self.steps, "")
            time.sleep(self.pace)
        return gray(json.dumps([first, done]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ()


@dataclass(frozen=True, kw_only=True)
class Brief(Patient):
    """The same by its name, and done after one step."""

    steps = 1


def run_patient() -> None:
    """Be ``fedsim`` with the attack ``patient``, in a process of its own."""
    register("attack", "patient")(Patient)
    sys.argv[0] = "fedsim"
    cli.main()


def report_of(folder: RunFolder) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder.path / "report.json").read_text())
    return found


def checkpoints(folder: RunFolder) -> list[str]:
    root = folder.path / "checkpoints"
    return sorted(path.name for path in root.rglob("*.safetensors"))


# -- SIGKILL -----------------------------------------------------------------------------------


def killed(tmp_path: Path) -> RunFolder:
    """Run a patient attack and kill it, and the range, when it has kept something."""
    file = tmp_path / "scenario.toml"
    file.write_text(scenario(tmp_path / "runs", {"attack": "patient"}).to_toml())
    code = "from tests.fedsim.test_resuming import run_patient; run_patient()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/latest/checkpoints/*/count.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        process.kill()
        process.wait()
    return latest(tmp_path / "runs")


def counted(folder: RunFolder) -> list[int]:
    found: list[int] = told(folder)
    return found


@pytest.mark.slow
def test_a_killed_range_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed(tmp_path)
    plug_in(monkeypatch, "attack", "patient", Brief)
    (kept,) = (run.path / "checkpoints").glob("patient-*/count.safetensors")
    before = int(load_file(kept)["done"])
    assert before > 3
    assert not list(run.path.rglob("*.partial"))
    other = RunFolder(tmp_path / "other")
    shutil.copytree(run.path, other.path, symlinks=True)

    cli.attack(other.path, "patient")
    assert counted(RunFolder(other.path / "attacks" / "patient")) == [before, before + 1]
    assert not (other.path / "checkpoints").exists()

    cli.resume(run.path)
    assert counted(run) == [before, before + 1]
    assert not (run.path / "checkpoints").exists()
    found = report_of(run)
    assert found["stopped"] is None
    assert found["failed"] is None
    receipts = found["attack"]["receipts"]  # type: ignore[index]
    assert "went on from what an attempt before had kept after" in receipts[1]
    assert found["attack"]["seconds"] > 0.3  # type: ignore[index]
    with pytest.raises(ScenarioError, match=r"all is there already: .*report.html; fedsim report"):
        resume(run)


def test_a_killed_attack_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(views: Sequence[ServerView], knowledge: Knowledge) -> list[int]:
        before = knowledge.kept("count")
        if not before:
            knowledge.keep("count", {"done": torch.tensor([views[0].round, 41])})
            os.kill(os.getpid(), signal.SIGKILL)
        return [int(number) for number in before["done"]]

    with pytest.raises(RunFailed, match="was ended by SIGKILL"):
        run_inline(scenario(tmp_path, attack_by(monkeypatch, dies)), "a test")
    folder = latest(tmp_path)
    assert checkpoints(folder) == ["count.safetensors"]
    resume(folder)
    assert told(folder) == [1, 41]
    assert not (folder.path / "checkpoints").exists()
    assert report_of(folder)["failed"] is None


# -- Ctrl-C ------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_for_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    range_ = os.getpid()

    def look(views: Sequence[ServerView], knowledge: Knowledge) -> list[bool]:
        before = knowledge.stopping
        knowledge.keep("count", {"done": torch.tensor(1)})
        os.kill(range_, signal.SIGINT)
        for step in range(1000):
            knowledge.progress(step, 1000, "")
            if knowledge.stopping:
                knowledge.kept("count")  # a question still has its answer
                return [before, knowledge.stopping]
            time.sleep(0.02)
        return [before, False]

    page = run_inline(scenario(tmp_path, attack_by(monkeypatch, look)), "a test")
    folder = latest(tmp_path)
    assert told(folder) == [False, True]
    assert page.exists()
    assert not checkpoints(folder)
    assert SAID in capfd.readouterr().err
    receipts = report_of(folder)["attack"]["receipts"]  # type: ignore[index]
    assert receipts[-1].startswith("Ctrl-C asked for the best so far")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_ends_it_and_what_was_kept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    range_ = os.getpid()

    def deaf(views: Sequence[ServerView], knowledge: Knowledge) -> int:
        before = knowledge.kept("count")
        if before:
            return int(before["done"])
        knowledge.keep("count", {"done": torch.tensor(5)})
        os.kill(range_, signal.SIGINT)
        while not knowledge.stopping:
            time.sleep(0.02)
        os.kill(range_, signal.SIGINT)
        while True:
            time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        run_inline(scenario(tmp_path, attack_by(monkeypatch, deaf)), "a test")
    folder = latest(tmp_path)
    said = capfd.readouterr().err
    assert SAID in said
    assert f"interrupted; what was saved stays in {folder.path}" in said
    assert checkpoints(folder) == ["count.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(folder)
    assert told(folder) == 5


def test_interrupts_are_taken_only_in_the_main_thread_and_from_python() -> None:
    heard: list[str] = []
    with first_interrupt(lambda: heard.append("one")):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert heard == ["one"]

    def elsewhere() -> None:
        with first_interrupt(lambda: None):
            heard.append(str(signal.getsignal(signal.SIGINT) is signal.default_int_handler))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard[1:] == ["True"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with first_interrupt(lambda: None):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# -- what is kept ------------------------------------------------------------------------------


def knowledge(folder: Path, changes: dict[str, object] | None = None) -> Knowledge:
    spec = DataSpec((1, 8, 8), 10, (0.5,), (0.5,))
    wanted = scenario(folder, {"attack": "patient", "threat-model": "B", **(changes or {})})
    return Knowledge(
        wanted.threat_model,
        data=spec,
        training=None,
        seed=3,
        device=torch.device("cpu"),
        num_examples={"round-1-client-0": 2},
        checkpoints=SavedCheckpoints(folder, "patient", wanted),
    )


BAD_NAMES = ["", "../count", "a/b", ".hidden", "Count", "ä", "x" * 101, "a\n", "-a", "a b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_one_of_a_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no name for a checkpoint; write up to 100"):
        knowledge(tmp_path).keep(name, {})
    with pytest.raises(ValueError, match="is no name for a checkpoint"):
        knowledge(tmp_path).kept(name)
    assert named("round-1-client-0.restart_3") == "round-1-client-0.restart_3"


def test_what_an_attempt_had_used_counts_and_what_it_keeps_is_a_copy(tmp_path: Path) -> None:
    one, tensor = knowledge(tmp_path), torch.arange(6.0).view(2, 3)
    assert one.kept("count") == {}
    one.require(Capability.UPDATES)
    assert one.basics
    one.keep("count", {"turned": tensor.t(), "same": tensor})
    tensor += 1
    other = knowledge(tmp_path)
    assert not other.used
    found = other.kept("count")
    assert torch.equal(found["turned"], torch.arange(6.0).view(2, 3).t())
    assert other.used == {Capability.UPDATES, Capability.BASICS}
    one.keep("count", {"same": tensor})
    assert list(other.kept("count")) == ["same"]
    other.forget()
    assert not (tmp_path / "checkpoints").exists()
    assert one.kept("count") == {}


OTHERS: dict[str, dict[str, object]] = {
    "expression": {"attack": "patient(pace=0.1)"},
    "threat model": {"threat-model": "D"},
    "oracle": {"oracles": "labels"},
    "seed": {"seed": 8},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_attack_finds_nothing(other: str, tmp_path: Path) -> None:
    knowledge(tmp_path).keep("count", {"done": torch.tensor(1)})
    assert knowledge(tmp_path, OTHERS[other]).kept("count") == {}
    same = {"attack": "patient ", "title": "another", "audit.criterion": "psnr>=30"}
    assert knowledge(tmp_path, same).kept("count")


@pytest.mark.parametrize("file", ["round-1-client-0", "sent-0123", "round-2-client-0"])
def test_on_changed_views_nothing_is_found(file: str, tmp_path: Path) -> None:
    views = tmp_path / "views"
    views.mkdir()
    for name in ("round-1-client-0", "sent-0123"):
        save_file({"w": torch.zeros(2)}, views / f"{name}.safetensors")
    knowledge(tmp_path).keep("count", {"done": torch.tensor(1)})
    assert knowledge(tmp_path).kept("count")
    save_file({"w": torch.ones(2)}, views / f"{file}.safetensors")
    assert knowledge(tmp_path).kept("count") == {}


def test_a_damaged_checkpoint_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = knowledge(tmp_path)
    one.keep("count", {"done": torch.tensor(1)})
    (path,) = tmp_path.glob("checkpoints/*/count.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    assert knowledge(tmp_path).kept("count") == {}
    assert f"{path} is damaged (" in capsys.readouterr().err


def test_in_memory_it_is_kept_and_found_too() -> None:
    spec = DataSpec((1, 8, 8), 10, (0.5,), (0.5,))
    plain = Knowledge("A", data=spec, training=None, seed=3, device=torch.device("cpu"))
    tensor = torch.zeros(2)
    plain.keep("count", {"done": tensor})
    tensor += 1
    assert torch.equal(plain.kept("count")["done"], torch.zeros(2))
    assert not plain.stopping
    inner = plain.about({})
    plain.stop()
    assert inner.stopping


def test_what_a_cheat_kept_is_not_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheat(views: Sequence[ServerView], knowledge: Knowledge) -> None:
        knowledge.keep("before", {"done": torch.tensor(1)})
        try:
            (tmp_path / "latest" / "scenario.toml").read_text()
        except PermissionError:
            knowledge.keep("after", {"done": torch.tensor(1)})
        raise ArithmeticError

    with pytest.raises(RunFailed, match="nothing it made may be believed"):
        federated(tmp_path, attack_by(monkeypatch, cheat))
    assert not checkpoints(latest(tmp_path))


def test_rubbish_over_the_line_fails_the_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sly(views: Sequence[ServerView], knowledge: Knowledge) -> None:
        line = knowledge._line  # type: ignore[attr-defined]
        line.tell("keep", b"no safetensors", name="count")
        knowledge.kept("count")

    def slier(views: Sequence[ServerView], knowledge: Knowledge) -> None:
        line = knowledge._line  # type: ignore[attr-defined]
        line.tell("keep", b"", name="../../views/round-1-client-0")
        knowledge.kept("count")

    deeds: dict[Callable[..., None], str] = {sly: "", slier: "is no name for a checkpoint"}
    for deed, said in deeds.items():
        with pytest.raises(RunFailed, match=f"kept what cannot be read: .*{said}"):
            federated(tmp_path, attack_by(monkeypatch, deed))
        assert not checkpoints(latest(tmp_path))


# -- resume ------------------------------------------------------------------------------------


def test_resume_refuses_where_there_is_nothing_to_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scenario(tmp_path, {"attack": "linear-inversion"})
    page = run_inline(wanted, "a test")
    folder = latest(tmp_path)
    with pytest.raises(ScenarioError, match="all is there already"):
        resume(folder)
    page.unlink()  # the report was cut off
    before = (folder.path / "events.jsonl").read_text().count('"reconstructed"')
    assert resume(folder) == page
    assert (folder.path / "events.jsonl").read_text().count('"reconstructed"') == before
    cli.attack(folder.path, "linear-inversion(layer='1')")
    (inner,) = (folder.path / "attacks").iterdir()
    with pytest.raises(ScenarioError, match="repeat it, and it goes on where it was: fedsim att"):
        resume(RunFolder(inner))
    events = (folder.path / "events.jsonl").read_text().splitlines()
    short = [line for line in events if '"federated"' not in line]
    (folder.path / "events.jsonl").write_text("\n".join(short) + "\n")
    with pytest.raises(ScenarioError, match=r"federation did not finish.*run it anew: fedsim run"):
        resume(folder)


def test_resume_without_an_attack_writes_the_report(tmp_path: Path) -> None:
    run_inline(scenario(tmp_path, {"attack": "none", "threat-model": "B"}), "a test")
    folder = latest(tmp_path)
    (folder.path / "report.json").unlink()
    assert resume(folder).exists()


def test_a_reconstruction_is_read_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps nothing gets no receipt of the range's."""
    ran = federated(tmp_path, attack_by(monkeypatch, lambda views, knowledge: 1))
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    assert load(path)[0].receipts == ("1",)
