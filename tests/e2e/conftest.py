"""What every end-to-end test needs: a home of its own, and no network."""

from pathlib import Path

import pytest


@pytest.fixture
def fedsim_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("FEDSIM_HOME", str(home))
    monkeypatch.setenv("FEDSIM_OFFLINE", "1")
    return home
