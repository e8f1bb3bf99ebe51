"""A trusted aggregator: what secure aggregation promises, without its cost.

Somebody whom everybody trusts adds up the uploads of a round and tells the server the weighted
mean and who took part, nothing else: the ideal that protocols like SecAgg+ stand in for.  No keys,
no masks, no rounding.  An upload is added and forgotten before the next client trains, and one
that is a client's block of a larger array (:mod:`fedsim.placing`) is sent as it is, so that the
memory of a round is that of one sum, whatever the number of clients.

Real masks make every upload as large as the sum and every client talk to its neighbors: with
Flower's SecAgg+ a thousand clients and a sum of 100 million values would hold 0.8 TB of masked
integers at once.  For cohorts of that size this channel shows what the server would learn.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim.channel import Channel
from fedsim.grid import GridWrapper
from fedsim.placing import Place, places_in, whole_shape
from fedsim.population import Population, client_of
from fedsim.registry import register
from fedsim.spool import LazyArray

#: The strongest attack on an exact sum: what it reads, it reads in a part of the sum that is one
#: client's own.
SUMS = "sparse-linear-layer(units=128)"
STRIDE = 2**20  # values added at a time: their double-precision copy stays small


@register("channel", "trusted-sum")
@dataclass(frozen=True, kw_only=True)
class TrustedSum(Channel):
    """The server gets one exact weighted mean a round, and nothing of any single client.

    It has no strength: a sum is exact, and of as many clients as train.
    """

    adversary: ClassVar[str] = SUMS
    aggregates = True

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: ARG002
        """Refuse a cohort of one, whose sum is its upload."""
        refuse_alone(clients)

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:  # noqa: ARG002
        """Return a grid that answers a round of training with one message."""
        return TrustedSumGrid(inner, timeout)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass the message on: the client trusts the aggregator."""
        return call_next(msg, context)


def refuse_alone(clients: int) -> None:
    """Refuse a cohort of one (``ValueError``)."""
    if clients < 2:
        raise ValueError(
            f"a cohort of {clients} has nothing to hide in; let at least 2 clients train"
        )


@dataclass
class SummingGrid(GridWrapper):
    """Answers a round of training with what becomes of all uploads together.

    A few clients train at a time, and nothing of them is kept but what :meth:`take` keeps.
    """

    inner: Population
    timeout: float

    def begin(self, messages: list[Message]) -> list[Message]:
        """Start a round; return what clients are sent."""
        return messages

    @abstractmethod
    def take(self, reply: Message, asked: Message) -> str | None:
        """Take one upload in, or say why it is left out."""

    @abstractmethod
    def release(self, asked: list[Message]) -> list[Message]:
        """Return what the server gets when the round is over."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Train a few clients at a time and take each in; pass on what is not training."""
        messages = list(messages)
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return self.inner.send_and_receive(messages, timeout=timeout)
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        at_once = 2 * max(len(self.inner.hosts), 1)
        sent = self.begin(messages)
        for start in range(0, len(sent), at_once):
            asked = {m.metadata.dst_node_id: m for m in sent[start : start + at_once]}
            left = max(deadline - time.monotonic(), 0.0)
            for reply in self.inner.send_and_receive(asked.values(), timeout=left):
                if reason := self.take(reply, asked[reply.metadata.src_node_id]):
                    self.inner.ledger.fail(client_of(reply.metadata.src_node_id), reason)
            self.inner.forget_round()
        return self.release(messages)

    def push_messages(self, _: Iterable[Message]) -> Iterable[str]:
        """Refuse: a single push would bypass the sum."""
        raise RuntimeError("behind a channel that sums use send_and_receive")

    def pull_messages(self, _: Iterable[str]) -> Iterable[Message]:
        """Refuse: a single pull would bypass the sum."""
        raise RuntimeError("behind a channel that sums use send_and_receive")


@dataclass
class TrustedSumGrid(SummingGrid):
    """Answers a round of training with one message: the weighted mean of all uploads."""

    def begin(self, messages: list[Message]) -> list[Message]:
        """Start from nothing."""
        self.total = Total()
        return messages

    def take(self, reply: Message, asked: Message) -> str | None:
        """Add one upload."""
        client = client_of(reply.metadata.src_node_id)
        return self.total.add(client, reply.content, places_in(asked.content))

    def release(self, asked: list[Message]) -> list[Message]:
        """Return the mean, where there is one."""
        return [Message(self.total.mean(), reply_to=asked[0])] if self.total.senders else []


@dataclass
class Total:
    """A weighted sum of uploads, in double precision."""

    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    senders: list[int] = field(default_factory=list)
    weight: int = 0

    def add(self, client: int, content: RecordDict, places: dict[str, Place]) -> str | None:
        """Add one upload, or say why it cannot be added: nothing of it is, then."""
        arrays = content.array_records.get("arrays", ArrayRecord())
        metrics = content.metric_records.get("metrics", MetricRecord())
        if not arrays or "num-examples" not in metrics:
            return "its reply holds no arrays, or does not say num-examples"
        shapes = {n: whole_shape(tuple(a.shape), places.get(n)) for n, a in arrays.items()}
        if self.sums and shapes != {name: total.shape for name, total in self.sums.items()}:
            return "its arrays are not those of the clients before it"
        if broken := [name for name, a in arrays.items() if not np.isfinite(a.numpy()).all()]:
            return f"{broken[0]!r} holds NaN or Inf, which would spoil the sum"
        weight = cast(int, metrics["num-examples"])
        for name, array in arrays.items():
            total = self.sums.setdefault(name, np.zeros(shapes[name]))
            self.dtypes[name] = array.dtype
            at = ... if name not in places else places[name][0]
            _add(total[at], array.numpy(), weight)
        self.senders.append(client)
        self.weight += weight
        return None

    def mean(self) -> RecordDict:
        """Return the reply that the server gets."""
        arrays = ArrayRecord()
        for name in list(self.sums):
            values = self.sums.pop(name)
            values /= self.weight
            arrays[name] = _held(values.astype(self.dtypes[name]))
        return RecordDict(
            {
                "arrays": arrays,
                "metrics": MetricRecord({"num-examples": self.weight}),
                "senders": ConfigRecord({"clients": sorted(self.senders)}),
            }
        )


def _add(total: NDArray[np.float64], values: NDArray[Any], weight: int) -> None:
    """Add ``weight * values`` in place."""
    sums, flat = total.reshape(-1), values.reshape(-1)
    for start in range(0, len(flat), STRIDE):
        part = slice(start, start + STRIDE)
        sums[part] += np.float64(weight) * flat[part]


def _held(values: NDArray[Any]) -> LazyArray:
    """Return an array that is not turned into bytes until somebody sends it."""
    return LazyArray(str(values.dtype), values.shape, lambda: values)
