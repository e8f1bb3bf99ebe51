"""Clients are logical: any number of SuperNodes hosts them, and each keeps its own."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.defense import REFUSED
from fedsim.errors import RunFailed
from fedsim.population import ADDRESS, Ledger, Population, client_of, node_of


class Machines(Grid):
    """SuperNodes that answer with who was asked; some are away, silent, slow or broken."""

    def __init__(self, nodes: dict[int, int], *, partitions: int | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = nodes  # SuperNode id -> partition-id
        self.partitions = len(nodes) if partitions is None else partitions
        self.silent: set[int] = set()
        self.unreachable: set[int] = set()
        self.anonymous: set[int] = set()
        self.asked: list[tuple[int, int]] = []
        self.waiting: dict[str, Message] = {}
        self.most_outstanding = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:  # type: ignore[override]
        ids: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = f"m{len(self.asked)}-{node}"
            self.asked.append((node, self._client(message)))
            if node in self.unreachable:
                ids.append(None)
                continue
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            self.waiting[message_id] = message
        self.most_outstanding = max(self.most_outstanding, len(self.waiting))
        return ids

    def _client(self, message: Message) -> int:
        if ADDRESS not in message.content:
            return -1
        return int(message.content.config_records[ADDRESS]["client"])  # type: ignore[arg-type]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [i for i in message_ids if self.waiting[i].metadata.dst_node_id not in self.silent]
        return [self._answer(self.waiting.pop(message_id)) for message_id in ready]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query.whoami":
            if node in self.anonymous:
                return Message(Error(2, "no partition-id"), reply_to=message)
            who = {"partition-id": self.nodes[node], "num-partitions": self.partitions}
            return Message(RecordDict({"whoami": MetricRecord({**who})}), reply_to=message)
        values = np.full((2, 3), float(self._client(message)), dtype=np.float32)
        arrays = ArrayRecord({"weight": Array(values)})
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages([i for i in self.push_messages(messages) if i is not None])

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError


def population(grid: Grid, clients: int, folder: Path, timeout: float = 5.0) -> Population:
    return Population(grid, clients, Ledger(round=1), timeout, folder)


def to(nodes: Iterable[int]) -> list[Message]:
    content = RecordDict({"arrays": ArrayRecord({"weight": Array(np.zeros(4, dtype=np.float32))})})
    return [Message(content, node, "train") for node in nodes]


def answered(replies: Iterable[Message]) -> dict[int, float]:
    return {
        reply.metadata.src_node_id: float(
            reply.content.array_records["arrays"]["weight"].numpy()[0, 0]
        )
        for reply in replies
    }


@settings(max_examples=20, deadline=None)
@given(clients=st.integers(1, 40), machines=st.integers(1, 12))
def test_every_client_is_reached_and_answers_as_itself(
    tmp_path_factory: pytest.TempPathFactory, clients: int, machines: int
) -> None:
    grid = Machines({100 + 7 * part: part for part in range(machines)})
    clientele = population(grid, clients, tmp_path_factory.mktemp("run"))
    nodes = list(clientele.get_node_ids())
    assert nodes == [node_of(client) for client in range(clients)]
    assert [client_of(node) for node in nodes] == list(range(clients))
    replies = clientele.send_and_receive(to(reversed(nodes)))
    assert answered(replies) == {node: float(client_of(node)) for node in nodes}
    asked = [(node, client) for node, client in grid.asked if client >= 0]
    assert set(asked) == {(100 + 7 * (c % machines), c) for c in range(clients)}
    assert grid.most_outstanding <= 2 * machines
    assert clientele.ledger.failures == []
    clientele.close()


def test_replies_come_in_order_of_clients(tmp_path: Path) -> None:
    clientele = population(Machines({5: 1, 9: 0}), 6, tmp_path)
    nodes = list(clientele.get_node_ids())
    replies = list(clientele.send_and_receive(to(nodes)))
    assert [reply.metadata.src_node_id for reply in replies] == nodes


def test_bytes_are_counted_both_ways(tmp_path: Path) -> None:
    clientele = population(Machines({5: 0}), 3, tmp_path)
    nodes = list(clientele.get_node_ids())
    list(clientele.send_and_receive(to(nodes)))
    down = len(Array(np.zeros(4, dtype=np.float32)).data)
    up = len(Array(np.zeros((2, 3), dtype=np.float32)).data)
    assert (clientele.ledger.bytes_down, clientele.ledger.bytes_up) == (3 * down, 3 * up)


def test_replies_lie_on_disk_until_the_round_is_over(tmp_path: Path) -> None:
    clientele = population(Machines({5: 0}), 3, tmp_path)
    replies = list(clientele.send_and_receive(to(clientele.get_node_ids())))
    size = len(Array(np.zeros((2, 3), dtype=np.float32)).data)
    assert clientele._spool is not None
    assert os.fstat(clientele._spool.fileno()).st_size == 3 * size
    assert not list(tmp_path.iterdir())  # whoever kills the process leaves no upload behind
    array = replies[2].content.array_records["arrays"]["weight"]
    assert array.numpy().tolist() == [[2.0] * 3] * 2
    assert len(array.data) == size
    clientele.forget_round()
    with pytest.raises(ValueError, match="closed file"):
        array.numpy()
    list(clientele.send_and_receive(to(clientele.get_node_ids())))
    clientele.close()
    assert clientele._spool is None


def test_an_array_cut_short_does_not_go_on_in_the_next_client_s(tmp_path: Path) -> None:
    class Cut(Machines):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            for arrays in reply.content.array_records.values():
                whole = arrays["weight"]
                short = whole.data[:-4] if self._client(message) == 0 else whole.data
                arrays["weight"] = Array(whole.dtype, whole.shape, whole.stype, short)
            return reply

    clientele = population(Cut({5: 0}), 2, tmp_path)
    cut, whole = clientele.send_and_receive(to(clientele.get_node_ids()))
    with pytest.raises(ValueError, match=r"EOF|cannot reshape"):
        cut.content.array_records["arrays"]["weight"].numpy()
    assert whole.content.array_records["arrays"]["weight"].numpy().tolist() == [[1.0] * 3] * 2
    clientele.close()


def test_clients_of_a_machine_that_is_away_are_left_out(tmp_path: Path) -> None:
    grid = Machines({5: 0, 6: 2}, partitions=3)
    clientele = population(grid, 7, tmp_path)
    nodes = list(clientele.get_node_ids())
    assert [client_of(node) for node in nodes] == [0, 2, 3, 5, 6]
    del grid.nodes[6]
    assert [client_of(node) for node in clientele.get_node_ids()] == [0, 3, 6]
    replies = clientele.send_and_receive(to(nodes))
    assert sorted(answered(replies).values()) == [0, 3, 6]
    assert [(f["client"], f["reason"]) for f in clientele.ledger.failures] == [
        (client, "its SuperNode is not connected") for client in (2, 5)
    ]


def test_a_machine_that_comes_back_under_another_name_hosts_its_clients_again(
    tmp_path: Path,
) -> None:
    grid = Machines({5: 0, 6: 1})
    clientele = population(grid, 4, tmp_path)
    assert len(list(clientele.get_node_ids())) == 4
    grid.nodes = {5: 0}
    assert len(list(clientele.get_node_ids())) == 2
    grid.nodes = {5: 0, 77: 1}
    nodes = list(clientele.get_node_ids())
    assert answered(clientele.send_and_receive(to(nodes))) == {n: n - 1.0 for n in nodes}
    assert {node for node, client in grid.asked if client in (1, 3)} == {77}


def test_a_machine_that_is_silent_costs_its_clients_and_the_round_its_time(
    tmp_path: Path,
) -> None:
    grid = Machines({5: 0, 6: 1})
    clientele = population(grid, 6, tmp_path, timeout=0.3)
    nodes = list(clientele.get_node_ids())
    grid.silent = {6}
    started = time.monotonic()
    replies = answered(clientele.send_and_receive(to(nodes)))
    assert 0.3 <= time.monotonic() - started < 3
    assert set(replies.values()) <= {0, 2, 4}
    named = {f["client"] for f in clientele.ledger.failures}
    assert named == set(range(6)) - {int(value) for value in replies.values()}
    assert {f["reason"] for f in clientele.ledger.failures} == {"no answer within 0.3 s"}


def test_a_message_that_cannot_be_pushed_is_a_failure(tmp_path: Path) -> None:
    grid = Machines({5: 0, 6: 1})
    clientele = population(grid, 4, tmp_path)
    nodes = list(clientele.get_node_ids())
    grid.unreachable = {6}
    assert set(answered(clientele.send_and_receive(to(nodes))).values()) == {0, 2}
    assert [(f["client"], f["reason"]) for f in clientele.ledger.failures] == [
        (client, "could not be reached") for client in (1, 3)
    ]


def test_a_machine_that_does_not_say_who_it_is_hosts_nobody(tmp_path: Path) -> None:
    grid = Machines({5: 0, 6: 1})
    grid.anonymous = {6}
    clientele = population(grid, 4, tmp_path)
    assert [client_of(node) for node in clientele.get_node_ids()] == [0, 2]
    assert "does not say who it is: no partition-id" in clientele.ledger.failures[0]["reason"]


@pytest.mark.parametrize("anonymous", [True, False])
def test_a_federation_without_machines_is_no_federation(anonymous: bool, tmp_path: Path) -> None:
    grid = Machines({5: 0} if anonymous else {})
    grid.anonymous = {5}
    clientele = population(grid, 4, tmp_path, timeout=0.1)
    with pytest.raises(RunFailed, match=r"no SuperNode (answered|connected within 0\.1 s)"):
        list(clientele.get_node_ids())


def test_pushing_and_pulling_are_sending_in_two_steps(tmp_path: Path) -> None:
    clientele = population(Machines({5: 0}), 3, tmp_path)
    nodes = list(clientele.get_node_ids())
    ids = list(clientele.push_messages(to(nodes)))
    assert len(set(ids)) == 3
    assert answered(clientele.pull_messages(ids)) == {node: node - 1.0 for node in nodes}
    assert list(clientele.pull_messages(ids)) == []


def test_what_is_sent_is_not_what_a_client_may_write_to(tmp_path: Path) -> None:
    class Meddler(Machines):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type == "train":
                message.content.config_records["config"]["lr"] = 9.0
            return super()._answer(message)

    clientele = population(Meddler({5: 0}), 2, tmp_path)
    messages = to(clientele.get_node_ids())
    for message in messages:
        message.content["config"] = ConfigRecord({"lr": 0.1})
    list(clientele.send_and_receive(messages))
    assert {message.content.config_records["config"]["lr"] for message in messages} == {0.1}
    assert all(ADDRESS not in message.content for message in messages)


def test_a_remote_traceback_is_told_in_its_last_line(tmp_path: Path) -> None:
    class Broken(Machines):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type != "train":
                return super()._answer(message)
            text = (
                "\x1b[36mTraceback (most recent call last):\n  File x\nValueError: \x1b[1mno\x1b[0m"
            )
            return Message(Error(2, text + "\n\n"), reply_to=message)

    clientele = population(Broken({5: 0}), 1, tmp_path)
    assert not list(clientele.send_and_receive(to(clientele.get_node_ids())))
    (failure,) = clientele.ledger.failures
    assert failure == {"round": 1, "client": 0, "reason": "ValueError: no", "refused": False}


def test_a_refusal_is_told_from_an_error_by_its_code_and_counted(tmp_path: Path) -> None:
    class Refusing(Machines):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type != "train":
                return super()._answer(message)
            return Message(Error(REFUSED, "not this model"), reply_to=message)

    clientele = population(Refusing({5: 0}), 1, tmp_path)
    clientele.ledger.asked = {1: [0, 1, 7], 2: [0]}
    list(clientele.send_and_receive(to(clientele.get_node_ids())))
    assert clientele.ledger.only_refusals()
    assert clientele.ledger.refusals(2) == [
        {"round": 1, "asked": 2, "refused": 1},
        {"round": 2, "asked": 1, "refused": 0},
    ]
    clientele.ledger.fail(1, "it refused the cookies")
    assert not clientele.ledger.only_refusals()
