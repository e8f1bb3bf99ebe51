"""Ray is an extra: only the simulation engine wants it, and says so before anything starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import cli
from tests.fedsim.small import scenario

ROOT = Path(__file__).parents[2]
# Several commands in one process in which Ray cannot be imported, nor found.
WITHOUT_RAY = """
import json, sys
sys.modules["ray"] = None
from fedsim.cli import main
for command in json.loads(sys.stdin.read()):
    sys.argv = ["fedsim", *command]
    try:
        main()
    except SystemExit as ended:
        print("status", ended.code or 0, flush=True)
"""


def statuses(commands: list[list[str]], folder: Path) -> "tuple[list[str], str]":
    """Run commands without Ray; return their exit statuses, and what they said of errors."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], input=json.dumps(commands), cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.startswith("status")], done.stderr


def test_everything_but_the_simulation_engine_works_without_ray(tmp_path: Path) -> None:
    small = scenario(tmp_path / "runs", {"attack": "linear-inversion"})
    (tmp_path / "small.toml").write_text(small.to_toml())
    commands = [
        ["validate", "small.toml"],
        ["run", "small.toml"],
        ["attack", "runs/latest", "linear-inversion(layer='1')"],
        ["report", "runs/latest"],
        *(["list", what.value] for what in cli.Listed),
        ["explain", "fedavg"],
    ]
    found, errors = statuses(commands, tmp_path)
    assert found == ["status 0"] * len(commands), errors


def test_the_simulation_engine_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(scenario(tmp_path / "runs").to_toml())
    found, errors = statuses([["run", "small.toml", "--engine", "simulation"]], tmp_path)
    assert found == ["status 2"]
    assert errors == (
        "fedsim: --engine = 'simulation': needs ray, not installed here; in FedSim's folder: "
        "pip install -e '.[simulation]'\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


@pytest.mark.parametrize("package", ["ray", "psutil"])
def test_no_superlink_starts_where_a_package_is_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.engines import simulation
    from fedsim.errors import ScenarioError

    def none(command: str) -> None:
        raise AssertionError("a SuperLink was started")

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(simulation, "superlink", none)
    with pytest.raises(ScenarioError, match=rf"needs {package}, .*'\.\[simulation\]'"):
        simulation.run_simulation(scenario(tmp_path / "runs"), "a test")
