# ruff: noqa: PTH104, PTH123, PTH207, PTH208, SIM115
"""Every way to cheat that we could think of fails while attack code runs."""

import ctypes
import gc
import glob
import importlib.metadata
import inspect
import mmap
import multiprocessing
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pyarrow
import pytest
import torch
from safetensors import safe_open
from torchvision.io import read_file

from fedsim import seeds
from fedsim.audit import sealing
from fedsim.audit.guard import Cell, run_sealed, sealed
from fedsim.audit.landlock import restrict
from fedsim.audit.vault import Vault, VaultRecord, deposit


@pytest.fixture
def vault(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDSIM_SECRET_KEY", raising=False)
    seeds.secret_key()
    count = 3
    images = torch.rand(count, 1, 8, 8)
    deposit(tmp_path / "vault", VaultRecord(1, 1, images, torch.arange(3), torch.arange(3)))
    return tmp_path / "vault"


def through_folder_handle(vault):
    handle = os.open(vault.parent, os.O_RDONLY)
    return os.open("vault/client-1/round-1.sealed", os.O_RDONLY, dir_fd=handle)


def through_symlink(vault):
    link = vault.parent / "link"
    link.symlink_to(vault)
    return (link / "client-1/round-1.sealed").read_bytes()


def through_working_folder(vault):
    before = pathlib.Path.cwd()
    os.chdir(vault.parent)
    try:
        return pathlib.Path("vault/client-1/round-1.sealed").read_bytes()
    finally:
        os.chdir(before)


FILE = "client-1/round-1.sealed"
LOOKS = {
    "open": lambda vault: (vault / FILE).open("rb"),
    "read_bytes": lambda vault: (vault / FILE).read_bytes(),
    "os.open": lambda vault: os.open(vault / FILE, os.O_RDONLY),
    "bytes path": lambda vault: open(os.fsencode(vault / FILE), "rb"),
    "dotted path": lambda vault: open(f"{vault}/../vault/client-1/../{FILE}", "rb"),
    "proc root": lambda vault: open(f"/proc/self/root{vault}/{FILE}", "rb"),
    "folder handle": through_folder_handle,
    "symlink": through_symlink,
    "working folder": through_working_folder,
    "listdir": os.listdir,
    "scandir": os.scandir,
    "iterdir": lambda vault: list((vault / "client-1").iterdir()),
    "rename": lambda vault: os.rename(vault, vault.parent / "mine"),
    "hard link": lambda vault: os.link(vault / FILE, vault.parent / "mine"),
    "copy": lambda vault: shutil.copy(vault / FILE, vault.parent / "mine"),
    "numpy": lambda vault: np.fromfile(vault / FILE, dtype=np.uint8),
    "torch.load": lambda vault: torch.load(vault / FILE),
    "chmod": lambda vault: (vault / FILE).chmod(0o777),
    "delete": lambda vault: (vault / FILE).unlink(),
    "auditor's door": lambda vault: Vault(vault).record(1, 1),
    "auditor's key": lambda vault: sealing.private_key(),
    "auditor's key file": lambda vault: sealing.key_path().read_bytes(),
    "secret stream": lambda vault: seeds.secret_generator(7, "noise"),
    "memory file": lambda vault: open("/proc/self/mem", "rb"),
    "environment file": lambda vault: open("/proc/self/environ", "rb"),
    "all objects": lambda vault: gc.get_objects(),
    "referrers": lambda vault: gc.get_referrers(vault),
    "referents": lambda vault: gc.get_referents(vault),
    "frames": lambda vault: sys._current_frames(),
    "private event": lambda vault: sys.audit("fedsim.private", "the data set"),
}
WAYS_OUT = {
    "subprocess": lambda vault: subprocess.run(["cat", vault / FILE], check=True),
    "os.system": lambda vault: os.system("true"),
    "popen": lambda vault: os.popen("true"),
    "fork": lambda vault: os.fork(),
    "spawn": lambda vault: os.posix_spawn("/bin/true", ["true"], {}),
    "exec": lambda vault: os.execv("/bin/true", ["true"]),
    "multiprocessing": lambda vault: multiprocessing.get_context("fork").Process().start(),
    "fresh interpreter": lambda vault: multiprocessing.get_context("spawn").Process().start(),
    "connect": lambda vault: socket.create_connection(("127.0.0.1", 9)),
    "ctypes": lambda vault: ctypes.CDLL(None),
    "ctypes memory": lambda vault: ctypes.string_at(id(vault), 8),
}


@pytest.mark.parametrize("way", LOOKS)
def test_no_look_at_the_truth_succeeds(vault, way):
    with pytest.raises(PermissionError, match="attack code tried to"):
        run_sealed(LOOKS[way], vault, paths=[vault])


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_out_of_the_process_succeeds(vault, way):
    with pytest.raises(PermissionError, match="attack code tried to"):
        run_sealed(WAYS_OUT[way], vault, paths=[vault])


@pytest.mark.parametrize("way", LOOKS)
def test_hiding_a_refusal_still_fails_the_attack(vault, way):
    def sly(vault):
        try:
            LOOKS[way](vault)
        except Exception:
            return "nothing happened"

    with pytest.raises(PermissionError, match="attack code tried to"):
        run_sealed(sly, vault, paths=[vault])


def test_globbing_finds_nothing_and_fails_the_attack(vault):
    with pytest.raises(PermissionError, match="attack code tried to"):
        run_sealed(lambda: glob.glob(f"{vault}/**/*", recursive=True), paths=[vault])


def test_a_thread_started_by_the_attack_is_sealed_too(vault):
    caught = []

    def attempt():
        for deed in (LOOKS["open"], WAYS_OUT["subprocess"]):
            try:
                deed(vault)
            except PermissionError as error:
                caught.append(str(error))

    def attack():
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    with pytest.raises(PermissionError, match="hid the refusal"):
        run_sealed(attack, paths=[vault])
    assert len(caught) == 2


def test_imports_go_on_from_a_folder_above_the_runs(vault, monkeypatch):
    """A checkout on ``sys.path`` holds its own ``runs``; entry points are read while attacking."""
    monkeypatch.syspath_prepend(str(vault.parent))
    found = run_sealed(lambda: list(importlib.metadata.entry_points()), paths=[vault])
    assert found


def test_library_readers_that_pass_the_hook_see_ciphertext_only(vault):
    """Where no kernel stops it: safetensors and torch open files without telling Python."""
    with sealed([vault]):
        size = (vault / FILE).stat().st_size
        mapped = torch.from_file(str(vault / FILE), size=size, dtype=torch.uint8)
        assert b"examples" not in bytes(mapped.tolist())
        with pytest.raises(Exception, match=r"(?i)header|safetensors"):
            safe_open(vault / FILE, framework="pt")


def test_library_readers_do_not_reach_the_auditors_key(vault):
    """The kernel refuses what Python's hook does not see."""
    if not threaded(lambda: restrict([vault])):
        pytest.skip("this kernel has no Landlock")
    key = sealing.key_path()
    readers = (
        lambda: torch.from_file(str(key), size=32, dtype=torch.uint8),
        lambda: read_file(str(key)),
        lambda: torch.from_file(str(vault / FILE), size=8, dtype=torch.uint8),
    )
    for reader in readers:
        with pytest.raises((RuntimeError, PermissionError)):
            run_sealed(reader, paths=[vault])


def test_no_library_writes_what_is_sealed(vault):
    """Nor the folders above it; beside it, attack code may write."""
    if not threaded(lambda: restrict([vault])):
        pytest.skip("this kernel has no Landlock")
    before = (vault / FILE).read_bytes()
    beside = vault.parent / "beside"
    beside.mkdir()

    def write(path):
        with pyarrow.OSFile(str(path), "wb") as file:
            file.write(b"mine")

    for path in (vault / FILE, vault / "new", vault.parent / "new", sealing.key_path()):
        with pytest.raises(PermissionError):
            run_sealed(write, path, paths=[vault])
    run_sealed(write, beside / "new", paths=[vault])
    assert (vault / FILE).read_bytes() == before
    assert (beside / "new").read_bytes() == b"mine"


def threaded(function):
    """A restriction stays with its thread."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(function()))
    thread.start()
    thread.join()
    return outcome[0]


def test_the_callers_variables_are_on_no_chain_of_frames(vault):
    def attack():
        frame, seen = inspect.currentframe(), set()
        while frame is not None:
            seen |= frame.f_locals.keys()
            frame = frame.f_back
        return seen

    the_private_images = object()
    assert the_private_images
    assert "the_private_images" in attack()
    assert "the_private_images" not in run_sealed(attack, paths=[vault])


def test_the_secret_key_is_not_in_the_environment(vault, monkeypatch):
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "00" * 32)
    assert run_sealed(lambda: os.environ.get("FEDSIM_SECRET_KEY"), paths=[vault]) is None
    assert os.environ["FEDSIM_SECRET_KEY"] == "00" * 32


def test_what_the_process_was_started_with_is_hidden(vault, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", "mine.toml", "seed=11"])
    monkeypatch.setenv("FEDSIM_COMMAND", "fedsim run mine.toml seed=11")
    before = sys.argv, sys.orig_argv
    told = run_sealed(
        lambda: [*sys.argv, *sys.orig_argv, os.environ.get("FEDSIM_COMMAND")], paths=[vault]
    )
    assert told == ["", "", None]
    assert (sys.argv, sys.orig_argv) == before
    assert os.environ["FEDSIM_COMMAND"]


def test_code_that_looked_absent_from_within_is_found_afterwards(vault, monkeypatch):
    """Where a folder of ``sys.path`` cannot be listed, an import remembers it as empty."""
    monkeypatch.syspath_prepend(str(vault.parent))
    (vault.parent / "here_all_along.py").write_text("")
    sys.modules.pop("colorsys", None)
    run_sealed(lambda: importlib.import_module("colorsys"), paths=[vault])
    assert importlib.import_module("here_all_along")


def test_a_cell_is_walled_once_for_many_calls(vault):
    views = vault.parent / "views"
    views.mkdir()
    cell = Cell([vault.parent], [views], readable=[], writable=[])
    for number in range(3):
        (views / "new").write_text(str(number))
        assert cell((views / "new").read_text) == str(number)
        with pytest.raises(PermissionError, match="attack code tried to touch a sealed path"):
            cell((vault / FILE).read_bytes)


def test_honest_work_goes_on_under_the_seal(vault, tmp_path):
    """Everything else stays possible: files, lazy imports, threads, autograd, KMeans."""

    mine = tmp_path / "mine"  # not above the vault: such folders cannot be listed
    mine.mkdir()

    def attack(scale):
        (mine / "own.txt").write_text("mine")
        assert len(os.listdir(mine)) == 1
        assert (mine / "own.txt").read_text() == "mine"
        with (mine / "own.txt").open("rb") as own, mmap.mmap(own.fileno(), 0, prot=1) as m:
            assert bytes(m) == b"mine"
        import colorsys

        gc.collect()
        from sklearn.cluster import KMeans

        KMeans(2, n_init=1, random_state=0).fit(np.random.default_rng(0).random((10, 2)))
        x = torch.ones(3, requires_grad=True)
        (scale * x**2).sum().backward()
        torch.save(x.grad, mine / "own.pt")
        return torch.load(mine / "own.pt"), colorsys.rgb_to_hsv(0, 0, 1)

    gradient, _ = run_sealed(attack, 3.0, paths=[vault])
    assert torch.equal(gradient, torch.full((3,), 6.0))


@pytest.mark.slow
def test_torch_compile_works_under_the_seal(vault, monkeypatch):
    own = vault.parent / "own"  # in /tmp itself, which is above the vault here, nobody may write
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own))

    def attack():
        return torch.compile(lambda x: (x * 2).sin())(torch.ones(3))

    assert torch.allclose(run_sealed(attack, paths=[vault]), torch.full((3,), 2.0).sin())


def test_the_attacks_own_error_comes_through(vault):
    def attack():
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        run_sealed(attack, paths=[vault])


def test_everything_is_open_again_afterwards(vault):
    with pytest.raises(PermissionError):
        run_sealed(LOOKS["open"], vault, paths=[vault])
    assert Vault(vault).record(1, 1) is not None
    assert gc.get_objects()
    assert subprocess.run(["true"], check=True).returncode == 0


def test_threads_that_were_there_before_keep_their_processes_and_sockets(vault):
    go, done, worked = threading.Event(), threading.Event(), []

    def bystander():
        go.wait()
        worked.append(subprocess.run(["true"], check=True).returncode)
        done.set()

    thread = threading.Thread(target=bystander)
    thread.start()
    with sealed([vault]):
        go.set()
        assert done.wait(10)
    thread.join()
    assert worked == [0]
