"""Secure aggregation: the server gets one sum a round, and nothing of any single client.

The protocol is Flower's own SecAgg+ (Bell et al., CCS 2020; on Bonawitz et al., CCS 2017), real
keys, shares and masks.  Flower drives it through its older workflow; here it becomes a
:class:`~flwr.serverapp.Grid` that answers a round of training with one message, so that any
strategy can sit behind it, and a client mod that translates between the two.

Flower's own clients are safe from an honest-but-curious server only: they do not check that the
lists of living and dropped clients are disjoint, nor the threshold and the modulus they are told
(the attack ``secagg-unmasking`` takes single uploads out).  ``strict=True`` makes clients refuse
that, and models that differ from client to client (``secagg_strict.py``).  Keys are not
authenticated and masks come from a 32-bit seed either way.

Arrays are multiplied by ``num_examples / max_weight``, clipped to ``[-clipping_range,
clipping_range]`` and rounded stochastically to ``quantization_range`` steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    Status,
    bytes_to_ndarray,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid
from pydantic import Field

from fedsim import seeds
from fedsim.channel import Channel
from fedsim.grid import GridWrapper
from fedsim.models import is_buffer, is_index
from fedsim.placing import places_in, whole_shape
from fedsim.population import Population, client_of
from fedsim.registry import register
from strategies.channels import secagg_strict

LARGEST_SUM = 2**32  # Flower's modulus: quantized sums that reach it wrap around
# Of values of one upload: where all is cut off, and where all is rounded away.
LEAST_CARRIED, LARGEST_STEP = 1e-6, 1.0
LEAST_WEIGHT = 1000  # in steps, of which rounding takes up to a half: 0.05 %


@register("channel", "secagg")
@dataclass(frozen=True, kw_only=True)
class SecAgg(Channel):
    """Flower's SecAgg+.

    Parameters
    ----------
    threshold : float
        Share of the secret shares that reconstructs a dropped client's key.
    num_shares : float
        Share of the cohort that holds each client's key.
    max_weight : float
        Largest number of examples a client may weigh; a client with ``n`` examples keeps a
        precision of ``2 * clipping_range / quantization_range * max_weight / n``, and its weight
        one of ``max_weight / quantization_range``.
    clipping_range : float
        Weighted values are clipped to plus or minus this.
    quantization_range : int
        Number of steps between the two.
    strict : bool
        Clients refuse what an honest server never asks for; ``threshold`` must then be more than
        half of the shares.
    min_cohort : int or None
        Among how many, itself included, a strict client wants to be summed; 3 when None.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.6
    num_shares: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_weight: Annotated[float, Field(gt=0)] = 1000.0
    clipping_range: Annotated[float, Field(gt=0)] = 8.0
    quantization_range: Annotated[int, Field(ge=2)] = 2**22
    strict: bool = False
    min_cohort: Annotated[int, Field(ge=2)] | None = None

    strengths: ClassVar[tuple[str, ...]] = (
        "secagg(quantization_range=16777216)",
        "secagg",
        "secagg(strict=True)",
    )
    adversary: ClassVar[str] = (
        "secagg-unmasking(then='inverting-gradients(iterations=200, tv=1e-2)')"
    )
    aggregates = True

    def __post_init__(self) -> None:
        if self.min_cohort is not None and not self.strict:
            raise ValueError("nobody looks at min_cohort unless strict=True; add it")

    def shares(self, clients: int) -> tuple[int, int]:
        """Return into how many shares a cohort's seeds go, and how many recover one.

        As Flower's server counts: ``secaggplus_workflow.setup_stage``.
        """
        shares = round(self.num_shares * clients)
        if shares < clients and shares % 2 == 0:
            shares += 1
        shares = clients if shares <= 2 else shares
        return shares, max(round(self.threshold * shares), 2)

    masks = True
    quantizes = True

    def check(self, clients: int, largest_weight: int) -> None:
        """Refuse what the protocol cannot hide, weigh or sum without wrapping around."""
        if clients < 2:
            raise ValueError(
                f"a cohort of {clients} has nothing to hide in; let at least 2 clients train"
            )
        if clients * self.quantization_range >= LARGEST_SUM:
            most = (LARGEST_SUM - 1) // self.quantization_range
            raise ValueError(
                f"the sum of {clients} clients would overflow; at most {most} clients, or a "
                f"quantization_range of at most {(LARGEST_SUM - 1) // clients}"
            )
        if largest_weight > self.max_weight:
            raise ValueError(
                f"max_weight={self.max_weight:g} cannot weigh the client that will train on "
                f"{largest_weight} examples a round; let max_weight be at least {largest_weight}"
            )
        self._check_precision(largest_weight)
        if self.strict:
            self._check_strict(clients)

    def check_lightest(self, weight: int) -> None:
        """Refuse to round off a weight.

        Flower sends ``round(weight / max_weight * quantization_range)``, and multiplies values by
        what is left of the weight: at 0 a client counts for nothing, and a sum of none is NaN.
        """
        if (steps := weight / self.max_weight * self.quantization_range) < LEAST_WEIGHT:
            least = math.ceil(LEAST_WEIGHT * self.max_weight / weight)
            raise ValueError(
                f"with max_weight={self.max_weight:g} and quantization_range="
                f"{self.quantization_range} the client that trains on {weight} examples would "
                f"weigh {steps:.3g} steps, which are rounded, and {LEAST_WEIGHT} are enough; use "
                f"a smaller max_weight, or a quantization_range of at least {least}"
            )

    def _check_precision(self, weight: int) -> None:
        """Refuse rounding, or cutting off, that leaves nothing of the heaviest client's upload."""
        if (most := self.carries(weight)) < LEAST_CARRIED:
            raise ValueError(
                f"values of the client that trains on {weight} examples would be cut off at "
                f"{most:.3g}, below {LEAST_CARRIED:g}; use a larger clipping_range"
            )
        if (step := 2 * most / self.quantization_range) > LARGEST_STEP:
            raise ValueError(
                f"values of the client that trains on {weight} examples would be rounded to "
                f"multiples of {step:.3g}, and updates are far below {LARGEST_STEP:g}; use a "
                "larger quantization_range, or a smaller clipping_range or max_weight"
            )

    def carries(self, weight: int) -> float:
        """Return ``clipping_range`` before weighting."""
        return self.clipping_range * self.max_weight / weight

    def _check_strict(self, clients: int) -> None:
        shares, threshold = self.shares(clients)
        if 2 * threshold <= shares:
            raise ValueError(
                f"strict clients refuse a threshold of {threshold} of {shares} shares, which is "
                f"not more than half; let threshold be at least {(shares // 2 + 1) / shares:.3g}"
            )
        if shares < self.smallest_cohort:
            raise ValueError(
                f"strict clients want to be one of {self.smallest_cohort}, and each would share "
                f"with {shares}; use more clients, or a larger num_shares, or lower min_cohort"
            )

    @property
    def smallest_cohort(self) -> int:
        """Among how many a strict client wants to be summed."""
        return 3 if self.min_cohort is None else self.min_cohort

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:
        """Return a grid that runs the protocol for training messages."""
        return SecAggGrid(inner, context, self, timeout)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer the protocol's stages; train only in the one that asks for it."""

        def answer(msg: Message, context: Context) -> Message:
            return secaggplus_mod(
                msg, context, lambda m, c: _train_in_old_form(m, c, call_next, self.max_weight)
            )

        if not self.strict:
            return answer(msg, context)
        terms = {
            Key.CLIPPING_RANGE: self.clipping_range,
            Key.TARGET_RANGE: self.quantization_range,
            Key.MOD_RANGE: LARGEST_SUM,
            Key.MAX_WEIGHT: self.max_weight,
        }
        rules = secagg_strict.Rules(terms, self.smallest_cohort)
        return secagg_strict.guarded(msg, context, answer, rules)

    def figures(self) -> dict[str, Any]:
        """Return the protocol's constants."""
        return {
            "clipping_range": self.clipping_range,
            "quantization_step": 2 * self.clipping_range / self.quantization_range,
            "max_weight": self.max_weight,
        }


def _train_in_old_form(
    msg: Message, context: Context, call_next: ClientAppCallable, max_weight: float
) -> Message:
    """Hide the protocol's record from the app, and answer as Flower's mod expects."""
    hidden = msg.content.pop(RECORD_KEY_CONFIGS)
    reply = call_next(msg, context)
    msg.content[RECORD_KEY_CONFIGS] = hidden
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    metrics = reply.content.metric_records.get("metrics", MetricRecord())
    arrays = reply.content.array_records.get("arrays")
    if arrays is None or "num-examples" not in metrics:
        raise RuntimeError("training gave no arrays, or does not say num-examples")
    num_examples = cast(int, metrics["num-examples"])
    # 0-d arrays would come out of Flower's sum wrong: it adds to them out of place.
    values = {name: np.atleast_1d(array.numpy()) for name, array in arrays.items()}
    if broken := [name for name, array in values.items() if not np.isfinite(array).all()]:
        raise RuntimeError(f"{broken[0]!r} holds NaN or Inf, which would spoil the sum")
    if not 0 < num_examples <= max_weight:
        raise RuntimeError(
            f"secagg(max_weight={max_weight:g}) cannot weigh {num_examples} examples: "
            "1 to max_weight"
        )
    result = FitRes(
        status=Status(Code.OK, ""),
        parameters=ndarrays_to_parameters(list(values.values())),
        num_examples=num_examples,
        metrics={},  # Flower carries these in the clear
    )
    return Message(recorddict_compat.fitres_to_recorddict(result, keep_input=False), reply_to=msg)


@dataclass
class _Proxy:
    node_id: int


class _Cohort(LegacyFedAvg):
    """The protocol's own strategy: these nodes, and keep what comes out."""

    def __init__(self, node_ids: list[int]) -> None:
        super().__init__()
        self.node_ids = node_ids
        self.results: list[tuple[Any, FitRes]] = []

    def configure_fit(self, *_: Any) -> Any:
        return [(_Proxy(node), FitIns(Parameters([], ""), {})) for node in self.node_ids]

    def aggregate_fit(self, _: int, results: Any, *__: Any) -> tuple[None, dict[str, Scalar]]:
        self.results = results
        return None, {}


class _Workflow(SecAggPlusWorkflow):
    """SecAgg+ whose third stage carries the strategy's own messages."""

    def __init__(self, contents: dict[int, RecordDict], **settings: Any) -> None:
        super().__init__(**settings)
        self.contents = contents

    def setup_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Set up, and carry the strategy's messages from here on."""
        enough = super().setup_stage(grid, context, state)
        state.nid_to_fitins = self.contents
        return enough and _without_absent(state)

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Share keys."""
        return super().share_keys_stage(grid, context, state) and _without_absent(state)


def _without_absent(state: WorkflowState) -> bool:
    """Go on without those who were gone before any mask was made.

    Flower's workflow would ask for shares of keys that they never shared, and halt.
    """
    state.sampled_node_ids = set(state.active_node_ids)
    for neighbors in state.nid_to_neighbours.values():
        neighbors.intersection_update(state.active_node_ids)
    return True


def possible_uploads(asked: Message) -> list[dict[str, tuple[int, ...]]]:
    """Return the names and shapes that may come back: all that was sent, or parameters only."""
    arrays, places = asked.content.array_records["arrays"], places_in(asked.content)
    full = {
        name: whole_shape(array.shape, places.get(name))
        for name, array in arrays.items()
        if not is_index(name)
    }
    return [full, {name: shape for name, shape in full.items() if not is_buffer(name)}]


@dataclass
class _Vetted:
    """The grid as the workflow sees it: who breaks the protocol has failed, and is left out."""

    inner: Population
    uploads: list[dict[str, tuple[int, ...]]]
    to_commit: dict[int, RecordDict] | None = None  # what strict clients are going to be sent

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver, and return the replies that the workflow can read."""
        messages, kept = list(messages), []
        if self.to_commit is not None:
            self._commit(messages, self.to_commit)
        for reply in self.inner.send_and_receive(messages, timeout=timeout):
            if reason := self._broken(reply):
                self.inner.ledger.fail(client_of(reply.metadata.src_node_id), reason)
            else:
                kept.append(reply)
        return kept

    def _commit(self, messages: list[Message], contents: dict[int, RecordDict]) -> None:
        """Say in the stage before, to each client, which model it is going to get."""
        known: dict[int, bytes] = {}
        for message in messages:
            if message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE] == Stage.SHARE_KEYS:
                model = secagg_strict.digest(contents[message.metadata.dst_node_id], known)
                message.content[secagg_strict.COMMITMENT] = ConfigRecord({"digest": model})

    def _broken(self, reply: Message) -> str | None:
        told = reply.content.config_records.get(RECORD_KEY_CONFIGS)
        if told is None:
            return "its reply is not of the secure aggregation protocol"
        if Key.MASKED_PARAMETERS not in told:
            return None
        try:
            masked = cast(list[bytes], told[Key.MASKED_PARAMETERS])
            _, *shapes = [bytes_to_ndarray(one).shape for one in masked]
        except (ValueError, EOFError) as error:
            return f"its masked upload cannot be read: {error}"
        fitting = [u for u in self.uploads if [s or (1,) for s in u.values()] == shapes]
        self.uploads = fitting or self.uploads  # what the first client sends, all send
        return None if fitting else "its masked upload has arrays missing, or of wrong shapes"


@dataclass
class SecAggGrid(GridWrapper):
    """Answers a round of training with one message: the weighted mean of all uploads."""

    inner: Population
    context: Context
    settings: SecAgg
    timeout: float
    rounds: int = field(default=0)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the four stages for training messages; pass anything else on."""
        messages = list(messages)
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return self.inner.send_and_receive(messages, timeout=timeout)
        self.rounds += 1
        cohort = _Cohort([m.metadata.dst_node_id for m in messages])
        # A RecordDict for each node: the third stage writes each node's ciphertexts into it.
        contents = {m.metadata.dst_node_id: RecordDict(dict(m.content)) for m in messages}
        workflow = _Workflow(
            contents,
            num_shares=self.settings.num_shares,
            reconstruction_threshold=self.settings.threshold,
            max_weight=self.settings.max_weight,
            clipping_range=self.settings.clipping_range,
            quantization_range=self.settings.quantization_range,
            timeout=self.timeout if timeout is None else timeout,
        )
        config = ConfigRecord({"current_round": self.rounds})
        state = RecordDict({"config": config, "parameters": ArrayRecord()})
        plain = Context(self.context.run_id, self.context.node_id, {}, state, {})
        # Flower shuffles who is whose neighbor: a round that clients drop out of must repeat too.
        seed = seeds.derive(cast(int, self.context.run_config["seed"]), "secagg", self.rounds)
        uploads, to_commit = (
            possible_uploads(messages[0]),
            contents if self.settings.strict else None,
        )
        vetted = cast(Grid, _Vetted(self.inner, uploads, to_commit))
        with seeds.seeded_globals(seed):
            workflow(vetted, LegacyContext(plain, strategy=cohort))
        if not cohort.results:
            self.inner.ledger.fail(
                None, f"secure aggregation halted: too few of {len(messages)} clients were left"
            )
            return []
        return [self._aggregate(messages[0], cohort)]

    def _aggregate(self, asked: Message, cohort: _Cohort) -> Message:
        arrays = parameters_to_ndarrays(cohort.results[0][1].parameters)
        shapes = next(upload for upload in possible_uploads(asked) if len(upload) == len(arrays))
        total = sum(result.num_examples for _, result in cohort.results)
        senders = sorted(client_of(proxy.node_id) for proxy, _ in cohort.results)
        mean = {
            name: Array(np.asarray(array).reshape(shape))
            for (name, shape), array in zip(shapes.items(), arrays, strict=True)
        }
        content = RecordDict(
            {
                "arrays": ArrayRecord(mean),
                "metrics": MetricRecord({"num-examples": total}),
                "senders": ConfigRecord({"clients": senders}),
            }
        )
        return Message(content, reply_to=asked)

    def push_messages(self, _: Iterable[Message]) -> Iterable[str]:
        """Refuse: a single push would bypass the protocol."""
        raise RuntimeError("behind secure aggregation use send_and_receive")

    def pull_messages(self, _: Iterable[str]) -> Iterable[Message]:
        """Refuse: a single pull would bypass the protocol."""
        raise RuntimeError("behind secure aggregation use send_and_receive")
