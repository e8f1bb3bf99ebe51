"""Every test has a home of its own, no network, and few threads."""

import contextlib
import ctypes
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and what they start, share cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc: keep memory, do not map anew
    for _option, _value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # mmap max, trim, top pad
        ctypes.CDLL(None).mallopt(_option, _value)

import torch


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDSIM_AUDITOR_PUBLIC_KEY", "FEDSIM_AUDITOR_KEY_FILE", "FEDSIM_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDSIM_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file on one worker (``-n 2 --dist loadgroup``), but for the toys: many, and long."""
    for item in items:
        if item.path.name != "test_toys.py":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
