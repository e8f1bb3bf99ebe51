"""The simulation engine: the real ``flwr run`` on Flower's Ray backend, and how it ended.

Plain ``flwr run`` always exits with 0, shares one SuperLink with everybody on the machine, and
leaves it running.  This engine starts a SuperLink of its own (an empty folder as working
directory, a private ``FLWR_HOME``, no telemetry, no dependency installation), submits the run,
follows its log, asks Flower how it ended, and ends every process it started.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fedsim
from fedsim import seeds
from fedsim.errors import RunFailed, ScenarioError
from fedsim.parts import Parts, check, check_writable
from fedsim.run_folder import output_dir
from fedsim.scenario import Scenario

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_EXTRA = ("ray", "psutil")  # packages of the extra `simulation`
_START_SECONDS = 120.0


def app_folder() -> Path:
    """Return the source checkout that ``flwr run`` bundles.

    Raises
    ------
    ScenarioError
        If FedSim is installed without its source.
    """
    root = Path(fedsim.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise ScenarioError("--engine", "simulation", "needs a source checkout (pip install -e .)")
    return root


def check_installed() -> None:
    """Refuse this engine where its packages are not installed.

    Raises
    ------
    ScenarioError
        Naming the engine, the package, and how to get it.
    """
    if missing := [name for name in _EXTRA if find_spec(name) is None]:
        remedy = f"needs {' and '.join(missing)}, not installed here; in FedSim's folder: "
        raise ScenarioError("--engine", "simulation", f"{remedy}pip install -e '.[simulation]'")


def run_simulation(scenario: Scenario, command: str) -> Path:
    """Check and run a scenario with ``flwr run``; return the path of ``report.html``.

    Raises
    ------
    ScenarioError
        Before anything starts.
    RunFailed
        When Flower says that the run failed.
    """
    check_installed()
    app = app_folder()
    check_writable(output_dir(scenario))
    check(Parts(scenario))
    with superlink(command) as link:
        file = link.folder / "scenario.toml"
        file.write_text(scenario.to_toml())
        size = f"num-supernodes={_supernodes(scenario)} client-resources-num-cpus=1"
        if Parts(scenario).device.type == "cuda":
            size += f" client-resources-num-gpus={1 / _supernodes(scenario):.3f}"
        submitted = link.flwr(
            "run", str(app), "range", "--run-config", str(file), "--federation-config", size,
            "--format", "json",
        )  # fmt: skip
        file.unlink()  # it tells the seed, in a folder that attack code may come by
        run_id = str(json.loads(submitted)["run-id"])
        try:
            lines = _follow(link, run_id)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                text = f"interrupted; what was saved stays in {output_dir(scenario)}"
                print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(subprocess.SubprocessError, RunFailed):
                link.flwr("stop", run_id, "range")
                _wait_until_ended(link, run_id, seconds=30)
            raise
        status, details = link.status(run_id)
    if status != "finished:completed":
        raise RunFailed(f"flwr run {run_id} ended as {status}: {details}")
    page = next((line for line in reversed(lines) if line.endswith("report.html")), None)
    if page is None:
        raise RunFailed(f"flwr run {run_id} ended without a report")
    return Path(page)


def _supernodes(scenario: Scenario) -> int:
    return min(scenario.federation.clients, os.cpu_count() or 1)


@dataclass
class Link:
    """A running SuperLink of our own."""

    folder: Path
    environment: dict[str, str]

    def flwr(self, *arguments: str) -> str:
        """Run a ``flwr`` command and return what it printed.

        Raises
        ------
        RunFailed
            If the command fails; with its message.
        """
        done = subprocess.run(
            [_tool("flwr"), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RunFailed(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def status(self, run_id: str) -> tuple[str, str]:
        """Ask Flower for a run's status and its details."""
        listed = json.loads(self.flwr("ls", "range", "--run-id", run_id, "--format", "json"))
        run = listed["runs"][0]
        return str(run["status"]), str(run.get("status-details", ""))


@contextlib.contextmanager
def superlink(command: str) -> Iterator[Link]:
    """Run a simulation SuperLink on a free loopback port; end all it started."""
    import psutil

    with tempfile.TemporaryDirectory(prefix="fedsim-superlink-") as name:
        folder, port = Path(name), free_port()
        environment = {
            **os.environ,
            **QUIET,
            "PATH": tools_first(),
            "FLWR_HOME": str(folder / "flwr-home"),
            "FEDSIM_HOME": str(seeds.home()),
            "FEDSIM_COMMAND": command,
        }
        (folder / "flwr-home").mkdir()
        (folder / "empty").mkdir()
        (folder / "flwr-home" / "config.toml").write_text(
            f'[superlink]\ndefault = "range"\n\n[superlink.range]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        with (folder / "superlink.log").open("w") as log:
            process = subprocess.Popen(
                [_tool("flower-superlink"), "--insecure", "--simulation",
                 "--host", "127.0.0.1", "--port", str(port)],
                env=environment, cwd=folder / "empty", stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            wait_until_listening(process, port, folder / "superlink.log")
            yield Link(folder, environment)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                _, alive = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=20)
                for survivor in alive:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        survivor.kill()
            process.wait()


def _follow(link: Link, run_id: str) -> list[str]:
    """Print the run's log as it comes; return its lines."""
    lines = []
    with subprocess.Popen(
        [_tool("flwr"), "log", run_id, "range", "--stream"],
        env=link.environment, cwd=link.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.strip())
        except BaseException:
            process.terminate()
            raise
    _wait_until_ended(link, run_id, seconds=60)
    return lines


def _wait_until_ended(link: Link, run_id: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not link.status(run_id)[0].startswith("finished") and time.monotonic() < deadline:
        time.sleep(1)


def wait_until_listening(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until a process listens on a loopback port.

    Raises
    ------
    RunFailed
        If it ends, or takes too long; with the end of its log.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise RunFailed(f"the SuperLink did not start: {log.read_text()[-2000:]}")


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tools_first() -> str:
    """Return a ``PATH`` on which Flower finds its own commands, environment activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _tool(name: str) -> str:
    """Return the path of a command that stands beside this Python."""
    return str(Path(sys.executable).parent / name)
