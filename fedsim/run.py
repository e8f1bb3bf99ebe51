"""One run, from a scenario to a report: the walk that every engine takes.

scenario -> federation -> what the server saw -> reconstruction -> audit -> report.  Each step
leaves plain files in the run folder; the next one starts from them.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedsim import registry, report
from fedsim.adversary import build_knowledge, reconstruct
from fedsim.attack import Active, Manipulation
from fedsim.data import DataSpec, Split, split_test
from fedsim.defense import Defense, Privacy, Rank, ServerContext, guarantees
from fedsim.errors import RunFailed
from fedsim.federation import Applied, Refereed, build_strategy
from fedsim.interception import Interception
from fedsim.isolation import parent as isolation
from fedsim.isolation.walls import cell
from fedsim.manipulated import manipulation_facts
from fedsim.models import build_model, load_arrays, save_weights, travelling
from fedsim.parts import Parts, defended_strategy, server_context
from fedsim.population import Ledger, Population, Tap, client_of
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder, plainly
from fedsim.scenario import Scenario
from fedsim.threat import Knowledge
from fedsim.view import SavedViews


def run(scenario: Scenario, grid: Grid, context: Context, folder: RunFolder) -> Path:
    """Run a scenario whose folder is made and whose parts are checked; return ``report.html``.

    Raises
    ------
    RunFailed
        When the run must not be believed, or could not go on; what it had saved stays.
    """
    parts = Parts(scenario)
    if parts.attack is not None:
        isolation.prepare(parts.attack)  # it loads its libraries while clients train
    with plainly(folder):
        answered = federate(parts, grid, context, folder)
    if parts.attack is not None and answered:
        reconstruct(parts, parts.attack, folder)
    with plainly(folder):
        folder.gather_vault()
    return write_report(folder)


def federate(parts: Parts, grid: Grid, context: Context, folder: RunFolder) -> bool:
    """Train; the server in its role saves what it sees; ``federation.json`` says what happened.

    Returns whether anything reached the server: not where clients refused, all or so many that
    secure aggregation halted, in every round.
    """
    scenario = parts.scenario
    acting = server_context(parts, context.run_id)
    role, receipts, knowledge = _server(parts, folder, acting)
    history = History(parts, Ledger(), receipts, knowledge, acting.figures)

    accuracy = _federated(role, grid, context, history, folder)
    honest = accuracy.pop("last_honest")
    if isinstance(parts.attack, Manipulation):
        history.manipulation = _manipulation(parts, role, honest)
    history.seconds = time.perf_counter() - history.started
    if scenario.audit.baseline:
        accuracy["baseline_after"] = _baseline(parts, grid, folder)
    folder.write("federation.json", history.facts(accuracy))
    folder.event("federated", rounds=len(history.ledger.round_seconds))
    if refused := _only_refused(parts, history.ledger, folder):
        folder.event("refused", rounds=len(history.ledger.round_seconds))
    return not refused


def _federated(
    role: Strategy, grid: Grid, context: Context, history: "History", folder: RunFolder
) -> dict[str, float | None]:
    """Run the federation's rounds behind its channel; return the accuracies of :func:`_train`."""
    parts = history.parts

    def on_round(server_round: int, seconds: float) -> None:
        folder.event("round", round=server_round, seconds=seconds)
        folder.write("federation.json", history.facts())

    with (
        _tidied(parts, context.run_id),
        closing(_population(parts, grid, history.ledger, folder)) as population,
    ):
        population.clients += parts.sybils
        if isinstance(parts.attack, Interception):
            population.tap = cast(Tap, role)
        behind = parts.channel.grid(population, context, parts.scenario.federation.timeout)
        watch = Watch(parts, parts.architecture, folder.path)
        return _train(role, population, behind, on_round, watch, called="federation")


@contextmanager
def _tidied(parts: Parts, run_id: int) -> Iterator[None]:
    """Delete, afterwards, what clients on this machine told each other in this run."""
    try:
        yield
    finally:
        for folder in parts.shared():
            shutil.rmtree(folder / str(run_id), ignore_errors=True)


def _manipulation(parts: Parts, role: Any, honest: float | None) -> dict[str, Any] | None:
    """Compare what the federation's clients got in the last round with the honest model."""
    clients = parts.scenario.federation.clients
    sent = {node: what for node, what in role.sent.items() if client_of(node) < clients}
    if not sent:
        return None
    holdout = split_test(parts.dataset.test, parts.scenario.seed)[1]

    def measure(expression: str, arrays: ArrayRecord) -> float | None:
        return accuracy(parts, arrays, holdout, expression)

    return manipulation_facts(role.honest, sent, honest, measure)


def _only_refused(parts: Parts, ledger: Ledger, folder: RunFolder) -> bool:
    """Say whether nothing of any client arrived, for no other reason than that clients refused."""
    arrived = ledger.rounds_aggregated
    if parts.attack is not None:  # the upload of a sybil is nobody's
        arrived = len(SavedViews(folder.path / "views"))
    return not arrived and ledger.only_refusals()


def _server(
    parts: Parts, folder: RunFolder, acting: ServerContext
) -> tuple[Strategy, list[str], Knowledge | None]:
    """Build the strategy in its role; what the role writes down, and what it may know."""
    lr = parts.local.lr if parts.local.kind == "gradient" else None
    applied = Applied(defended_strategy(parts, acting), lr)
    if parts.attack is None:
        return applied, [], None
    views, kind = folder.path / "views", parts.local.kind
    if not isinstance(parts.attack, Active):
        role = registry.components("role")["eavesdropper"](applied, views, kind)
        return role, role.receipts, None
    manipulates = isinstance(parts.attack, Manipulation)
    at_work = Progress("crafting" if manipulates else "intercepting", "steps")
    knowledge = build_knowledge(parts, folder, at_work)
    role = registry.components("role")["manipulator" if manipulates else "interceptor"](
        applied, views, kind, attack=parts.attack, knowledge=knowledge, seal=cell(parts, folder)
    )
    return role, role.receipts, knowledge


def _population(parts: Parts, grid: Grid, ledger: Ledger, folder: RunFolder) -> Population:
    federation = parts.scenario.federation
    return Population(grid, federation.clients, ledger, federation.timeout, folder.path)


@dataclass
class Watch:
    """Measures a model on the hold-out before, between and after rounds, and saves the last.

    ``expression`` is the model that is trained, ``into`` a folder for what came of it;
    ``measured`` its accuracy by round, 0 before any.
    """

    parts: Parts
    expression: str
    into: Path | None = None
    measured: dict[int, float | None] = field(default_factory=dict)

    @cached_property
    def _holdout(self) -> Split:
        return split_test(self.parts.dataset.test, self.parts.scenario.seed)[1]

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Look at what a round made; Flower's ``evaluate_fn``."""
        rounds = self.parts.scenario.federation.rounds
        if server_round in (0, rounds - 1, rounds):
            found = accuracy(self.parts, arrays, self._holdout, self.expression)
            self.measured[server_round] = found
        if server_round == rounds and self.into:
            save_weights(self.into, {name: array.numpy() for name, array in arrays.items()})
        return None


def _train(
    role: Strategy,
    population: Population,
    grid: Grid,
    on_round: Callable[[int, float], None],
    watch: Watch,
    *,
    called: str,
) -> dict[str, float | None]:
    """Run the rounds; return accuracy on the hold-out before and after."""
    parts, scenario = watch.parts, watch.parts.scenario
    rounds = scenario.federation.rounds
    progress = Progress(called, "rounds")

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
    refereed.start(
        grid=grid,
        initial_arrays=ArrayRecord(travelling(parts.model(watch.expression))),
        num_rounds=rounds,
        timeout=scenario.federation.timeout,
        train_config=ConfigRecord({"model": watch.expression, **_told(parts.spec)}),
        evaluate_fn=watch,
    )
    population.ledger.rounds_aggregated = refereed.rounds_aggregated
    if not refereed.rounds_aggregated and not population.ledger.only_refusals():
        reasons = sorted({str(f["reason"]) for f in population.ledger.failures})
        raise RunFailed(f"no round had a usable reply: {'; '.join(reasons) or 'no reply at all'}")
    named = {"before": 0, "last_honest": rounds - 1, "after": rounds}
    return {**{n: watch.measured.get(at) for n, at in named.items()}, "baseline_after": None}


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
        watch = Watch(parts, parts.scenario.model.name)
        measured = _train(honest, population, population, lambda *_: None, watch, called="baseline")
    return measured["after"]


def accuracy(parts: Parts, arrays: ArrayRecord, split: Split, expression: str) -> float | None:
    """Return the share of a split that a model classifies rightly; None where it is empty.

    ``expression`` is the model that the arrays are of.  Where clients keep
    BatchNorm's statistics to themselves there are none to classify with: it takes those of up to
    512 images at once, as clients in training take their batch's.
    """
    if not len(split):
        return None
    model = build_model(expression, parts.spec).to(parts.dtype)
    load_arrays(model, {name: array.numpy() for name, array in arrays.items()})
    model = model.eval().to(parts.device)
    if parts.scenario.model.batchnorm == "private":
        for layer in model.modules():
            layer.train(isinstance(layer, nn.modules.batchnorm._BatchNorm))
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

    ``knowledge`` is a manipulator's, whose uses while it crafts are grants used; ``server`` is
    what defenses had the server do; ``seconds`` are those of a federation that is done, without
    its baseline.
    """

    parts: Parts
    ledger: Ledger
    receipts: list[str]
    knowledge: Knowledge | None
    server: dict[str, dict[str, float]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None
    manipulation: dict[str, Any] | None = None

    @cached_property
    def privacy(self) -> list[dict[str, Any]]:
        """Formal guarantees, each for the client that it protects least.

        Who that is hangs on sampling rate and steps together: it may be of any size.
        """
        sizes = {len(own) for own in self.parts.partitions}
        least: dict[str, Privacy] = {}
        for examples in sorted(sizes):
            plan = self.parts.plan(examples)
            sums = self.parts.channel.aggregates
            for name, found in guarantees(self.parts.defenses, plan, sums=sums).items():
                if name not in least or found.epsilon > least[name].epsilon:
                    least[name] = found
        of_sums = {d.name for d in self.parts.defenses if d.of_sums}
        told = [
            {"name": name, **dataclasses.asdict(found), "of_sums": name in of_sums}
            for name, found in least.items()
        ]
        at_server = {d.name for d in self.parts.defenses if d.rank is Rank.SERVER}
        for one in told:
            if one["name"] not in at_server and self._counts_tell(one["unit"]):
                one["mechanism"] += "; the number of examples is sent beside it, not covered"
            if self.parts.scenario.audit.baseline:
                one["mechanism"] += "; what clients sent for the baseline is not covered"
        return [one if isfinite(one["epsilon"]) else {**one, "epsilon": None} for one in told]

    def _counts_tell(self, unit: str) -> bool:
        """Say whether a client's count of examples tells of one unit's data.

        A full batch's does not.  The sum of all counts tells of no client's, and is still one more
        or less where one example is.
        """
        plans = [self.parts.plan(len(own)) for own in self.parts.partitions]
        full = all(p.kind == "gradient" and p.batch_size <= p.examples for p in plans)
        return not full and (unit == "example" or not self.parts.channel.aggregates)

    def _withheld(self, name: str) -> str:
        """Say in which round a sum held less of the noise than a defense's promise counts on."""
        needed = next(d.in_each_sum for d in self.parts.defenses if d.name == name)
        clients = self.parts.scenario.federation.clients
        for server_round, together in self.ledger.summed.items():
            own = sum(client < clients for client in together)
            if own < needed:
                told = f"the sum of round {server_round} held the noise of {own}"
                return f"{told} of the {needed} clients that it counts on"
        return ""

    def facts(self, accuracy: dict[str, float | None] | None = None) -> dict[str, Any]:
        """Return what is known so far."""
        federation, ledger = self.parts.scenario.federation, self.ledger
        used = self.knowledge.used if self.knowledge else ()
        return {
            "clients": federation.clients,
            "rounds": federation.rounds,
            "rounds_done": len(ledger.round_seconds),
            "seconds": self.seconds or time.perf_counter() - self.started,
            "round_seconds": ledger.round_seconds,
            "failures": ledger.failures,
            "bytes_up": ledger.bytes_up,
            "bytes_down": ledger.bytes_down,
            "accuracy": accuracy or {"before": None, "after": None, "baseline_after": None},
            "receipts": self.receipts,
            "used": sorted(capability.value for capability in used),
            "channel": {"name": self.parts.channel.name, **self.parts.channel.figures()},
            "defenses_expected": [
                {
                    "name": d.name,
                    "must_change": d.changes_upload,
                    "at_server": type(d).strategy is not Defense.strategy,
                }
                for d in self.parts.defenses
            ],
            "privacy": [{**one, "withheld": self._withheld(one["name"])} for one in self.privacy],
            "server": self.server,
            "refusals": ledger.refusals(federation.clients),
            "manipulation": self.manipulation,
        }


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


__all__ = ["accuracy", "federate", "reconstruct", "run", "write_report"]
