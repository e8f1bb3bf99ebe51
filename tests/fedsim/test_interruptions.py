"""A full disk, a folder taken away, Ctrl-C or SIGKILL: what was saved stays, and can be used."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import cli, files
from fedsim.attack import Reconstruction
from fedsim.audit.verdict import judge
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed
from fedsim.reconstructions import slug
from fedsim.run import write_report
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario
from fedsim.stopping import stop
from fedsim.view import SavedViews
from tests.fedsim.small import Instead, federated, gray, latest, plug_in, scenario, watching

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> str:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: list(views)))
    return "watching"


# -- the disk ----------------------------------------------------------------------------------


def assert_readable(folder: Path) -> None:
    assert Scenario.load(folder / "scenario.toml").title == "small"
    for name in ("environment.json", "federation.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    for view in SavedViews(folder / "views"):
        assert view.received


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_run_in_plain_words_and_harms_nothing(
    attack: str, tiny_disk: Path
) -> None:
    wanted = scenario(tiny_disk, {"attack": attack, "federation.rounds": 1000})
    with pytest.raises(RunFailed, match=r"could not write \(No space left on device: .*small") as e:
        run_inline(wanted, "a test")
    assert "what was saved before stays readable in" in str(e.value)
    folder = latest(tiny_disk).path
    assert_readable(folder)
    assert len(SavedViews(folder / "views")) > 4


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_whichever_write_fails_the_message_is_plain(
    after: int, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, count = files.write_atomically, []

    def write(path: Path, content: bytes | str) -> None:
        count.append(path)
        if len(count) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        honest(path, content)

    for module in ("files", "view", "run_folder", "reconstructions", "report"):
        monkeypatch.setattr(f"fedsim.{module}.write_atomically", write)
    with pytest.raises(RunFailed, match=r"could not write \(No space left on device"):
        run_inline(scenario(tmp_path, {"attack": attack}), "a test")
    folder = next(tmp_path.glob("*-small-*"))
    assert not list(folder.rglob("*.partial"))
    if after:
        assert_readable(folder)


def test_a_folder_taken_away_ends_the_run_in_plain_words(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(folder: RunFolder, name: str, **_: Any) -> None:
        shutil.rmtree(folder.path)
        (folder.path / "events.jsonl").open("a")

    monkeypatch.setattr(RunFolder, "gather_vault", lambda folder: vanish(folder, "gone"))
    with pytest.raises(RunFailed, match=r"could not write \(No such file or directory"):
        run_inline(scenario(tmp_path, {"attack": attack}), "a test")


# -- signals -----------------------------------------------------------------------------------


def start(folder: Path) -> "subprocess.Popen[str]":
    code = "import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
    file = folder.parent / "scenario.toml"
    endless = {"attack": "linear-inversion", "federation.rounds": 100_000}
    file.write_text(scenario(folder, endless).to_toml())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(file)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_folder_of(process: "subprocess.Popen[str]", rounds: int) -> Path:
    """Wait until a run has done some rounds."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("run folder: "):
        assert line, "it ended before it began"
    folder = Path(line.removeprefix("run folder: ").strip())
    deadline = time.monotonic() + 60
    while (folder / "events.jsonl").read_text().count('"event": "round"') < rounds:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return folder


def test_interrupted_and_killed_runs_keep_what_they_had(tmp_path: Path) -> None:
    """Two runs at once into one folder; one gets Ctrl-C, the other SIGKILL."""
    processes = start(tmp_path / "runs"), start(tmp_path / "runs")
    try:
        folders = [run_folder_of(process, rounds=3) for process in processes]
        processes[0].send_signal(signal.SIGINT)
        processes[1].kill()
        said = processes[0].communicate(timeout=60)[1]
        processes[1].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 130
    assert f"interrupted; what was saved stays in {folders[0]}" in said
    assert "Traceback" not in said
    assert processes[1].returncode == -signal.SIGKILL
    assert folders[0] != folders[1]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "latest", folders[0].name, folders[1].name,
    }  # fmt: skip
    for folder in folders:
        assert_readable(folder)
        assert len(SavedViews(folder / "views")) >= 12
        assert "stopped after round" in str(judge(folder).stopped)
        cli.report(folder)
        cli.attack(folder, "linear-inversion(layer='1')")
        again = folder / "attacks" / slug("linear-inversion(layer='1')")
        page = json.loads((again / "report.json").read_text())
        assert page["attack"]["expression"] == "linear-inversion(layer='1')"
        # Not even SIGKILL leaves uploads behind that no view shows, as those of a baseline.
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_an_attack_that_fails_leaves_a_run_that_can_be_attacked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(views: object, knowledge: object) -> None:
        raise ArithmeticError("the attack's own mistake")

    plug_in(monkeypatch, "attack", "failing", watching(fails))
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: list(views)))
    with pytest.raises(RunFailed, match="failing failed with ArithmeticError: the attack's own"):
        run_inline(scenario(tmp_path, {"attack": "failing"}), "a test")
    assert "in fails\n" in capsys.readouterr().err
    folder = latest(tmp_path)
    assert "stopped before its attack was done" in str(judge(folder.path).stopped)
    cli.attack(folder.path, "watching")
    assert write_report(folder).is_file()


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "returned NoneType, not a Reconstruction"),
    "a wrong shape": (Reconstruction(gray().examples[0], gray().views), r"must be \[M, C, H, W\]"),
    "a view too many": (Reconstruction(gray().examples, gray().views + 9), "views outside"),
    "views that are no numbers of views": (
        Reconstruction(gray().examples, gray().views.double()),
        "views must be integers, not torch.float64",
    ),
    "labels too many": (
        Reconstruction(gray().examples, gray().views, gray().views.repeat(2)),
        r"labels must be \[1\]",
    ),
}


@pytest.mark.parametrize("returned", BAD)
def test_an_attack_that_returns_rubbish_fails_the_run_in_plain_words(
    returned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, said = BAD[returned]
    plug_in(monkeypatch, "attack", "rubbish", watching(lambda v, k: Instead(result)))
    with pytest.raises(RunFailed, match=f"rubbish.*{said}"):
        federated(tmp_path, {"attack": "rubbish"})
    assert not list((latest(tmp_path).path / "reconstructions").glob("*"))


def test_a_thread_is_ended_in_the_middle_of_its_work() -> None:
    ended = []

    def work() -> None:
        with contextlib.suppress(SystemExit):
            try:
                while True:
                    torch.ones(10).sum()
            finally:
                ended.append("tidied up")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert stop(thread)
    assert ended == ["tidied up"]
    assert stop(thread)
    assert stop(threading.Thread(target=work))


def test_a_thread_that_waits_is_not_waited_for() -> None:
    event = threading.Event()

    def wait() -> None:
        with contextlib.suppress(SystemExit):
            event.wait()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not stop(thread, seconds=0.1)
    event.set()
    assert stop(thread)
