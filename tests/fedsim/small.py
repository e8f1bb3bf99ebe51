"""Small real runs on digits, and what tests need to look into them."""

import importlib
import json
import marshal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn

from fedsim import reconstructions, registry
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
    """An attack that does what a test tells it, and reconstructs one gray image.

    It attacks in a process of its own: what the deed returns comes back as JSON, in the receipt,
    for :func:`told`; what it wraps in :class:`Instead` is returned instead of the image.
    """

    paper = NOBODY
    needs = frozenset({Capability.UPDATES})
    deed: ClassVar[Callable[[Sequence[ServerView], Knowledge], object]]

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Any:
        found = type(self).deed(views, knowledge)
        if isinstance(found, Instead):
            return found.returned
        return gray(json.dumps(found, default=lambda _: None))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by value: a test's own functions are nobody's to import."""
        return _watching, packed(type(self).deed)


@dataclass(frozen=True)
class Instead:
    """What an attack is to return."""

    returned: object


def _watching(*function: Any) -> Watching:
    return watching(unpacked(*function))()


def packed(function: Callable[..., object]) -> tuple[Any, ...]:
    """Return a function as what pickle takes: its code, and what its closure holds."""
    assert isinstance(function, FunctionType)
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    closure = [(True, packed(h)) if isinstance(h, FunctionType) else (False, h) for h in held]
    return marshal.dumps(function.__code__), function.__module__, function.__defaults__, closure


def unpacked(
    code: bytes, module: str, defaults: tuple[Any, ...] | None, closure: list[tuple[bool, Any]]
) -> FunctionType:
    """Return the function again; its globals are those of its module, imported here."""
    cells = tuple(CellType(unpacked(*held) if is_code else held) for is_code, held in closure)
    names = vars(importlib.import_module(module))
    return FunctionType(marshal.loads(code), names, "deed", defaults, cells)


def told(ran: "Ran | RunFolder") -> Any:
    """Return what a watching attack's deed returned."""
    folder = ran.folder if isinstance(ran, Ran) else ran
    (path,) = (folder.path / "reconstructions").glob("*.safetensors")
    return json.loads(reconstructions.load(path)[0].receipts[0])


@dataclass(frozen=True, kw_only=True)
class Meddling(Manipulation):
    """A manipulation that sends the model it got, after doing what a test tells it."""

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without the deed, which is for crafting: that is done where it is."""
        return Meddling, ()


def gray(*receipts: str) -> Reconstruction:
    image, view = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    return Reconstruction(image, view, receipts=receipts)


def nudge(arrays: dict[str, Tensor], knowledge: Knowledge | None = None) -> None:
    """Change a model a little, in place: what makes sending it a manipulation."""
    for tensor in arrays.values():
        tensor.add_(1e-3)


def attack_by(monkeypatch: pytest.MonkeyPatch, deed: Callable[..., object]) -> dict[str, Any]:
    """Plug in an attack that looks at a view and then does one thing; return what names it."""

    def after_a_look(views: Sequence[ServerView], knowledge: Knowledge) -> object:
        assert views[0].num_examples is None  # who reads nothing has used nothing, and is no attack
        return deed(views, knowledge)

    plug_in(monkeypatch, "attack", "cheat", watching(after_a_look))
    return {"attack": "cheat", "threat-model": "A"}


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
