"""One federation: any Flower strategy inside, a role around it, the range's bookkeeping outside.

From the outside in: :class:`Refereed` (repeatable sampling, broken replies, the ledger), the role
(nobody, or what ``strategies`` registers), :class:`Applied` (uploads of any kind become what the
strategy expects: full weights), and the Flower strategy itself.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging import WARNING
from typing import Annotated, Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from pydantic import Field

from fedsim import registry, seeds
from fedsim.data import DataSpec
from fedsim.errors import RunFailed, ScenarioError
from fedsim.models import build_model, is_buffer, uploaded_names
from fedsim.placing import places_in, whole_shape
from fedsim.population import Ledger, Population, client_of
from fedsim.spool import lazily

#: Parameters of Flower strategies that no scenario may set: the range does, or nobody reads them.
OURS = {
    "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes",
    "min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key",
    "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule", "eta_l",
}  # fmt: skip
_INSTEAD = {
    "eta_l": "Flower keeps it and never reads it; leave it out: clients train with the lr of "
    "federation.local"
}
_Above = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
# Flower checks none of these, and beyond them a strategy does nothing, or divides by zero.
_LIMITS = {
    "eta": _Above,
    "tau": _Above,
    "beta_1": _Share,
    "beta_2": _Share,
    "server_learning_rate": _Above,
    "server_momentum": _Share,
    "num_malicious_nodes": Annotated[int, Field(ge=0)],
    "num_nodes_to_select": Annotated[int, Field(ge=1)],
}


def inner_strategies() -> dict[str, type[Strategy]]:
    """Return Flower's strategies by lower-case name, those that average arrays."""
    return {
        name.lower(): getattr(flower_strategies, name)
        for name in flower_strategies.__all__
        if name not in ("Strategy", "Result")
        and not name.startswith(("DifferentialPrivacy", "FedXgb", "QFedAvg"))
    }


def build_strategy(expression: str, fraction: float) -> Strategy:
    """Build the Flower strategy that a scenario names.

    Raises
    ------
    ScenarioError
        If Flower has no such strategy, or it has no such parameter.
    """
    key = "federation.strategy"
    found = registry.parse(expression, key)
    known = inner_strategies()
    if len(found) != 1 or found[0].name not in known:
        remedy = f"no such strategy; {registry.nearest(expression, list(known))}"
        raise ScenarioError(key, expression, remedy)
    strategy: Any = known[found[0].name]
    if taken := sorted(OURS & found[0].arguments.keys()):
        ours = "the range sets this itself (federation.fraction says who trains)"
        remedy = _INSTEAD.get(taken[0], ours)
        raise ScenarioError(f"{key}: {taken[0]}", found[0].arguments[taken[0]], remedy)
    arguments = registry.check_arguments(strategy, found[0], key, ours=OURS, limits=_LIMITS)
    try:
        with _no_warnings():
            built: Strategy = strategy(
                **arguments,
                fraction_train=fraction,
                fraction_evaluate=0.0,
                min_train_nodes=1,
                min_available_nodes=1,
            )
        return built
    except (TypeError, ValueError) as error:
        raise ScenarioError(key, expression, str(error)) from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep Flower from warning of what the range wants: it evaluates on the server."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def unfit_strategy(strategy: Strategy, kind: str, cohort: int, aggregates: bool) -> str | None:
    """Say why a strategy would do nothing, or not what it is for, in this federation."""
    choosing = (
        flower_strategies.FedMedian,
        flower_strategies.FedTrimmedAvg,
        flower_strategies.MultiKrum,  # and Krum
        flower_strategies.Bulyan,
    )
    if aggregates and isinstance(strategy, choosing):
        return "it compares uploads, and this channel delivers one aggregate; use an average"
    if isinstance(strategy, flower_strategies.FedProx):
        if kind == "gradient":
            return (
                "its proximal term is zero at the first local step, the only one fedsgd takes; "
                "use federation.local = 'fedavg(...)', or strategy 'fedavg'"
            )
        if strategy.proximal_mu <= 0:
            return "it is FedAvg unless proximal_mu is above 0; write fedprox(proximal_mu=0.1)"
    if isinstance(strategy, flower_strategies.FedAvgM) and not strategy.server_opt:
        return (
            "it is FedAvg unless server_momentum is above 0 or server_learning_rate is not 1; "
            "write fedavgm(server_momentum=0.9)"
        )
    return _too_few(strategy, cohort)


def _too_few(strategy: Strategy, cohort: int) -> str | None:
    """Say why a strategy that chooses among uploads cannot do so among this many."""
    if isinstance(strategy, flower_strategies.FedTrimmedAvg) and int(strategy.beta * cohort) < 1:
        if cohort < 3:
            return f"it trims both ends, and needs 3 uploads a round, not {cohort}"
        return f"of {cohort} uploads it trims none; let beta be at least {least_share(cohort)}"
    if isinstance(strategy, flower_strategies.Bulyan):
        least = 4 * strategy.num_malicious_nodes + 3
        if cohort < least:
            return f"it needs {least} uploads a round (4 num_malicious_nodes + 3), not {cohort}"
    if isinstance(strategy, flower_strategies.MultiKrum):  # Blanchard et al. 2017: 2f + 2 < n
        malicious, chosen = strategy.num_malicious_nodes, strategy.num_nodes_to_select
        if cohort < 2 * malicious + 3:
            needed = f"{2 * malicious + 3} uploads a round (2 num_malicious_nodes + 3)"
            return f"it needs {needed}, not {cohort}; lower it, or use more clients"
        if chosen > (most := cohort - max(malicious, 1)):
            why = "is averaging all" if chosen >= cohort else "takes in a malicious one"
            remedy = f"let num_nodes_to_select be at most {most}"
            return f"choosing {chosen} of {cohort} uploads {why}; {remedy}"
    return None


def least_share(count: int) -> float:
    """Return a share of so many that is at least one of them, the least of four decimals."""
    return math.ceil(10_000 / count) / 10_000


class Wrapper(Strategy):
    """A strategy around another; every method passes on unless a subclass says otherwise."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass on."""
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Pass on."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Pass on."""
        self.inner.summary()


def with_arrays(reply: Message, arrays: ArrayRecord) -> Message:
    """Return a reply that says the same of other arrays: what a Flower strategy reads, no more."""
    changed = copy.copy(reply)
    weight = {"num-examples": reply.content.metric_records["metrics"]["num-examples"]}
    changed.content = RecordDict({"arrays": arrays, "metrics": MetricRecord(weight)})
    return changed


class Applied(Wrapper):
    """Turn uploads of any kind into full weights, so that any Flower strategy can average them.

    A gradient ``g`` becomes ``w - lr * g`` (FedSGD); arrays that clients keep to themselves
    (BatchNorm statistics that are frozen or private) are those of the model sent.
    """

    def __init__(self, inner: Strategy, lr: float | None, message_type: str = "train") -> None:
        super().__init__(inner)
        self.lr, self.message_type = lr, message_type

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what was sent."""
        self.sent = arrays
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.metadata.message_type = self.message_type
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the strategy full weights; it reads them one reply at a time."""
        full = []
        for reply in replies:
            received = reply.content.array_records["arrays"]
            arrays = ArrayRecord()
            for name, before in self.sent.items():
                if name not in received:
                    arrays[name] = before
                else:
                    arrays[name] = lazily(received[name], self._applied(name, before))
            full.append(with_arrays(reply, arrays))
        aggregated, metrics = self.inner.aggregate_train(server_round, full)
        if aggregated is not None:  # FedAdam computes in double precision
            aggregated = ArrayRecord(
                {name: _of_type(array, self.sent[name].dtype) for name, array in aggregated.items()}
            )
        return aggregated, metrics

    def _applied(self, name: str, before: Array) -> Callable[[Any], Any]:
        if self.lr is None or is_buffer(name):
            return lambda after: after.astype(before.dtype)
        lr = self.lr
        return lambda gradient: (before.numpy() - lr * gradient).astype(before.dtype)


def _of_type(array: Array, dtype: str) -> Array:
    return array if array.dtype == dtype else Array(array.numpy().astype(dtype))


class Refereed(Wrapper):
    """The range's own bookkeeping around a whole server, role and all.

    Sampling repeats from the public seed.  A reply with missing arrays, wrong shapes, NaN or Inf
    is left out and noted; a round without a usable reply leaves the model as it was.
    """

    def __init__(
        self,
        inner: Strategy,
        population: Population,
        *,
        seed: int,
        spec: DataSpec,
        batchnorm: str,
        on_round: Callable[[int, float], None],
    ) -> None:
        super().__init__(inner)
        self.population, self.ledger = population, population.ledger
        self.seed, self.spec, self.batchnorm, self.on_round = seed, spec, batchnorm, on_round
        self.sent: dict[int, Message] = {}
        self.rounds_aggregated = 0
        self._expected: dict[str, dict[str, tuple[int, ...]]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy sample, from a seed of this round's own."""
        self.ledger.round, self._started = server_round, time.perf_counter()
        available = set(grid.get_node_ids())
        for client in range(self.population.clients):
            if client + 1 not in available:
                self.ledger.fail(client, "its SuperNode is not connected")
        with seeds.seeded_globals(seeds.derive(self.seed, "cohort", server_round)):
            messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self.sent = {message.metadata.dst_node_id: message for message in messages}
        self.ledger.asked[server_round] = [client_of(node) for node in self.sent]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Leave out what is broken, and let the inner strategy aggregate the rest."""
        whole = []
        for reply in replies:
            if reason := self._broken(reply):
                self.ledger.fail(client_of(reply.metadata.src_node_id), reason)
            else:
                whole.append(reply)
                if "senders" in reply.content:
                    together = reply.content.config_records["senders"]["clients"]
                    self.ledger.summed[server_round] = cast(list[int], together)
        arrays, metrics = None, None
        if whole:
            try:
                arrays, metrics = self.inner.aggregate_train(server_round, whole)
            except AppExitException as error:
                raise RunFailed(f"the strategy could not aggregate: {error}") from error
        if arrays is None:
            log(WARNING, "round %d: no usable reply, the model stays as it was", server_round)
        else:
            self.rounds_aggregated += 1
        self.population.forget_round()
        self.ledger.round_seconds.append(time.perf_counter() - self._started)
        self.on_round(server_round, self.ledger.round_seconds[-1])
        return arrays, metrics

    def _broken(self, reply: Message) -> str | None:
        """Say what is wrong with a reply, if anything is."""
        asked = self.sent[reply.metadata.src_node_id].content.config_records["config"]
        expected = self._expectation(str(asked["model"]))
        if "senders" in reply.content:
            places = places_in(self.sent[reply.metadata.src_node_id].content)
            expected = {n: whole_shape(shape, places.get(n)) for n, shape in expected.items()}
        arrays = reply.content.array_records.get("arrays")
        if arrays is None:
            return "its reply holds no arrays"
        metrics = reply.content.metric_records.get("metrics", MetricRecord())
        if reason := _broken_metrics(metrics):
            return reason
        if odd := sorted(expected.keys() ^ arrays.keys()):
            return f"its reply lacks, or adds, {odd[0]!r} and {len(odd) - 1} more arrays"
        broken = (_broken_array(name, arrays[name], shape) for name, shape in expected.items())
        return next((reason for reason in broken if reason), None)

    def _expectation(self, expression: str) -> dict[str, tuple[int, ...]]:
        if expression not in self._expected:
            model = build_model(expression, self.spec)
            own, names = model.state_dict(), uploaded_names(model, self.batchnorm)
            self._expected[expression] = {name: tuple(own[name].shape) for name in names}
        return self._expected[expression]


def _broken_metrics(metrics: MetricRecord) -> str | None:
    for name, value in metrics.items():
        if isinstance(value, list) or not np.isfinite(value):
            return f"its reply says {name} = {value!r}, not a finite number"
    if "num-examples" not in metrics:
        return "its reply does not say num-examples"
    if not cast(float, metrics["num-examples"]) > 0:
        return f"its reply is of {metrics['num-examples']} examples, and weighs nothing"
    return None


def _broken_array(name: str, array: Array, shape: tuple[int, ...]) -> str | None:
    try:
        values = array.numpy()
    except (ValueError, EOFError) as error:
        return f"{name!r} cannot be read: {error}"
    if values.shape != shape:
        return f"{name!r} has shape {list(values.shape)}, not {list(shape)}"
    if values.dtype.kind != "f":
        return f"{name!r} holds {values.dtype}, not floating-point numbers"
    return None if np.isfinite(values).all() else f"{name!r} holds NaN or Inf"


__all__ = ["Applied", "Ledger", "Refereed", "Wrapper", "build_strategy", "inner_strategies"]
