"""What a client remembers outlives the SuperNode that hosts it.

A real SuperNode is ended between two rounds and started again, with the same key and the same
``state`` folder.  Under one ``FEDSIM_SECRET_KEY`` every draw repeats, so that the run must end as
the same run does that nothing interrupted: the model to the bit, which hangs on the residual of
the error feedback and on the private factors, and the ledger, which counts the round before.
"""

import json
import os
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.deployment import Cluster, cluster, end, tool
from tests.e2e.test_engines import only_run
from tests.e2e.test_faults import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

REMEMBERING = {
    "title": "restart",
    "defenses": "pefl(private=True) | local-dp(norm=1.0, epsilon=8.0) "
    "| prune(ratio=0.9, feedback=True)",
    "federation.clients": 1,
    "federation.rounds": 2,
    "federation.local": "fedsgd(batch_size=64, lr=0.1)",
    "model.name": "mlp(hidden=[16])",
    "data.dataset": "digits",
    "attack": "none",
    "audit.baseline": False,
}


def scenario_file(folder: Path, out: Path) -> Path:
    from fedsim.scenario import Scenario

    path = folder / "restart.toml"
    path.write_text(Scenario.from_flat({**REMEMBERING, "output.dir": str(out)}).to_toml())
    return path


def server_app(running: Cluster) -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process(running.superlink.pid).children(recursive=True)
        if any("flwr-serverapp" in word for word in process.cmdline())
    ]
    return found


def restart_after_one_round(running: Cluster, node: int) -> None:
    """Hold the server before its second round while the SuperNode is ended and started again."""
    wait_for(lambda: list(running.state(node).rglob("client-*.safetensors")), 300)
    server = server_app(running)
    server.suspend()
    try:
        said = "Sent successfully"  # who it is, and its answer to the first round
        wait_for(lambda: running.log(node).read_text().count(said) == 2, 120)
        end([running.nodes[node]])
        running.start_node(node)
        wait_for(lambda: "SuperNode ID" in running.log(node).read_text(), 120)
    finally:
        server.resume()


def test_a_client_goes_on_where_it_was_when_its_supernode_is_started_again(
    tmp_path: Path, fedsim_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "44" * 32)
    folder, out = tmp_path / "cluster", tmp_path / "deployed"
    folder.mkdir()
    file = scenario_file(folder, out)
    subprocess.run(
        [tool("fedsim"), "partition", str(file), "--out", str(folder / "data")],
        check=True, capture_output=True,
    )  # fmt: skip
    with cluster(folder, 1, fedsim_home) as running:
        restarting = threading.Thread(target=restart_after_one_round, args=(running, 0))
        restarting.start()
        status, details, log = running.run(file, seconds=600)
        restarting.join()
        assert status == "finished:completed", f"{details}\n{log[-4000:]}"
        received = running.log(0).read_text().count("Received successfully")
        assert received == 1, "the second round must have been the new process's"
        vault = running.vault(0)
    restarted = only_run(out)
    subprocess.run(
        [tool("fedsim"), "report", str(restarted), "--vault", str(vault)],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [tool("fedsim"), "run", str(scenario_file(tmp_path, tmp_path / "inline"))],
        check=True, capture_output=True, env=dict(os.environ), cwd=tmp_path,
    )  # fmt: skip
    assert_same_end(restarted, only_run(tmp_path / "inline"))


def assert_same_end(one: Path, other: Path) -> None:
    left, right = (load_file(run / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    (spent,) = ledger(one)
    assert spent["releases"] == REMEMBERING["federation.rounds"]
    assert [spent] == ledger(other)


def ledger(run: Path) -> list[dict]:
    report = json.loads((run / "report.json").read_text())
    assert not report["federation"]["failures"]
    (part,) = [defense for defense in report["defenses"] if defense["name"] == "local-dp"]
    return part["spent"]
