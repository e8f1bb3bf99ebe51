"""What breaks in a real federation: a SuperNode that dies, a run that is interrupted."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.deployment import cluster, tool
from tests.e2e.test_engines import only_run, scenario_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.5)


def test_a_killed_supernode_costs_only_its_own_clients(tmp_path: Path, fedsim_home: Path) -> None:
    folder, out = tmp_path / "cluster", tmp_path / "deployed"
    folder.mkdir()
    file = scenario_file(folder, out)
    subprocess.run(
        [tool("fedsim"), "partition", str(file), "--out", str(folder / "data")],
        check=True, capture_output=True,
    )  # fmt: skip
    with cluster(folder, 3, fedsim_home) as running:

        def kill_the_last_node_once_it_has_trained() -> None:
            deposit = running.vault(2) / "client-2" / "round-1.sealed"
            wait_for(deposit.exists, 300)
            family = psutil.Process(running.nodes[2].pid)
            for process in [*family.children(recursive=True), family]:
                process.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill_the_last_node_once_it_has_trained)
        killer.start()
        status, details, log = running.run(file, seconds=600)
        killer.join()
        assert status == "finished:completed", f"{details}\n{log[-4000:]}"
    federation = json.loads((only_run(out) / "federation.json").read_text())
    assert federation["rounds_done"] == 2
    assert {failure["client"] for failure in federation["failures"]} == {2}
    views = {path.name for path in (only_run(out) / "views").glob("round-*")}
    assert {"round-2-client-0.safetensors", "round-2-client-1.safetensors"} <= views


def test_interrupting_the_simulation_engine_ends_all_it_started(
    tmp_path: Path, fedsim_home: Path
) -> None:
    file = scenario_file(tmp_path, tmp_path / "runs")
    process = subprocess.Popen(
        [tool("fedsim"), "run", str(file), "--engine", "simulation", "federation.rounds=500"],
        env={**os.environ, "FEDSIM_HOME": str(fedsim_home)}, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = tmp_path / "runs"
    wait_for(lambda: list(runs.glob("*/views/round-1-*")), 300)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130, message
    assert "interrupted" in message
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert list(only_run(runs).glob("views/round-1-client-*.safetensors"))
