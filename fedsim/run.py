"""One run, from a scenario to a report: the walk that every engine takes.

scenario -> federation -> what the server saw -> reconstruction -> audit -> report.  Each step
leaves plain files in the run folder; the next one starts from them.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any, overload

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim import reconstructions, registry, report, seeds
from fedsim.attack import Attack, Manipulation, Reconstruction
from fedsim.audit.guard import run_sealed
from fedsim.audit.vault import Vault
from fedsim.data import DataSpec, Split, split_test
from fedsim.defense import Privacy, guarantees
from fedsim.errors import NotGranted, RunFailed
from fedsim.federation import Applied, Refereed, build_strategy
from fedsim.models import build_model, load_arrays, travelling
from fedsim.parts import Parts
from fedsim.population import Ledger, Population
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder, explain_os_error
from fedsim.scenario import Scenario
from fedsim.threat import THREAT_MODELS, Capability, Knowledge, Statistics
from fedsim.view import SavedViews, ServerView


def run(scenario: Scenario, grid: Grid, context: Context, folder: RunFolder) -> Path:
    """Run a scenario whose folder is made and whose parts are checked; return ``report.html``.

    Raises
    ------
    RunFailed
        When the run must not be believed, or could not go on; what it had saved stays.
    """
    parts = Parts(scenario)
    with plainly(folder):
        federate(parts, grid, context, folder)
    if parts.attack is not None:
        reconstruct(parts, parts.attack, folder)
    with plainly(folder):
        folder.gather_vault()
    return write_report(folder)


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


def federate(parts: Parts, grid: Grid, context: Context, folder: RunFolder) -> None:
    """Train; the server in its role saves what it sees; ``federation.json`` says what happened."""
    scenario = parts.scenario
    role, receipts, knowledge = _server(parts, folder)
    history = History(parts, Ledger(), receipts, knowledge)

    def on_round(server_round: int, seconds: float) -> None:
        folder.event("round", round=server_round, seconds=seconds)
        folder.write("federation.json", history.facts())

    with closing(_population(parts, grid, history.ledger, folder)) as population:
        behind = parts.channel.grid(population, context, scenario.federation.timeout)
        accuracy = _train(parts, role, population, behind, on_round)
    if scenario.audit.baseline:
        accuracy["baseline_after"] = _baseline(parts, grid, folder)
    folder.write("federation.json", history.facts(accuracy))
    folder.event("federated", rounds=len(history.ledger.round_seconds))


def _server(parts: Parts, folder: RunFolder) -> tuple[Strategy, list[str], Knowledge | None]:
    """Build the strategy in its role; what the role writes down, and what it may know."""
    scenario = parts.scenario
    lr = parts.local.lr if parts.local.kind == "gradient" else None
    inner = build_strategy(scenario.federation.strategy, scenario.federation.fraction)
    applied = Applied(inner, lr)
    if parts.attack is None:
        return applied, [], None
    views, kind = folder.path / "views", parts.local.kind
    if isinstance(parts.attack, Manipulation):
        seal = partial(run_sealed, paths=folder.sealed_paths())
        knowledge = _knowledge(parts, folder, Progress("crafting", "steps"))
        role = registry.components("role")["manipulator"](
            applied, views, kind, attack=parts.attack, knowledge=knowledge, seal=seal
        )
        return role, role.receipts, knowledge
    role = registry.components("role")["eavesdropper"](applied, views, kind)
    return role, role.receipts, None


def _population(parts: Parts, grid: Grid, ledger: Ledger, folder: RunFolder) -> Population:
    federation = parts.scenario.federation
    return Population(grid, federation.clients, ledger, federation.timeout, folder.path)


def _train(
    parts: Parts,
    role: Strategy,
    population: Population,
    grid: Grid,
    on_round: Callable[[int, float], None],
) -> dict[str, float | None]:
    """Run the rounds; return accuracy on the hold-out before and after."""
    scenario = parts.scenario
    rounds = scenario.federation.rounds
    progress = Progress("federation", "rounds")

    def after_round(server_round: int, seconds: float) -> None:
        on_round(server_round, seconds)
        progress(server_round, rounds)

    refereed = Refereed(
        role,
        population,
        seed=scenario.seed,
        spec=parts.spec,
        batchnorm=scenario.model.batchnorm,
        on_round=after_round,
    )
    holdout = split_test(parts.dataset.test, scenario.seed)[1]
    measured: dict[int, float | None] = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round in (0, rounds):
            measured[server_round] = accuracy(parts, arrays, holdout)
        return None

    refereed.start(
        grid=grid,
        initial_arrays=ArrayRecord(travelling(parts.model())),
        num_rounds=rounds,
        timeout=scenario.federation.timeout,
        train_config=ConfigRecord({"model": scenario.model.name, **_told(parts.spec)}),
        evaluate_fn=evaluate,
    )
    if not refereed.rounds_aggregated:
        reasons = sorted({str(f["reason"]) for f in population.ledger.failures})
        raise RunFailed(f"no round had a usable reply: {'; '.join(reasons) or 'no reply at all'}")
    return {"before": measured.get(0), "after": measured.get(rounds), "baseline_after": None}


def _told(spec: DataSpec) -> dict[str, Any]:
    """Return the task's public facts as a message carries them."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(spec).items()}


def _baseline(parts: Parts, grid: Grid, folder: RunFolder) -> float | None:
    """Train again without attack, defenses and channel; return the accuracy afterwards."""
    lr = parts.local.lr if parts.local.kind == "gradient" else None
    federation = parts.scenario.federation
    inner = build_strategy(federation.strategy, federation.fraction)
    honest = Applied(inner, lr, message_type="train.baseline")
    folder.event("baseline")
    with closing(_population(parts, grid, Ledger(), folder)) as population:
        return _train(parts, honest, population, population, lambda *_: None)["after"]


def accuracy(parts: Parts, arrays: ArrayRecord, split: Split) -> float | None:
    """Return the share of a split that a model classifies rightly; None where it is empty."""
    if not len(split):
        return None
    model = build_model(parts.scenario.model.name, parts.spec).to(parts.dtype)
    load_arrays(model, {name: array.numpy() for name, array in arrays.items()})
    model = model.eval().to(parts.device)
    right = 0
    with torch.inference_mode():
        for indices in torch.split(torch.arange(len(split)), 512):
            images, labels = split.batch(indices, parts.dtype)
            predicted = model(images.to(parts.device)).argmax(dim=1).cpu()
            right += int((predicted == labels).sum())
    return right / len(split)


@dataclass
class History:
    """What ``federation.json`` tells, as it happens.

    ``knowledge`` is a manipulator's, whose uses while it crafts are grants used.
    """

    parts: Parts
    ledger: Ledger
    receipts: list[str]
    knowledge: Knowledge | None
    started: float = field(default_factory=time.perf_counter)

    @cached_property
    def privacy(self) -> list[dict[str, Any]]:
        """Formal guarantees, each for the client that it protects least."""
        sizes = [len(own) for own in self.parts.partitions]
        least: dict[str, Privacy] = {}
        for examples in {min(sizes), max(sizes)}:
            plan = self.parts.local.plan(examples, self.parts.scenario.federation.rounds)
            for name, found in guarantees(self.parts.defenses, plan).items():
                if name not in least or found.epsilon > least[name].epsilon:
                    least[name] = found
        told = [{"name": name, **dataclasses.asdict(found)} for name, found in least.items()]
        return [one if isfinite(one["epsilon"]) else {**one, "epsilon": None} for one in told]

    def facts(self, accuracy: dict[str, float | None] | None = None) -> dict[str, Any]:
        """Return what is known so far."""
        federation, ledger = self.parts.scenario.federation, self.ledger
        used = self.knowledge.used if self.knowledge else ()
        return {
            "clients": federation.clients,
            "rounds": federation.rounds,
            "rounds_done": len(ledger.round_seconds),
            "seconds": time.perf_counter() - self.started,
            "round_seconds": ledger.round_seconds,
            "failures": ledger.failures,
            "bytes_up": ledger.bytes_up,
            "bytes_down": ledger.bytes_down,
            "accuracy": accuracy or {"before": None, "after": None, "baseline_after": None},
            "receipts": self.receipts,
            "used": sorted(capability.value for capability in used),
            "channel": {"name": self.parts.channel.name, **self.parts.channel.figures()},
            "defenses_expected": [
                {"name": d.name, "must_change": d.changes_upload} for d in self.parts.defenses
            ],
            "privacy": self.privacy,
            "detection": [],
        }


# -- reconstruction ------------------------------------------------------------------------------


class BlankedViews(Sequence[ServerView]):
    """Views without the number of examples, which an attack asks its knowledge for.

    ``read`` returns one view by its position; it keeps the files to itself.
    """

    def __init__(self, read: Callable[[int], ServerView], count: int) -> None:
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ServerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServerView]: ...
    def __getitem__(self, index: int | slice) -> ServerView | list[ServerView]:
        if isinstance(index, slice):
            return [self._read(at) for at in range(self._count)[index]]
        return self._read(range(self._count)[index])


def _blanked(saved: SavedViews, knowledge: Knowledge) -> BlankedViews:
    def read(index: int) -> ServerView:
        knowledge.require(Capability.UPDATES)
        return dataclasses.replace(saved[index], num_examples=None)

    return BlankedViews(read, len(saved))


def reconstruct(parts: Parts, attack: Attack, folder: RunFolder) -> Path:
    """Let an attack work on the saved views, sealed off from the truth; save what it made.

    Raises
    ------
    RunFailed
        If the server saved no view, or the attack reached for what it must not see.
    NotGranted
        If the attack asked for what its threat model does not grant.
    """
    with plainly(folder):
        return _reconstruct(parts, attack, folder)


def _reconstruct(parts: Parts, attack: Attack, folder: RunFolder) -> Path:
    saved = SavedViews(folder.path / "views")
    if not len(saved):
        raise RunFailed("the server saw no upload: there is nothing to reconstruct from")
    facts = saved.facts()
    knowledge = _knowledge(parts, folder, Progress(attack.name, "iterations"), attack)
    started = time.perf_counter()
    result: Reconstruction = run_sealed(
        attack.reconstruct, _blanked(saved, knowledge), knowledge, paths=folder.sealed_paths()
    )
    seconds = time.perf_counter() - started
    cost = dataclasses.replace(result.cost, seconds=seconds)
    told = reconstructions.Facts(
        expression=parts.scenario.attack,
        name=attack.name,
        paper=f"{attack.paper.authors}: {attack.paper.title}, {attack.paper.venue} "
        f"{attack.paper.year}",
        used=tuple(sorted({c.value for c in knowledge.used} | _used_in_crafting(attack, folder))),
        oracles=tuple(sorted(knowledge.oracles_used)),
        view_labels=tuple(fact["label"] for fact in facts),
        senders=tuple(tuple(fact["senders"]) for fact in facts),
        rounds=tuple(fact["round"] for fact in facts),
    )
    path = reconstructions.save(
        folder.path / "reconstructions", dataclasses.replace(result, cost=cost), told
    )
    folder.event("reconstructed", attack=parts.scenario.attack, seconds=seconds)
    return path


def _used_in_crafting(attack: Attack, folder: RunFolder) -> set[str]:
    if not isinstance(attack, Manipulation):
        return set()
    told = folder.path / "federation.json"
    used = json.loads(told.read_text())["used"] if told.exists() else []
    return {*used, Capability.MANIPULATION.value}


def _knowledge(
    parts: Parts, folder: RunFolder, progress: Progress, attack: Attack | None = None
) -> Knowledge:
    """Build what the scenario's threat model lets an attack know, and load it: later it is sealed.

    ``attack`` is None while a manipulator crafts: there is no oracle before anybody has trained.
    """
    scenario = parts.scenario
    surrogate = split_test(parts.dataset.test, scenario.seed)[0]
    views = SavedViews(folder.path / "views").facts()
    statistics: dict[int, Statistics] = {}
    if Capability.STATISTICS in THREAT_MODELS[scenario.threat_model]:
        statistics = _statistics(parts)
    oracles = {}
    if attack is not None and "labels" in parts.oracles & attack.oracles:
        truth = _true_labels(folder, views)
        oracles["labels"] = lambda view: truth[view.label]
    return Knowledge(
        scenario.threat_model,
        data=parts.spec,
        training=parts.local.details(),
        seed=seeds.derive(scenario.seed, "attack"),
        device=parts.device,
        batchnorm=scenario.model.batchnorm,
        surrogate=lambda: surrogate,
        statistics=statistics.__getitem__,
        oracles=oracles,
        num_examples={fact["label"]: fact["num_examples"] for fact in views},
        progress=progress,
    )


def _statistics(parts: Parts) -> dict[int, Statistics]:
    """Return every client's class distribution."""
    labels, classes = parts.dataset.train.labels, parts.spec.num_classes
    counted = [torch.bincount(labels[own], minlength=classes) for own in parts.partitions]
    return {client: Statistics(counts / counts.sum()) for client, counts in enumerate(counted)}


def _true_labels(folder: RunFolder, views: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Read the labels behind each view: the oracle grant."""
    folder.gather_vault()
    vault = Vault(folder.path / "vault")
    truth = {}
    for fact in views:
        records = [vault.record(client, fact["round"]) for client in fact["senders"]]
        if any(record is None for record in records):
            raise RunFailed(
                "the labels oracle needs the vault, and it is not here: "
                "run fedsim report RUN --vault DIR, then fedsim attack RUN EXPRESSION"
            )
        truth[fact["label"]] = torch.cat([r.labels for r in records if r is not None])
    return truth


# -- report ----------------------------------------------------------------------------------------


def write_report(folder: RunFolder) -> Path:
    """Judge what the run left and write ``report.json`` and ``report.html``; return the latter.

    Raises
    ------
    RunFailed
        If the receipts say that the run must not be believed; the report is written first.
    """
    from fedsim.audit.verdict import judge

    with plainly(folder):
        folder.event("finished")
        verdict = judge(folder.path)
        page = report.write(folder.path, verdict)
    if verdict.failed:
        raise RunFailed(f"{verdict.failed} (report: {page})")
    return page
