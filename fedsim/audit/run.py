"""A run folder as the auditor finds it: whole, killed half way, or still without its vaults."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from fedsim import registry
from fedsim.attack import Reconstruction
from fedsim.audit.vault import Vault
from fedsim.errors import RunFailed
from fedsim.files import read_json
from fedsim.reconstructions import Facts, load, slug
from fedsim.run_folder import Environment

Count = Annotated[int, Field(ge=0)]


class Federation(TypedDict, total=False):
    """What ``federation.json`` tells (:class:`fedsim.run.History` writes it)."""

    clients: Count
    rounds: Count
    rounds_done: Count
    seconds: float
    round_seconds: list[float]
    failures: list[dict[str, bool | int | str | None]]
    bytes_up: Count
    bytes_down: Count
    accuracy: dict[str, float | None]
    receipts: list[str]
    used: list[str]
    channel: dict[str, Any]
    defenses_expected: list[dict[str, Any]]
    privacy: list[dict[str, Any]]
    server: dict[str, dict[str, float]]
    refusals: list[dict[str, Count]]
    manipulation: dict[str, float | int | None] | None


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    ``federation`` is empty where the federation never came to its end; ``events`` are in order.
    """

    folder: Path
    scenario: dict[str, Any]
    environment: dict[str, Any]
    federation: dict[str, Any]
    events: list[dict[str, Any]]
    vault: Vault

    @property
    def attack(self) -> registry.Expression | None:
        """The attack the scenario names, or None for an honest server."""
        found = registry.parse(str(self.scenario.get("attack", "none")), "attack")
        return found[0] if found else None

    @property
    def refused(self) -> bool:
        """Whether nothing reached the server in any round because clients refused."""
        return any(event.get("event") == "refused" for event in self.events)

    def stopped(self) -> str | None:
        """Say where the run ended before its time, or None."""
        written = [event for event in self.events if event.get("event") != "finished"]
        last = f"; the last thing it wrote was {_spoken(written[-1])}" if written else ""
        rounds, done = self.federation.get("rounds"), self.federation.get("rounds_done")
        if not self.federation:
            return f"it stopped before its first round was done{last}"
        if rounds is not None and done is not None and done < rounds:
            return f"it stopped after round {done} of {rounds}{last}"
        attacked = self.attack is None or self.refused or self.reconstruction(None) is not None
        if not attacked and not any(event.get("event") == "reconstructed" for event in written):
            return f"it stopped before its attack was done{last}"
        return None

    def reconstruction(self, path: Path | None) -> tuple[Reconstruction, Facts, Path] | None:
        """Load the saved reconstruction at ``path``; by default that of the scenario's attack."""
        if path is None:
            expression = self.attack
            if expression is None:
                return None
            named = {slug(str(self.scenario["attack"]).strip()), slug(str(expression))}
            folder = self.folder / "reconstructions"
            found = [file for name in named if (file := folder / f"{name}.safetensors").exists()]
            if not found:
                return None
            path = found[0]
        return *load(path), path


def open_run(folder: Path) -> Run:
    """Read what there is of a run folder.

    Raises
    ------
    RunFailed
        If it is no run folder (no readable ``scenario.toml``), or one of its files is damaged.
    """
    try:
        scenario = tomllib.loads((folder / "scenario.toml").read_text())
    except (OSError, ValueError) as error:
        raise RunFailed(f"{folder} is no run folder: scenario.toml: {error}") from error
    return Run(
        folder=folder,
        scenario=scenario,
        environment=_known(folder / "environment.json", Environment),
        federation=_known(folder / "federation.json", Federation),
        events=_events(folder / "events.jsonl"),
        vault=Vault(folder / "vault"),
    )


def _known(path: Path, kind: type[Any]) -> dict[str, Any]:
    return dict(read_json(path, kind)) if path.exists() else {}


def _events(path: Path) -> list[dict[str, Any]]:
    """Read the event lines that are whole: a killed run may have cut its last one."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _spoken(event: dict[str, Any]) -> str:
    details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))
    return f"{event.get('event')!r} ({details})" if details else f"{event.get('event')!r}"
