"""The README's plain `flwr run`, as documented."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from fedsim.engines.simulation import free_port, tools_first
from tests.e2e.deployment import ROOT, tool

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# What the README tells users to set, and why.
DOCUMENTED = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_TELEMETRY_ENABLED": "0"}


@contextlib.contextmanager
def local_superlink(flwr_home: Path, port: int):
    """Give `flwr run` a machine of its own, and end the SuperLink that it leaves behind."""
    environment = {
        **os.environ,
        **DOCUMENTED,
        "PATH": tools_first(),  # the README activates the environment
        "FLWR_HOME": str(flwr_home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    try:
        yield environment
    finally:
        ours = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == str(flwr_home):
                    ours.append(process)
        for process in ours:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(ours, timeout=20)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def streamed(environment: dict[str, str], scenario: Path) -> str:
    """Run a scenario natively and return all that it printed."""
    name = str(scenario.relative_to(ROOT))
    done = subprocess.run(
        [tool("flwr"), "run", ".", "--run-config", name, "--stream"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_plain_flwr_run_writes_the_report_where_the_readme_says(
    tmp_path: Path, fedsim_home: Path
) -> None:
    flwr_home = tmp_path / "flwr"
    flwr_home.mkdir()
    with local_superlink(flwr_home, free_port()) as environment:
        printed = streamed(environment, ROOT / "scenarios" / "quickstart.toml")
    pages = list((fedsim_home / "runs").glob("*quick-start*/report.html"))
    assert len(pages) == 1, printed
    assert str(pages[0]) in printed
    assert "federation 1/1 rounds" in printed
    report = json.loads((pages[0].parent / "report.json").read_text())
    assert report["federation"]["engine"] == "simulation"
    assert report["leak"]["leak_rate"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_scenario_runs_natively(tmp_path: Path, fedsim_home: Path) -> None:
    flwr_home = tmp_path / "flwr"
    flwr_home.mkdir()
    scenarios = sorted((ROOT / "scenarios").glob("**/*.toml"))
    assert len(scenarios) >= 12
    with local_superlink(flwr_home, free_port()) as environment:
        for scenario in scenarios:
            before = reports(fedsim_home)
            printed = streamed(environment, scenario)
            new = reports(fedsim_home) - before
            assert len(new) == 1, printed
            report = json.loads(new.pop().read_text())
            print(f"{scenario.stem}: {report['verdict']}")
            assert report["federation"]["engine"] == "simulation"


def reports(home: Path) -> set[Path]:
    """Return every run's report, `latest` not counted twice."""
    return {path.resolve() for path in (home / "runs").glob("*/report.json")}
