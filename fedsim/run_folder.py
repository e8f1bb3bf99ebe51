"""A run's folder: written as it goes, so that a killed run keeps what it had."""

import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from typing_extensions import TypedDict

from fedsim import seeds
from fedsim.errors import NotGranted, RunFailed, ScenarioError
from fedsim.files import read_json, write_atomically, write_json
from fedsim.scenario import Scenario

_PACKAGES = ("fedsim-range", "flwr", "torch", "torchvision", "ray", "numpy", "dp-accounting")


class Environment(TypedDict, total=False):
    """What ``environment.json`` tells of the machine and the command."""

    versions: dict[str, str]
    device: str
    cores: int | None
    seed: int
    engine: str
    run_id: Annotated[int, Field(ge=0)]
    command: str
    repeat: str


class RunFolder:
    """``<dir>/<time>-<title>-<id>`` and everything in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, scenario: Scenario, *, run_id: int, engine: str, command: str) -> "RunFolder":
        """Make a new folder, and point ``latest`` beside it to it.

        Raises
        ------
        RunFailed
            If the disk is full, or the folder gone.
        """
        parent = output_dir(scenario)
        title = re.sub(r"[^a-z0-9]+", "-", scenario.title.lower()).strip("-")[:40] or "run"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{secrets.token_hex(3)}"
        folder = cls(parent / name)
        try:
            folder.path.mkdir(parents=True)
            folder.path.joinpath("vault").mkdir(mode=0o700)
            folder.write_scenario(scenario)
            environment = _environment(scenario, run_id, engine, command)
            environment["repeat"] = _repeat(folder.path / "scenario.toml", engine, command)
            folder.write("environment.json", environment)
            link = parent / f".{name}.latest"
            link.symlink_to(name)
            link.replace(parent / "latest")
            folder.event("started", engine=engine)
        except OSError as error:
            raise explain_os_error(error, folder.path) from error
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open what a run left.

        Raises
        ------
        ScenarioError
            If the path is not a run folder.
        """
        if not (path / "scenario.toml").is_file():
            raise ScenarioError("run", str(path), "not a run folder: it holds no scenario.toml")
        return cls(path.resolve())

    def write_scenario(self, scenario: Scenario) -> None:
        """Write the resolved scenario."""
        write_atomically(self.path / "scenario.toml", scenario.to_toml())

    @property
    def scenario(self) -> Scenario:
        """The resolved scenario."""
        return Scenario.load(self.path / "scenario.toml")

    @property
    def environment(self) -> Environment:
        """Versions, device, seed, command, run id.

        Raises
        ------
        RunFailed
            If the file is missing or damaged.
        """
        return read_json(self.path / "environment.json", Environment)

    def event(self, name: str, **facts: Any) -> None:
        """Append one line to ``events.jsonl``."""
        line = json.dumps({"time": round(time.time(), 3), "event": name, **facts})
        with (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def write(self, name: str, value: Any) -> None:
        """Write one of the run's JSON files."""
        write_json(self.path / name, value)

    def gather_vault(self) -> None:
        """Bring home what clients on this machine deposited under the run's id."""
        from fedsim.audit.vault import move

        if "run_id" in self.environment:
            move(seeds.home() / "vaults" / str(self.environment["run_id"]), self.path / "vault")


def output_dir(scenario: Scenario) -> Path:
    """Return where run folders go; a relative folder lies in ``$FEDSIM_HOME``."""
    return seeds.home() / Path(scenario.output.dir).expanduser()


def _environment(scenario: Scenario, run_id: int, engine: str, command: str) -> Environment:
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cores": os.cpu_count(),
        "seed": scenario.seed,
        "engine": engine,
        "run_id": run_id,
        "command": command,
    }


def _repeat(file: Path, engine: str, command: str) -> str:
    """Return the command that runs a scenario again as it was run, in FedSim's source folder."""
    name = shlex.quote(str(file))
    if command.startswith("flwr run"):
        return f"flwr run . --run-config {name}"
    return f"fedsim run {name} --engine {engine}"


def explain_os_error(error: OSError, folder: Path) -> RunFailed:
    """Return the message for a disk that is full or a folder that is gone."""
    return RunFailed(
        f"could not write ({error.strerror or error}: {error.filename or folder}); "
        f"what was saved before stays readable in {folder}"
    )


@contextmanager
def interruptible(folder: RunFolder) -> Iterator[None]:
    """Say at a Ctrl-C where what was saved stays, and write down that there was one."""
    try:
        yield
    except KeyboardInterrupt:
        folder.event("interrupted")
        print(f"interrupted; what was saved stays in {folder.path}", file=sys.stderr)
        raise


@contextmanager
def plainly(folder: RunFolder) -> Iterator[None]:
    """Say what an error of the disk, or a refusal by the guard, means for the run."""
    try:
        yield
    except NotGranted:
        raise
    except OSError as error:
        if isinstance(error, PermissionError) and error.errno is None:
            raise RunFailed(f"{error}: nothing it made may be believed") from error
        raise explain_os_error(error, folder.path) from error
