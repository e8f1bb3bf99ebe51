"""An attack's process: how it ends, what it may do, and that nothing of it stays."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.attack import Attack, Reconstruction
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.isolation import server, start
from fedsim.progress import Progress
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import (
    NOBODY,
    Instead,
    attack_by,
    federated,
    gray,
    latest,
    plug_in,
    scenario,
    told,
    watching,
)

ROOT = Path(__file__).parents[2]


def fault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(3)


def run_out() -> None:
    raise MemoryError("4 EiB are not there")


ENDS: dict[str, tuple[Callable[[], None], str]] = {
    "a fault in native code": (fault, "cheat's process was ended by SIGSEGV"),
    "no memory left": (run_out, "cheat failed with MemoryError: 4 EiB"),
    "leaving": (leave, "cheat's process ended with status 3, and handed nothing back"),
    "leaving politely": (lambda: sys.exit(), "cheat failed with SystemExit"),
    "a missing file": (lambda: Path("gone").unlink(), "failed with FileNotFoundError"),
}


@pytest.mark.parametrize("end", ENDS)
def test_however_an_attack_ends_the_run_fails_in_plain_words(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deed, said = ENDS[end]
    changes = attack_by(monkeypatch, lambda views, knowledge: deed())
    with pytest.raises(RunFailed, match=said):
        federated(tmp_path, changes)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_server_that_died_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = attack_by(monkeypatch, lambda v, k: [os.getppid(), tempfile.gettempdir()])
    first, scratch = told(federated(tmp_path / "first", changes))
    eventually(lambda: not Path(scratch).exists())
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not alive(first))
    assert told(federated(tmp_path / "second", changes))[0] != first


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_server_that_is_told_to_end_tidies_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(views: Sequence[ServerView], knowledge: Knowledge) -> None:
        knowledge.progress(1, 1, f"{os.getpid()} {os.getppid()} {tempfile.gettempdir()}")
        time.sleep(600)

    said: list[str] = []

    class Ending(Progress):
        def __call__(self, done: int, total: int, text: str = "") -> None:
            if text:
                said.extend(text.split())
                os.kill(int(said[1]), signal.SIGTERM)

    monkeypatch.setattr("fedsim.adversary.Progress", Ending)
    with pytest.raises(RunFailed, match="cheat's process"):
        federated(tmp_path, attack_by(monkeypatch, wait))
    eventually(lambda: not (alive(int(said[0])) or alive(int(said[1])) or Path(said[2]).exists()))


def eventually(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_several_threads_run_attacks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(views: Sequence[ServerView], knowledge: Knowledge) -> list[Any]:
        knowledge.progress(1, 1)
        return [os.getpid(), knowledge.generator("x").initial_seed(), len(list(views))]

    plug_in(monkeypatch, "attack", "cheat", watching(work))
    ran = [federated(tmp_path / str(n), {"seed": n, "attack": "cheat"}) for n in range(3)]
    alone = [told(one)[1] for one in ran]
    found: dict[int, list[Any]] = {}

    def again(n: int) -> None:
        from fedsim.adversary import reconstruct

        attack = ran[n].parts.attack
        assert attack is not None
        reconstruct(ran[n].parts, attack, ran[n].folder)
        found[n] = told(ran[n])

    threads = [threading.Thread(target=again, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n][1] for n in range(3)] == alone
    assert len({found[n][0] for n in range(3)}) == 3


def test_what_an_attack_prints_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    federated(tmp_path, attack_by(monkeypatch, lambda views, knowledge: print("looking at it")))
    assert "looking at it" in capfd.readouterr().out


def test_honest_work_goes_on_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(views: Sequence[ServerView], knowledge: Knowledge) -> list[Any]:
        import colorsys

        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import KMeans

        with tempfile.TemporaryDirectory() as folder:
            torch.save(torch.ones(3), Path(folder) / "own.pt")
            mine = torch.load(Path(folder) / "own.pt").tolist()
        KMeans(2, n_init=1, random_state=0).fit(np.random.default_rng(0).random((10, 2)))
        rows = linear_sum_assignment(np.eye(3))[0].tolist()
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        weight = torch.rand(4, 3, 3, 3, requires_grad=True)
        torch.nn.functional.conv2d(images, weight).sum().backward()
        thread = threading.Thread(target=lambda: rows.append(len(views[0].received)))
        thread.start()
        thread.join()
        return [mine, colorsys.rgb_to_hsv(0, 0, 1)[2], rows, torch.get_num_threads()]

    mine, blue, rows, threads = told(federated(tmp_path, attack_by(monkeypatch, work)))
    assert (mine, blue, rows) == ([1.0] * 3, 1, [0, 1, 2, 4])
    assert threads == 1  # as the scenario says


def test_where_nothing_can_be_forked_a_fresh_interpreter_attacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, and wherever an attack computes with CUDA."""

    def work(views: Sequence[ServerView], knowledge: Knowledge) -> list[Any]:
        # What children are forked from has loaded this for all of them.
        return ["torch._dynamo" not in sys.modules, len(list(views))]

    assert told(federated(tmp_path / "forked", attack_by(monkeypatch, work))) == [False, 4]
    monkeypatch.setattr(server, "way", lambda device: server.SPAWN)
    assert told(federated(tmp_path / "fresh", attack_by(monkeypatch, work))) == [True, 4]
    changes = attack_by(monkeypatch, lambda v, k: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunFailed, match="was ended by SIGKILL, as the system does"):
        federated(tmp_path, changes)


@pytest.mark.slow
def test_torch_compile_works_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(views: Sequence[ServerView], knowledge: Knowledge) -> list[float]:
        return torch.compile(lambda x: (x * 2).sin())(torch.ones(3)).tolist()

    found = told(federated(tmp_path, attack_by(monkeypatch, work)))
    assert torch.allclose(torch.tensor(found), torch.full((3,), 2.0).sin())


@dataclass(frozen=True, kw_only=True)
class Local(Attack):
    paper = NOBODY
    needs = frozenset()

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        return gray()


def test_an_attack_that_nobody_can_import_is_refused_before_anybody_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner(Local):
        pass

    plug_in(monkeypatch, "attack", "inner", Inner)
    with pytest.raises(ScenarioError, match="define it at the top level of a module"):
        run_inline(scenario(tmp_path, {"attack": "inner"}), "a test")
    assert not (latest(tmp_path).path / "views").exists()
    plug_in(monkeypatch, "attack", "local", Local)
    assert federated(tmp_path, {"attack": "local"}).folder.path.joinpath("reconstructions").exists()


def test_what_comes_back_is_tensors_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = torch.zeros(1, dtype=torch.int64)
    for returned in (Reconstruction(np.zeros((1, 1, 8, 8)), views),  # type: ignore[arg-type]
                     Reconstruction(gray().examples, views, receipts=(ctypes.c_int,))):  # type: ignore[arg-type]  # fmt: skip
        changes = attack_by(monkeypatch, lambda v, k, returned=returned: Instead(returned))
        with pytest.raises(RunFailed, match="cheat failed with"):
            federated(tmp_path, changes)


SLOW = """
import sys, time
from pathlib import Path
from fedsim.engines.inline import run_inline
from tests.fedsim.small import scenario
from tests.fedsim.test_attack_lifecycle import Patient
from fedsim import registry
registry.register("attack", "patient")(Patient)
run_inline(scenario(Path(sys.argv[1]), {"attack": "patient"}), "a test")
"""


@dataclass(frozen=True, kw_only=True)
class Patient(Local):
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        print(f"child {os.getpid()} of {os.getppid()} in {tempfile.gettempdir()}", flush=True)
        while True:
            time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "by",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_the_range(by: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("child "))
        words = line.split()
        child, server, scratch = int(words[1]), int(words[3]), Path(words[5])
        assert alive(child)
        assert scratch.is_dir()
        process.send_signal(by)
        process.stdout.read()
    eventually(lambda: not (alive(child) or alive(server) or scratch.exists()))


def test_views_come_over_as_they_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(views: Sequence[ServerView], knowledge: Knowledge) -> list[Any]:
        return [{name: t.tolist() for name, t in view.received.items()} for view in views]

    plug_in(monkeypatch, "attack", "cheat", watching(digest))
    ran = federated(tmp_path, {"attack": "cheat"})
    for view, theirs in zip(ran.views, told(ran), strict=True):
        assert all(torch.equal(t, Tensor(theirs[name])) for name, t in view.received.items())


def test_the_server_starts_without_the_ranges_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "00" * 32)
    assert not [name for name in start._environment() if name.startswith("FEDSIM_")]
