"""Every report test has a home of its own, offline."""

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("FEDSIM_AUDITOR_PUBLIC_KEY", "FEDSIM_AUDITOR_KEY_FILE", "FEDSIM_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDSIM_OFFLINE", "1")
    return tmp_path / "home"
