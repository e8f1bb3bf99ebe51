"""One run, from a scenario to a report: the walk that every engine takes.

scenario -> federation -> what the server saw -> reconstruction -> audit -> report.  Each step
leaves plain files in the run folder; the next one starts from them.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid

from fedsim import reconstructions, registry, report, seeds
from fedsim.attack import Attack, Manipulation, Reconstruction
from fedsim.audit.guard import run_sealed
from fedsim.audit.vault import Vault
from fedsim.data import DataSpec, Split, split_test
from fedsim.errors import RunFailed
from fedsim.federation import Applied, Refereed, build_strategy
from fedsim.models import build_model, load_arrays, travelling
from fedsim.parts import Parts
from fedsim.population import Ledger, Population
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder, explain_os_error
from fedsim.scenario import Scenario
from fedsim.threat import Capability, Knowledge, Statistics
from fedsim.view import SavedViews, ServerView


def run(scenario: Scenario, grid: Grid, context: Context, folder: RunFolder) -> Path:
    """Run a scenario whose folder is made and whose parts are checked; return ``report.html``.

    Raises
    ------
    RunFailed
        When the run must not be believed, or could not go on; what it had saved stays.
    """
    parts = Parts(scenario)
    try:
        federate(parts, grid, context, folder)
        if parts.attack is not None:
            reconstruct(parts, parts.attack, folder)
        folder.gather_vault()
        return write_report(folder)
    except OSError as error:
        raise explain_os_error(error, folder.path) from error


def federate(parts: Parts, grid: Grid, context: Context, folder: RunFolder) -> None:
    """Train; the server in its role saves what it sees; ``federation.json`` says what happened."""
    scenario, started = parts.scenario, time.perf_counter()
    ledger = Ledger()
    role, receipts, knowledge = _server(parts, folder)
    channel = parts.channel
    population = _population(parts, grid, ledger, folder)
    told = partial(_federation_facts, parts, ledger, receipts, knowledge, started)
    accuracy = _train(
        parts, role, population, channel.grid(population, context, scenario.federation.timeout),
        on_round=lambda r, s: (folder.event("round", round=r, seconds=s),
                               folder.write("federation.json", told(None)))[0],
    )  # fmt: skip
    if scenario.audit.baseline:
        accuracy["baseline_after"] = _baseline(parts, grid, folder)
    folder.write("federation.json", told(accuracy))
    folder.event("federated", rounds=len(ledger.round_seconds))


def _server(parts: Parts, folder: RunFolder) -> tuple[Any, list[str], Knowledge | None]:
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
            applied, views, kind, parts.attack, knowledge, seal
        )
        return role, role.receipts, knowledge
    role = registry.components("role")["eavesdropper"](applied, views, kind)
    return role, role.receipts, None


def _population(parts: Parts, grid: Grid, ledger: Ledger, folder: RunFolder) -> Population:
    federation = parts.scenario.federation
    return Population(grid, federation.clients, ledger, federation.timeout, folder.path)


def _train(
    parts: Parts, role: Any, population: Population, grid: Grid, on_round: Any
) -> dict[str, float | None]:
    """Run the rounds; return accuracy on the hold-out before and after."""
    scenario = parts.scenario
    rounds = scenario.federation.rounds
    progress = Progress("federation", "rounds")
    refereed = Refereed(
        role,
        population,
        seed=scenario.seed,
        spec=parts.spec,
        batchnorm=scenario.model.batchnorm,
        on_round=lambda r, s: (progress(r, rounds), on_round(r, s))[0],
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
    population = _population(parts, grid, Ledger(), folder)
    honest = Applied(inner, lr, message_type="train.baseline")
    folder.event("baseline")
    return _train(parts, honest, population, population, lambda r, s: None)["after"]


def accuracy(parts: Parts, arrays: ArrayRecord, split: Split) -> float | None:
    """Return the share of a split that a model classifies rightly; None where it is empty."""
    if not len(split):
        return None
    model = build_model(parts.scenario.model.name, parts.spec).to(parts.dtype)
    load_arrays(model, {name: array.numpy() for name, array in arrays.items()})
    model = model.eval().to(parts.device)
    right = 0
    with torch.inference_mode():
        for indices in torch.arange(len(split)).split(512):
            images, labels = split.batch(indices, parts.dtype)
            predicted = model(images.to(parts.device)).argmax(dim=1).cpu()
            right += int((predicted == labels).sum())
    return right / len(split)


def _federation_facts(
    parts: Parts,
    ledger: Ledger,
    receipts: list[str],
    knowledge: Knowledge | None,
    started: float,
    accuracy: dict[str, float | None] | None,
) -> dict[str, Any]:
    federation = parts.scenario.federation
    return {
        "clients": federation.clients,
        "rounds": federation.rounds,
        "rounds_done": len(ledger.round_seconds),
        "seconds": time.perf_counter() - started,
        "round_seconds": ledger.round_seconds,
        "failures": ledger.failures,
        "bytes_up": ledger.bytes_up,
        "bytes_down": ledger.bytes_down,
        "accuracy": accuracy or {"before": None, "after": None, "baseline_after": None},
        "receipts": receipts,
        "used": sorted(capability.value for capability in knowledge.used) if knowledge else [],
        "channel": {"name": parts.channel.name, **parts.channel.figures()},
        "defenses_expected": [
            {"name": d.name, "must_change": d.changes_upload} for d in parts.defenses
        ],
        "detection": [],
    }


# -- reconstruction ------------------------------------------------------------------------------


class BlankedViews(Sequence[ServerView]):
    """Saved views without the number of examples, which an attack asks its knowledge for."""

    def __init__(self, saved: SavedViews) -> None:
        self.saved = saved

    def __len__(self) -> int:
        return len(self.saved)

    @overload
    def __getitem__(self, index: int) -> ServerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ServerView]: ...
    def __getitem__(self, index: int | slice) -> ServerView | list[ServerView]:
        if isinstance(index, slice):
            return [_blank(view) for view in self.saved[index]]
        return _blank(self.saved[index])

    def __iter__(self) -> Iterator[ServerView]:
        return (_blank(view) for view in self.saved)


def _blank(view: ServerView) -> ServerView:
    return dataclasses.replace(view, num_examples=None)


def reconstruct(parts: Parts, attack: Attack, folder: RunFolder) -> Path:
    """Let an attack work on the saved views, sealed off from the truth; save what it made.

    Raises
    ------
    RunFailed
        If the server saved no view.
    """
    saved = SavedViews(folder.path / "views")
    if not len(saved):
        raise RunFailed("the server saw no upload: there is nothing to reconstruct from")
    facts = saved.facts()
    knowledge = _knowledge(parts, folder, Progress(attack.name, "iterations"), attack)
    started = time.perf_counter()
    result: Reconstruction = run_sealed(
        attack.reconstruct, BlankedViews(saved), knowledge, paths=folder.sealed_paths()
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
    used = set(json.loads((folder.path / "federation.json").read_text()).get("used", []))
    return used | {Capability.MANIPULATION.value}


def _knowledge(
    parts: Parts, folder: RunFolder, progress: Progress, attack: Attack | None = None
) -> Knowledge:
    """Build what the scenario's threat model lets an attack know."""
    scenario = parts.scenario
    surrogate = split_test(parts.dataset.test, scenario.seed)[0]
    views = SavedViews(folder.path / "views").facts()
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
        statistics=partial(_statistics, parts),
        oracles=oracles,
        num_examples={fact["label"]: fact["num_examples"] for fact in views},
        progress=progress,
    )


def _statistics(parts: Parts, client: int) -> Statistics:
    labels = parts.dataset.train.labels[parts.partitions[client]]
    counts = torch.bincount(labels, minlength=parts.spec.num_classes)
    return Statistics(counts / counts.sum())


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

    folder.event("finished")
    verdict = judge(folder.path)
    page = report.write(folder.path, verdict)
    failed = json.loads((folder.path / "report.json").read_text()).get("failed")
    if failed:
        raise RunFailed(f"{failed} (report: {page})")
    return page

