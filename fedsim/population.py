"""The population: a scenario's clients, shown to a strategy as nodes, wherever they are hosted.

Clients are logical participants; SuperNodes are processes.  Client ``k`` is node ``k + 1`` to the
strategy and lives on the SuperNode whose partition-id is ``k`` modulo the number of SuperNodes.
With as many SuperNodes as clients this is the identity.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsim.defense import REFUSED
from fedsim.errors import RunFailed
from fedsim.grid import GridWrapper
from fedsim.spool import computed, spooled

ADDRESS = "fedsim"  # the record that says which client a message is for


def node_of(client: int) -> int:
    """Return the node id under which a strategy sees a client."""
    return client + 1


def client_of(node_id: int) -> int:
    """Return the client that a strategy sees as this node."""
    return node_id - 1


@dataclass
class Ledger:
    """What happened on the way: failures, bytes and seconds, round by round."""

    round: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    round_seconds: list[float] = field(default_factory=list)
    rounds_aggregated: int = 0

    asked: dict[int, list[int]] = field(default_factory=dict)  # by round: who was sent something
    summed: dict[int, list[int]] = field(
        default_factory=dict
    )  # by round: who is in what was summed

    def only_refusals(self) -> bool:
        """Say whether clients refused, and nothing else went wrong with any of them."""
        known = [failure for failure in self.failures if failure["client"] is not None]
        return bool(known) and all(failure["refused"] for failure in known)

    def refusals(self, clients: int) -> list[dict[str, int]]:
        """Return how many clients were asked in each round, and how many of them refused.

        The federation's own ``clients`` count, and not the attacker's sybils after them.
        """
        refused = {(f["round"], f["client"]) for f in self.failures if f["refused"]}
        return [
            {
                "round": server_round,
                "asked": sum(client < clients for client in asked),
                "refused": sum((server_round, client) in refused for client in asked),
            }
            for server_round, asked in self.asked.items()
        ]

    def fail(self, client: int | None, reason: str, *, refused: bool = False) -> None:
        """Note that a client took no part in this round, why, and whether it was its own choice."""
        self.failures.append(
            {"round": self.round, "client": client, "reason": reason, "refused": refused}
        )


class Tap(Protocol):
    """A server's hand on the line: between what its channel's protocol says and the network."""

    def outgoing(self, messages: list[Message]) -> list[Message]:
        """Return what clients are sent instead."""

    def incoming(self, replies: list[Message]) -> list[Message]:
        """Return what the protocol is told instead of what clients answered."""


class Population(GridWrapper):
    """A ``Grid`` whose nodes are the scenario's clients.

    Replies come back in order of clients, their arrays on disk until :meth:`forget_round`, in a
    file of ``folder`` that has no name; a client that failed, or did not answer in time, is noted
    in the ledger and left out.
    """

    def __init__(
        self, inner: Grid, clients: int, ledger: Ledger, timeout: float, folder: Path
    ) -> None:
        super().__init__(inner)
        self.clients, self.ledger, self.timeout = clients, ledger, timeout
        self.hosts: dict[int, int] = {}  # partition-id -> SuperNode
        self.partitions = 0
        self.folder = folder
        self.tap: Tap | None = None
        self._spool: IO[bytes] | None = None
        self._replies: dict[str, Message] = {}

    # -- who is there --------------------------------------------------------------------------
    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of all clients whose SuperNode is connected."""
        self._find_hosts()
        return [
            node_of(client)
            for client in range(self.clients)
            if client % self.partitions in self.hosts
        ]

    def _find_hosts(self) -> None:
        deadline = time.monotonic() + self.timeout
        while not (nodes := set(self.inner.get_node_ids())):
            if time.monotonic() > deadline:
                raise RunFailed(f"no SuperNode connected within {self.timeout:g} s")
            time.sleep(0.2)
        self.hosts = {part: node for part, node in self.hosts.items() if node in nodes}
        strangers = sorted(nodes - set(self.hosts.values()))
        asked = [Message(RecordDict(), n, "query.whoami") for n in strangers]
        if not asked:
            return
        for reply in self.inner.send_and_receive(asked, timeout=self.timeout):
            if reply.has_error():
                self.ledger.fail(None, f"a SuperNode does not say who it is: {reply.error.reason}")
                continue
            who = reply.content.metric_records["whoami"]
            self.hosts[cast(int, who["partition-id"])] = reply.metadata.src_node_id
            self.partitions = cast(int, who["num-partitions"])
        if not self.partitions:
            reasons = [failure["reason"] for failure in self.ledger.failures[-1:]]
            raise RunFailed(f"no SuperNode answered: {reasons}")

    # -- sending -------------------------------------------------------------------------------
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver every message to the host of its client, a few at a time; return the replies."""
        said = list(messages) if self.tap is None else self.tap.outgoing(list(messages))
        waiting = sorted(said, key=lambda m: m.metadata.dst_node_id, reverse=True)
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        window, pause = 2 * max(len(self.hosts), 1), 0.01
        outstanding: dict[str, Message] = {}
        replies: list[Message] = []
        while waiting or outstanding:
            batch = [waiting.pop() for _ in range(min(window - len(outstanding), len(waiting)))]
            outstanding.update(self._push(batch))
            arrived = list(self.inner.pull_messages(list(outstanding))) if outstanding else []
            for reply in arrived:
                asked = outstanding.pop(reply.metadata.reply_to_message_id)
                if (answer := self._receive(asked, reply)) is not None:
                    replies.append(answer)
            # Only a host that is still busy runs late: the inline engine's never is, whose clients
            # train one after another and have their time each.
            if outstanding and time.monotonic() > deadline:
                break
            if not arrived and outstanding:
                time.sleep(pause)
                pause = min(pause * 1.5, 1.0)
            else:
                pause = 0.01
        for asked in [*outstanding.values(), *waiting]:
            client = client_of(asked.metadata.dst_node_id)
            self.ledger.fail(client, f"no answer within {self.timeout:g} s")
        replies.sort(key=lambda m: m.metadata.src_node_id)
        return replies if self.tap is None else self.tap.incoming(replies)

    def _push(self, messages: list[Message]) -> dict[str, Message]:
        asked: list[Message] = []
        hosted: list[Message] = []
        for message in messages:
            client = client_of(message.metadata.dst_node_id)
            host = self.hosts.get(client % self.partitions)
            if host is None:
                self.ledger.fail(client, "its SuperNode is not connected")
                continue
            content = _copied(message.content)
            self.ledger.bytes_down += _bytes(content)
            content[ADDRESS] = ConfigRecord({"client": client})
            asked.append(message)
            hosted.append(
                Message(
                    content,
                    dst_node_id=host,
                    message_type=message.metadata.message_type,
                    group_id=message.metadata.group_id,
                    ttl=message.metadata.ttl,
                )
            )
        ids: list[str | None] = list(self.inner.push_messages(hosted)) if hosted else []
        ids += [None] * (len(asked) - len(ids))
        pushed: dict[str, Message] = {}
        for message_id, message in zip(ids, asked, strict=True):
            if message_id is None:
                self.ledger.fail(client_of(message.metadata.dst_node_id), "could not be reached")
            else:
                pushed[message_id] = message
        return pushed

    def _receive(self, asked: Message, reply: Message) -> Message | None:
        client = client_of(asked.metadata.dst_node_id)
        if reply.has_error():
            reason = _plain_reason(reply.error.reason or "it gave no reason")
            self.ledger.fail(client, reason, refused=reply.error.code == REFUSED)
            return None
        content = reply.content
        self.ledger.bytes_up += _bytes(content)
        for name in list(content.array_records):
            if self._spool is None:
                # Without a name, so that nothing stays behind when the process is killed: in a
                # baseline these are undefended uploads.
                self._spool = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - see close
            content[name] = spooled(content.array_records[name], self._spool)
        return Message(content, reply_to=asked)

    def forget_round(self) -> None:
        """Delete the arrays of replies that have been aggregated."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def close(self) -> None:
        """Delete what is left on disk."""
        self.forget_round()

    # -- sending in two steps ------------------------------------------------------------------
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver at once and keep the replies for :meth:`pull_messages`."""
        sent = list(messages)
        replies = {m.metadata.src_node_id: m for m in self.send_and_receive(sent)}
        ids = []
        for message in sent:
            message_id = f"{self.ledger.round}-{message.metadata.dst_node_id}-{len(self._replies)}"
            if message.metadata.dst_node_id in replies:
                self._replies[message_id] = replies[message.metadata.dst_node_id]
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies kept by :meth:`push_messages`."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]


def _bytes(content: RecordDict) -> int:
    """Return what a message's values take up on the wire, without Flower's framing."""
    total = 0
    for record in content.values():
        for value in record.values():
            values = value if isinstance(value, list) else [value]
            total += sum(_value_bytes(one) for one in values)
    return total


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    return len(value) if isinstance(value, bytes | str) else 8


def _copied(content: RecordDict) -> RecordDict:
    """Copy what a client's mods may write to; arrays are shared, nobody writes to them.

    Those that are yet to be computed are computed here: it may be attack code that does so, which
    has no business where the client's own random streams are the process's.
    """
    copy = RecordDict()
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            copy[name] = ConfigRecord(dict(record))
        elif isinstance(record, MetricRecord):
            copy[name] = MetricRecord(dict(record))
        else:
            copy[name] = computed(record)
    return copy


def _plain_reason(reason: str) -> str:
    """Return the last line of a remote traceback, without terminal colors."""
    lines = [line for line in reason.strip().splitlines() if line.strip()] or [reason]
    text = lines[-1]
    while "\x1b[" in text:
        before, _, after = text.partition("\x1b[")
        text = before + after.partition("m")[2]
    return text.strip()[:500]
