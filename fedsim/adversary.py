"""What an attack is given, and how it runs: on saved views, out of reach of the truth."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedsim import reconstructions, seeds
from fedsim.attack import Active, Attack
from fedsim.audit.vault import Vault, VaultRecord
from fedsim.checkpoints import Checkpoints, SavedCheckpoints
from fedsim.data import split_test
from fedsim.errors import RunFailed
from fedsim.isolation import parent as isolation
from fedsim.isolation.walls import walls
from fedsim.models import build_model, load_arrays
from fedsim.models.statistics import LayerStatistics, layer_statistics
from fedsim.parts import Parts
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder, plainly
from fedsim.threat import THREAT_MODELS, Capability, Knowledge, Statistics
from fedsim.view import SavedViews, ServerView, load_view


def reconstruct(
    parts: Parts, attack: Attack, folder: RunFolder, into: RunFolder | None = None
) -> Path:
    """Let an attack work on the saved views, in a process of its own; save what it made.

    ``into`` is where to save it, where that is not the run's own folder.

    Raises
    ------
    RunFailed
        If the server saved no view, the attack cannot work on them, or it reached for what it
        must not see.
    NotGranted
        If the attack asked for what its threat model does not grant.
    """
    with plainly(folder):
        return _reconstruct(parts, attack, folder, into or folder)


def _reconstruct(parts: Parts, attack: Attack, folder: RunFolder, into: RunFolder) -> Path:
    saved = SavedViews(folder.path / "views")
    if not len(saved):
        raise RunFailed("the server saw no upload: there is nothing to reconstruct from")
    isolation.prepare(attack)
    facts = saved.facts()
    progress = Progress(attack.name, attack.unit)
    kept = SavedCheckpoints(
        folder.path, reconstructions.slug(parts.scenario.attack), parts.scenario, progress.resumed
    )
    knowledge = build_knowledge(parts, folder, progress, attack, kept)
    started = time.perf_counter()
    result = isolation.reconstruct(attack, saved, knowledge, walls(parts, folder))
    seconds = kept.earlier + time.perf_counter() - started
    cost = dataclasses.replace(result.cost, seconds=seconds)
    receipts = (*result.receipts, *_cut_off(kept, knowledge))
    result = dataclasses.replace(result, cost=cost, receipts=receipts)
    told = reconstructions.Facts(
        expression=parts.scenario.attack,
        name=attack.name,
        paper=attack.paper.cited(),
        used=tuple(sorted({c.value for c in knowledge.used} | used_in_crafting(folder))),
        oracles=tuple(sorted(knowledge.oracles_used)),
        view_labels=tuple(fact["label"] for fact in facts),
        senders=tuple(tuple(fact["senders"]) for fact in facts),
        rounds=tuple(fact["round"] for fact in facts),
    )
    try:
        path = reconstructions.save(into.path / "reconstructions", result, told)
    except ValueError as error:
        raise RunFailed(f"what {attack.name} returned cannot be judged: {error}") from error
    into.event("reconstructed", attack=parts.scenario.attack, seconds=seconds)
    knowledge.forget()
    return path


def _cut_off(kept: SavedCheckpoints, knowledge: Knowledge) -> Iterator[str]:
    """Say in the receipts what nobody would tell from the figures."""
    if kept.earlier:
        yield f"went on from what an attempt before had kept after {kept.earlier:.1f} s"
    if knowledge.stopping:
        yield "Ctrl-C asked for the best so far: it may have ended before it was done"


def used_in_crafting(folder: RunFolder) -> set[str]:
    """Return the grants that made the capture what it is, whichever attack works on it."""
    if not isinstance(Parts(folder.scenario).attack, Active):
        return set()
    told = folder.path / "federation.json"
    used = json.loads(told.read_text())["used"] if told.exists() else []
    return {*used, Capability.MANIPULATION.value}


def build_knowledge(
    parts: Parts,
    folder: RunFolder,
    progress: Progress,
    attack: Attack | None = None,
    checkpoints: Checkpoints | None = None,
) -> Knowledge:
    """Build what the scenario's threat model lets an attack know, and load it: later it is sealed.

    ``attack`` is None while a manipulator crafts: there is no oracle before anybody has trained.
    """
    scenario = parts.scenario
    surrogate = split_test(parts.dataset.test, scenario.seed)[0]
    saved = SavedViews(folder.path / "views")
    views = saved.facts()
    statistics: dict[int, Statistics] = {}
    if Capability.STATISTICS in THREAT_MODELS[scenario.threat_model]:
        statistics = _statistics(parts)
    granted = parts.oracles & attack.oracles if attack is not None else frozenset()
    oracles = _oracles(parts, folder, saved, granted)
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
        clients=scenario.federation.clients,
        known=parts.known,
        progress=progress,
        checkpoints=checkpoints,
    )


def _statistics(parts: Parts) -> dict[int, Statistics]:
    """Return every client's class distribution."""
    labels, classes = parts.dataset.train.labels, parts.spec.num_classes
    counted = [torch.bincount(labels[own], minlength=classes) for own in parts.partitions]
    return {client: Statistics(counts / counts.sum()) for client, counts in enumerate(counted)}


def _oracles(
    parts: Parts, folder: RunFolder, saved: SavedViews, granted: frozenset[str]
) -> dict[str, Callable[[ServerView], Any]]:
    """Read the truth behind each view, as far as it is granted; by the oracle's name."""
    if not granted:
        return {}
    folder.gather_vault()
    vault = Vault(folder.path / "vault")
    told: dict[str, dict[str, Any]] = {name: {} for name in granted}
    for fact, path in zip(saved.facts(), saved.paths, strict=True):
        records = [vault.record(client, fact["round"]) for client in fact["senders"]]
        if any(record is None for record in records):
            raise RunFailed(
                f"the {' and '.join(sorted(granted))} oracle needs the vault, and it is not here: "
                "run fedsim report RUN --vault DIR, then fedsim attack RUN EXPRESSION"
            )
        truth = [record for record in records if record is not None]
        if "labels" in told:
            told["labels"][fact["label"]] = torch.cat([record.labels for record in truth])
        if "batchnorm" in told:
            told["batchnorm"][fact["label"]] = _true_statistics(parts, load_view(path), truth)
    return {name: partial(_of_view, truth) for name, truth in told.items()}


def _of_view(truth: dict[str, Any], view: ServerView) -> Any:
    return truth[view.label]


def _true_statistics(
    parts: Parts, view: ServerView, records: Sequence[VaultRecord]
) -> LayerStatistics:
    """Return what the true images put into each BatchNorm layer of the model sent, on the CPU.

    Every sender sent its own batch through the model; of an aggregate, these are pooled.
    """
    model = build_model(view.model, parts.spec).to(parts.dtype)
    load_arrays(model, view.sent)
    model.train(parts.scenario.model.batchnorm != "frozen").to(parts.device)
    each = [layer_statistics(model, record.examples) for record in records]
    sizes = torch.tensor([float(len(record.examples)) for record in records])
    shares = (sizes / sizes.sum()).unsqueeze(1)
    pooled = {}
    for name in each[0]:
        means, variances = (torch.stack([one[name][i].cpu() for one in each]) for i in (0, 1))
        mean = (shares.to(means) * means).sum(dim=0)
        spread = variances + (means - mean).square()
        pooled[name] = mean, (shares.to(means) * spread).sum(dim=0)
    return pooled
