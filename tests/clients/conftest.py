"""A secret key of the tests' own: nothing is written to the home folder, every draw repeats."""

import pytest


@pytest.fixture(autouse=True)
def secret_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
