"""A deployed federation on loopback: TLS, node authentication, a data set and a vault a node."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.engines.simulation import QUIET, Link, free_port, tools_first, wait_until_listening

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    return str(BIN / name)


@dataclass
class Cluster:
    """One SuperLink and its SuperNodes, and where each keeps its own."""

    folder: Path
    link: Link
    environment: dict[str, str]
    superlink: "subprocess.Popen[bytes]"
    port: int
    count: int
    nodes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def vault(self, node: int) -> Path:
        return self.folder / f"vault-{node}"

    def state(self, node: int) -> Path:
        return self.folder / f"state-{node}"

    def log(self, node: int) -> Path:
        return self.folder / f"node-{node}.log"

    def start_node(self, node: int) -> None:
        data = self.folder / "data" / f"client-{node}.safetensors"
        config = (
            f"partition-id={node} num-partitions={self.count} vault='{self.vault(node)}' "
            f"state='{self.state(node)}' dataset=\"tensors(path='{data}', test_fraction=0.0)\""
        )
        log = self.log(node).open("w")
        home = self.folder / f"home-{node}"
        home.mkdir(exist_ok=True)
        self.nodes[node] = subprocess.Popen(
            [tool("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}",
             "--root-certificates", str(self.folder / "ca.crt"),
             "--auth-supernode-private-key", str(self.folder / f"node{node}"),
             "--host", "127.0.0.1", "--port", str(free_port()),
             "--node-config", config],
            env={**self.environment, "FLWR_HOME": str(home)},
            cwd=home, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def run(self, scenario: Path, seconds: float) -> tuple[str, str, str]:
        """Submit a scenario and wait; return status, details and the log."""
        import json

        submitted = self.link.flwr(
            "run", str(ROOT), "range", "--run-config", str(scenario), "--format", "json"
        )
        run_id = str(json.loads(submitted)["run-id"])
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status, details = self.link.status(run_id)
            if status.startswith("finished"):
                break
            time.sleep(2)
        else:
            self.link.flwr("stop", run_id, "range")
            status, details = "timeout", ""
        return status, details, (self.folder / "superlink.log").read_text()


def make_keys(folder: Path, nodes: int) -> None:
    """Make the certificates and keys as docs/cluster.md does."""

    def call(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    call("openssl", "req", "-x509", "-newkey", "rsa:3072", "-nodes", "-days", "2",
         "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=FedSim test CA",
         "-addext", "basicConstraints=critical,CA:TRUE",
         "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    call("openssl", "req", "-newkey", "rsa:3072", "-nodes", "-keyout", "server.key",
         "-out", "server.csr", "-subj", "/CN=localhost")  # fmt: skip
    (folder / "ext.cnf").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
    )
    call("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
         "-CAcreateserial", "-days", "2", "-extfile", "ext.cnf", "-out", "server.pem")  # fmt: skip
    for node in range(nodes):
        call(
            "ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", f"node{node}"
        )


@contextlib.contextmanager
def cluster(folder: Path, nodes: int, home: Path) -> Iterator[Cluster]:
    """Start a SuperLink and SuperNodes; end every process that they started."""
    make_keys(folder, nodes)
    port = free_port()
    environment = {
        **os.environ,
        **QUIET,
        "PATH": tools_first(),
        "FEDSIM_HOME": str(home),
        "FEDSIM_OFFLINE": "1",
    }
    flwr_home = folder / "flwr-home"
    flwr_home.mkdir()
    (flwr_home / "config.toml").write_text(
        '[superlink]\ndefault = "range"\n\n[superlink.range]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{folder / "ca.crt"}"\n'
    )
    link_environment = {**environment, "FLWR_HOME": str(flwr_home)}
    log = folder / "superlink.log"
    process = subprocess.Popen(
        [tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port),
         "--enable-supernode-auth", "--ssl-ca-certfile", str(folder / "ca.crt"),
         "--ssl-certfile", str(folder / "server.pem"), "--ssl-keyfile", str(folder / "server.key")],
        env=link_environment, cwd=flwr_home, stdout=log.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    running = Cluster(
        folder, Link(folder, link_environment), environment, process, port, count=nodes
    )
    try:
        wait_until_listening(process, port, log)
        for node in range(nodes):
            running.link.flwr("supernode", "register", str(folder / f"node{node}.pub"), "range")
        for node in range(nodes):
            running.start_node(node)
        yield running
    finally:
        end([*running.nodes.values(), process])


def end(processes: "list[subprocess.Popen[bytes]]") -> None:
    """End processes and all that they started: ask first, then kill."""
    import psutil

    family = []
    for parent in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*psutil.Process(parent.pid).children(recursive=True)]
            family.append(psutil.Process(parent.pid))
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    for process in processes:
        process.wait()
