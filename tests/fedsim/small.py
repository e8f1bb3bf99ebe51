"""Small real runs on digits, and what tests need to look into them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from fedsim import registry
from fedsim.attack import Attack, Manipulation, ModelToSend, Paper, Reconstruction
from fedsim.audit.vault import Vault
from fedsim.client_app import app
from fedsim.engines.inline import HOST, InlineGrid
from fedsim.parts import Parts, check
from fedsim.run import federate, reconstruct
from fedsim.run_folder import RunFolder, plainly
from fedsim.scenario import Scenario
from fedsim.threat import Capability, Knowledge
from fedsim.view import SavedViews, ServerView

DEFAULTS: dict[str, Any] = {
    "title": "small",
    "threat-model": "F",
    "federation.clients": 4,
    "federation.local": "fedsgd(batch_size=2, lr=0.1)",
    "federation.device": "cpu",
    "federation.threads": 1,
    "data.dataset": "digits",
    "model.name": "mlp(hidden=[8])",
}


def scenario(folder: Path, changes: dict[str, Any] | None = None) -> Scenario:
    """Return a small scenario that writes into ``folder``."""
    return Scenario.from_flat({**DEFAULTS, "output.dir": str(folder), **(changes or {})})


@dataclass(frozen=True)
class Ran:
    """What a federation left."""

    folder: RunFolder
    parts: Parts

    @property
    def federation(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.folder.path / "federation.json").read_text())
        return told

    @property
    def failures(self) -> list[tuple[int, int | None, str]]:
        return [(f["round"], f["client"], f["reason"]) for f in self.federation["failures"]]

    @property
    def views(self) -> list[ServerView]:
        return list(SavedViews(self.folder.path / "views"))

    @property
    def vault(self) -> Vault:
        return Vault(self.folder.path / "vault")


def federated(folder: Path, changes: dict[str, Any] | None = None, run_id: int = 7) -> Ran:
    """Check a scenario and run its federation and its attack; judge nothing."""
    wanted = scenario(folder, changes)
    parts = Parts(wanted)
    check(parts)
    made = RunFolder.create(wanted, run_id=run_id, engine="inline", command="a test")
    ran = Ran(made, parts)
    with inline(made, wanted) as (grid, context):
        with plainly(made):
            federate(parts, grid, context, made)
        if parts.attack is not None:
            reconstruct(parts, parts.attack, made)
    return ran


@contextmanager
def inline(folder: RunFolder, wanted: Scenario) -> Iterator[tuple[InlineGrid, Context]]:
    """Yield the inline engine's grid and the server's context."""
    node_config: dict[str, Any] = {"vault": str(folder.path / "vault")}
    run_id = int(folder.environment["run_id"])
    context = Context(run_id, HOST, node_config, RecordDict(), wanted.flat())
    grid = InlineGrid(app, context, wanted.federation.timeout)
    try:
        yield grid, context
    finally:
        grid.close()


def latest(folder: Path) -> RunFolder:
    """Return the run that ``folder/latest`` points to."""
    return RunFolder.open(folder / "latest")


def plug_in(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, component: Any) -> None:
    """Register a component for one test."""
    registry.components(kind)
    component.name = name
    monkeypatch.setitem(registry._components[kind], name, component)


NOBODY = Paper("none", "nobody", "a test", 2025)


@dataclass(frozen=True, kw_only=True)
class Watching(Attack):
    """An attack that does what a test tells it, and reconstructs one gray image."""

    paper = NOBODY
    needs = frozenset({Capability.UPDATES})
    deed: ClassVar[Callable[[Sequence[ServerView], Knowledge], object]]

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        type(self).deed(views, knowledge)
        return gray()


@dataclass(frozen=True, kw_only=True)
class Meddling(Manipulation):
    """A manipulation that sends the honest model, after doing what a test tells it."""

    paper = NOBODY
    needs = frozenset({Capability.UPDATES, Capability.MANIPULATION})
    deed: ClassVar[Callable[[dict[str, Tensor], Knowledge], object]]

    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        type(self).deed(arrays, knowledge)
        return ModelToSend(expression, arrays)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        return gray()


def gray() -> Reconstruction:
    return Reconstruction(torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64))


def watching(deed: Callable[[Sequence[ServerView], Knowledge], object]) -> type[Watching]:
    """Return an attack class that does one thing."""
    return type("Watching", (Watching,), {"deed": staticmethod(deed)})


def meddling(deed: Callable[[dict[str, Tensor], Knowledge], object]) -> type[Meddling]:
    """Return a manipulation class that does one thing while it crafts."""
    return type("Meddling", (Meddling,), {"deed": staticmethod(deed)})


def plain_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the mean gradient of cross-entropy, PyTorch's way."""
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
