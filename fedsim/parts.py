"""A scenario's components, built and checked against each other before any client trains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError
from torch import nn

from fedsim import registry, seeds
from fedsim.attack import Active, Attack, Manipulation, Setting
from fedsim.chain import check_chain
from fedsim.channel import Channel
from fedsim.data import DataSet, DataSpec, load_dataset, partition
from fedsim.defense import (
    Defense,
    ServerContext,
    TrainingPlan,
    guarantees,
)
from fedsim.errors import ScenarioError
from fedsim.federation import build_strategy, least_share, unfit_strategy
from fedsim.files import unwritable
from fedsim.local import Local
from fedsim.models import (
    build_model,
    initial_model,
    is_buffer,
    load_arrays,
    saved_weights,
    trained_tensors,
    travelling,
)
from fedsim.scenario import Scenario
from fedsim.threat import ORACLES, THREAT_MODELS, least_model
from fedsim.view import ServerView


@dataclass(frozen=True)
class Parts:
    """What a scenario's expressions stand for; each is built when first asked for."""

    scenario: Scenario

    @cached_property
    def attack(self) -> Attack | None:
        """The attack, or None for an honest server."""
        found = registry.parse(self.scenario.attack, "attack")
        if len(found) > 1:
            raise ScenarioError("attack", self.scenario.attack, "one attack a run")
        attack: Attack | None = registry.build("attack", found[0], "attack") if found else None
        return attack

    @property
    def sybils(self) -> int:
        """How many devices of the attacker's own join the federation."""
        return self.attack.sybils if isinstance(self.attack, Manipulation) else 0

    @cached_property
    def oracles(self) -> frozenset[str]:
        """The oracle grants the scenario names."""
        text = self.scenario.oracles
        named = [] if text in ("", "none") else [name.strip() for name in text.split(",")]
        for name in named:
            if name not in ORACLES:
                raise ScenarioError("oracles", text, registry.nearest(name, list(ORACLES)))
        return frozenset(named)

    @cached_property
    def defenses(self) -> tuple[Defense, ...]:
        """The chain of defenses, in the order a client applies them."""
        found = registry.parse(self.scenario.defenses, "defenses")
        return tuple(registry.build("defense", one, "defenses") for one in found)

    @cached_property
    def channel(self) -> Channel:
        """What reaches the server."""
        channel: Channel = registry.build("channel", self.scenario.channel, "channel")
        return channel

    def shared(self) -> list[Path]:
        """Return the folders in which clients tell each other what the server must not touch."""
        told = [self.channel.shared(), *(defense.shared() for defense in self.defenses)]
        return [path for folders in told for path in folders]

    @cached_property
    def local(self) -> Local:
        """What a client does in a round."""
        local: Local = registry.build("local", self.scenario.federation.local, "federation.local")
        return local

    @cached_property
    def dataset(self) -> DataSet:
        """The data set."""
        return load_dataset(self.scenario.data.dataset)

    @cached_property
    def spec(self) -> DataSpec:
        """The data set's public facts."""
        return _spec(self.scenario.data.dataset)

    @cached_property
    def partitions(self) -> list[torch.Tensor]:
        """Indices into the train split, one tensor for each client."""
        return partition(
            self.scenario.data.partition,
            self.dataset.train.labels,
            self.scenario.federation.clients,
            self.scenario.seed,
        )

    @cached_property
    def known(self) -> tuple[torch.Tensor, ...]:
        """Private images that the attacker holds too, each ``[C, H, W]`` float64 in ``[0, 1]``."""
        text, count = self.scenario.data.known, len(self.dataset.train)
        places = [] if text == "none" else [int(word) for word in text.split(",")]
        if len(set(places)) < len(places):
            raise ScenarioError("data.known", text, "an image stands there twice; name each once")
        if beyond := [place for place in places if place >= count]:
            raise ScenarioError(
                "data.known", text, f"there are {count} private images; {beyond[0]} is none of them"
            )
        wanted = torch.tensor(places, dtype=torch.int64)
        return tuple(self.dataset.train.batch(wanted, torch.float64)[0])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating-point type of models, training and uploads."""
        return {"float32": torch.float32, "float64": torch.float64}[
            self.scenario.federation.precision
        ]

    @cached_property
    def device(self) -> torch.device:
        """Where clients train and the attack computes."""
        wanted = self.scenario.federation.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    @cached_property
    def architecture(self) -> str:
        """The model expression that is shared: the scenario's, as the defenses have it."""
        expression = self.scenario.model.name
        for defense in self.defenses:
            expression = defense.architecture(expression)
        return expression

    def plan(self, examples: int) -> TrainingPlan:
        """What a client with so many examples will do."""
        plan = self.local.plan(examples, self.scenario.federation.rounds)
        return replace(plan, tensors=self.trained_tensors)

    @cached_property
    def trained_tensors(self) -> int:
        """How many arrays of the shared model are trained."""
        return trained_tensors(build_model(self.architecture, self.spec))

    def model(self, expression: str | None = None) -> nn.Module:
        """Return the federation's model, or another, with the weights that training starts from.

        Raises
        ------
        ScenarioError
            If ``model.weights`` names no file with such a model's weights.
        """
        name, weights = expression or self.architecture, self.scenario.model.weights
        model = initial_model(name, self.spec, self.scenario.seed).to(self.dtype)
        if weights != "none":
            try:
                found = saved_weights(seeds.home() / Path(weights).expanduser())
                if lost := [name for name, array in found.items() if not array.isfinite().all()]:
                    raise ValueError(f"{lost[0]} is not finite")
                load_arrays(model, found)
            except (OSError, SafetensorError) as error:
                remedy = f"cannot be read ({error}); name a .safetensors file or a run's folder"
                raise ScenarioError("model.weights", weights, remedy) from error
            except ValueError as error:
                remedy = f"these are not the weights of {name} on this data: {error}"
                raise ScenarioError("model.weights", weights, remedy) from error
        return model

    def sent_model(self, views: Sequence[ServerView]) -> nn.Module:
        """Return the federation's model as the senders of a capture's first view got it.

        What training started from may be gone since.  Weights are as drawn anew where the server
        saw nothing or sent another architecture.

        Raises
        ------
        ScenarioError
            If the first view cannot be read, or its arrays are not of its model.
        """
        name = self.architecture
        model = initial_model(name, self.spec, self.scenario.seed).to(self.dtype)
        if len(views) and (first := views[0]).model == name:
            try:
                load_arrays(model, first.sent)
            except ValueError as error:
                raise ScenarioError("views", first.label, str(error)) from error
        return model


@lru_cache(maxsize=4)
def _spec(expression: str) -> DataSpec:
    return load_dataset(expression).spec


def server_context(parts: Parts, run_id: int = 0) -> ServerContext:
    """Return what the server's part of the defenses may know; 0 is of no run, for checks."""
    federation, seed = parts.scenario.federation, parts.scenario.seed
    return ServerContext(
        cohort=int(federation.clients * federation.fraction),
        rounds=federation.rounds,
        secret=lambda *names: seeds.secret_generator(seed, "server", *names, run_id=run_id),
    )


def defended_strategy(parts: Parts, ctx: ServerContext) -> Strategy:
    """Build the Flower strategy, with what defenses have the server itself do around it.

    Raises
    ------
    ScenarioError
        If a defense cannot act around this strategy.
    """
    federation = parts.scenario.federation
    strategy = build_strategy(federation.strategy, federation.fraction)
    for defense in parts.defenses:
        try:
            strategy = defense.strategy(strategy, ctx)
        except ValueError as error:
            raise ScenarioError("federation.strategy", federation.strategy, str(error)) from error
    return strategy


def check(parts: Parts, *, here: bool = True, captured: Sequence[ServerView] | None = None) -> None:
    """Refuse, before any client trains, whatever cannot run or would silently do nothing.

    ``here`` says whether clients are going to run on this machine; ``captured`` are the views of a
    federation that has run, whose model is checked instead of the one to start from.

    Raises
    ------
    ScenarioError
        Naming the key, the value and what would be right.
    """
    scenario = parts.scenario
    if scenario.federation.device == "cuda" and not torch.cuda.is_available():
        raise ScenarioError("federation.device", "cuda", "no CUDA device here; 'auto' or 'cpu'")
    _check_audit(parts)
    _check_adversary(parts)
    check_chain(parts.defenses, scenario.defenses)
    _check_federation(parts)
    model = parts.model() if captured is None else parts.sent_model(captured)
    for key, component in _fitting(parts):
        try:
            component.check(model, parts.local.kind)
        except ValueError as error:
            raise ScenarioError(key, component.name, str(error)) from error
    _check_statistics(parts, model)
    _check_setting(parts, model, here)
    empty = [client for client, indices in enumerate(parts.partitions) if not len(indices)]
    if empty:
        remedy = f"client {empty[0]} (and {len(empty) - 1} more) would hold no example"
        raise ScenarioError("data.partition", scenario.data.partition, remedy)


def _check_statistics(parts: Parts, model: nn.Module) -> None:
    """Refuse a policy for statistics that there are not, or that voids a formal guarantee."""
    policy = parts.scenario.model.batchnorm
    if policy == "frozen":
        return
    # Without BatchNorm, what the policy still decides is whether dropout is on.
    drops = any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in model.modules())
    if not drops and not any(is_buffer(name) for name in travelling(model)):
        remedy = f"{parts.scenario.model.name} has no BatchNorm; write 'frozen', or use a model "
        raise ScenarioError("model.batchnorm", policy, f"{remedy}that has it (resnet20)")
    if policy == "private":
        return
    # Whatever the scenario's own model has: a server may ask for another one's statistics.
    plan = parts.plan(len(parts.partitions[0]))
    if promising := sorted(guarantees(parts.defenses, plan, sums=parts.channel.aggregates)):
        remedy = "statistics that clients send of any model the server asks for bypass "
        remedy += f"{promising[0]} and void its guarantee; use 'frozen' or 'private'"
        raise ScenarioError("model.batchnorm", policy, remedy)


def _check_federation(parts: Parts) -> None:
    """Check who trains, what aggregates, and whether the channel can carry it."""
    federation, channel = parts.scenario.federation, parts.channel
    cohort = int(federation.clients * federation.fraction)  # as Flower's strategies count
    if cohort < 1:
        remedy = f"of {federation.clients} clients none would train; at least "
        remedy += f"{least_share(federation.clients)}"
        raise ScenarioError("federation.fraction", federation.fraction, remedy)
    strategy = build_strategy(federation.strategy, federation.fraction)
    if reason := unfit_strategy(strategy, parts.local.kind, cohort, channel.aggregates):
        raise ScenarioError("federation.strategy", federation.strategy, reason)
    defended_strategy(parts, server_context(parts))
    most = max(map(len, parts.partitions))
    try:
        parts.local.check(most)
    except ValueError as error:
        raise ScenarioError("federation.local", federation.local, str(error)) from error
    plans = [parts.local.plan(len(own), federation.rounds) for own in parts.partitions if len(own)]
    weights = [_weight(plan) for plan in plans]
    try:
        channel.check(cohort, max(weights))
        channel.check_lightest(min(weights))
    except ValueError as error:
        raise ScenarioError("channel", parts.scenario.channel, str(error)) from error


def _weight(plan: TrainingPlan) -> int:
    """Return the most examples that a client can see in a round, and report as its weight."""
    return min(plan.examples, plan.steps * plan.batch_size)


def _fitting(parts: Parts) -> list[tuple[str, Attack | Defense]]:
    attacks: list[tuple[str, Attack | Defense]] = [("attack", parts.attack)] if parts.attack else []
    return attacks + [("defenses", defense) for defense in parts.defenses]


def _check_adversary(parts: Parts) -> None:
    scenario, attack = parts.scenario, parts.attack
    wanted = attack.oracles if attack else frozenset()
    if not wanted <= parts.oracles:
        every = ", ".join(sorted(wanted))
        remedy = f"{scenario.attack} needs the oracle; write oracles = {every!r}, and the report"
        raise ScenarioError("oracles", scenario.oracles, f"{remedy} wears a badge")
    if idle := sorted(parts.oracles - wanted):
        remedy = f"nothing here would use {idle[0]!r}; leave it out"
        raise ScenarioError("oracles", scenario.oracles, remedy)
    _check_known(parts)
    if attack is None:
        return
    granted = THREAT_MODELS[scenario.threat_model]
    if lacking := sorted(need.value for need in attack.required - granted):
        least = least_model(attack.required)
        asks = attack.name if attack.required == attack.needs else scenario.attack
        remedy = f"{asks} needs {', '.join(lacking)}; the least threat model is {least}"
        raise ScenarioError("threat-model", scenario.threat_model, remedy)
    if isinstance(attack, Manipulation) and "manipulation" not in granted:
        remedy = f"{attack.name} changes the model that clients get; use F, G or H"
        raise ScenarioError("threat-model", scenario.threat_model, remedy)


def _check_setting(parts: Parts, model: nn.Module, here: bool) -> None:
    federation = parts.scenario.federation
    setting = Setting(
        model=model,
        clients=federation.clients,
        cohort=int(federation.clients * federation.fraction),
        examples=tuple(map(len, parts.partitions)),
        training=parts.local.details(),
        batchnorm=parts.scenario.model.batchnorm,
        channel=parts.channel,
        sybils=parts.sybils,
        here=here,
    )
    try:
        parts.channel.check_model(list(travelling(model)), active=isinstance(parts.attack, Active))
    except ValueError as error:
        raise ScenarioError("channel", parts.scenario.channel, str(error)) from error
    for key, component in _fitting(parts):
        try:
            component.check_setting(setting)
        except ScenarioError:
            raise
        except ValueError as error:
            raise ScenarioError(key, getattr(parts.scenario, key), str(error)) from error


def _check_known(parts: Parts) -> None:
    """Check that an attack that asks has what to ask about, and that no other holds the truth."""
    asks, text = parts.attack is not None and parts.attack.asks, parts.scenario.data.known
    if asks and not parts.known:
        remedy = f"{parts.scenario.attack} asks whose an image is; name one, as in '17'"
        raise ScenarioError("data.known", text, remedy)
    if parts.known and not asks:
        raise ScenarioError("data.known", text, "nothing here would ask about it; write 'none'")


def _check_audit(parts: Parts) -> None:
    """Check the criterion's grammar, and that a baseline would differ from the run."""
    from fedsim.audit.criterion import parse_criterion

    parse_criterion(parts.scenario.audit.criterion)
    plain = parts.channel.name == Scenario.model_fields["channel"].default
    if parts.scenario.audit.baseline and parts.attack is None and not parts.defenses and plain:
        remedy = "without attack, defense and channel the run is its own baseline; write false"
        raise ScenarioError("audit.baseline", True, remedy)


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written to, or made; leave nothing behind.

    Raises
    ------
    ScenarioError
        Naming ``output.dir``.
    """
    if reason := unwritable(folder):
        remedy = f"cannot be written to: {reason}; name another folder"
        raise ScenarioError("output.dir", str(folder), remedy)
