"""What a server is besides honest: wrappers around any Flower strategy.

``Eavesdropper(FedAvg(...))`` keeps what each reply told it; ``Manipulator(FedAdam(...), attack)``
also decides what clients receive.  The federation's own learning goes on inside.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.attack import Attack, Manipulation, ModelToSend
from fedsim.channel import HIDDEN
from fedsim.errors import RunFailed
from fedsim.federation import Wrapper, with_arrays
from fedsim.interception import Interception, RoundTap, Upload
from fedsim.placing import PLACES, record_of
from fedsim.population import client_of, node_of
from fedsim.registry import register
from fedsim.spool import LazyArray
from fedsim.threat import Capability, Knowledge
from fedsim.view import SavedViews, ServerView, save_view

Seal = Callable[..., Any]


@register("role", "eavesdropper")
class Eavesdropper(Wrapper):
    """Aggregates honestly, and saves a :class:`ServerView` of every reply.

    Parameters
    ----------
    inner : Strategy
        Any Flower strategy.
    folder : Path
        Where views are saved.
    kind : {"gradient", "weights"}
        What clients upload.
    """

    def __init__(self, inner: Strategy, folder: Path, kind: str) -> None:
        super().__init__(inner)
        self.folder, self.kind = folder, kind
        self.receipts: list[str] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what each client was sent."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.sent = {message.metadata.dst_node_id: message.content for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Save a view of every reply, then pass them on."""
        replies = list(replies)
        for reply in replies:
            save_view(self.folder, self.view(server_round, reply))
        self.receipts.append(f"read {len(replies)} replies in round {server_round}")
        return super().aggregate_train(server_round, replies)

    def view(self, server_round: int, reply: Message) -> ServerView:
        """Return everything this server holds of one reply."""
        node = reply.metadata.src_node_id
        sent = self.sent[node]
        rode_along = reply.content.metric_records["metrics"].items()
        metrics = {name: float(cast(float, value)) for name, value in rode_along}
        senders = reply.content.config_records.get("senders")
        inside = reply.content.config_records.get(HIDDEN, ConfigRecord())
        hidden = cast(list[str], inside.get("arrays", []))
        received = tensors(reply.content.array_records["arrays"])
        known = tensors(sent.array_records["arrays"])
        return ServerView(
            round=server_round,
            senders=tuple(cast(list[int], senders["clients"])) if senders else (client_of(node),),
            model=str(sent.config_records["config"]["model"]),
            sent={n: torch.zeros_like(t) if n in hidden else t for n, t in known.items()},
            received={name: t for name, t in received.items() if name not in hidden},
            kind="gradient" if self.kind == "gradient" else "weights",
            num_examples=int(metrics.pop("num-examples")),
            metrics=metrics,
        )


@register("role", "manipulator")
class Manipulator(Eavesdropper):
    """An eavesdropper that also decides which model each client receives.

    Parameters
    ----------
    attack : Manipulation
        Crafts the model.
    knowledge : Knowledge
        What the attack may know.
    seal : callable
        ``seal(function, *args)`` runs attack code out of reach of what it must not see.
    """

    def __init__(
        self,
        inner: Strategy,
        folder: Path,
        kind: str,
        *,
        attack: Attack,
        knowledge: Knowledge,
        seal: Seal,
    ) -> None:
        super().__init__(inner, folder, kind)
        if not isinstance(attack, Manipulation):
            raise TypeError(f"{attack.name} is passive: it sends no model of its own")
        self.attack, self.knowledge, self.seal = attack, knowledge, seal
        self._tailored: tuple[ModelToSend, int, int, ModelToSend] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client the model that the attack crafted for it."""
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        if not messages:
            return messages
        self.honest = ArrayRecord(dict(arrays.items()))
        honest = ModelToSend(str(config["model"]), tensors(arrays))
        self.knowledge.remember(SavedViews(self.folder))
        self.crafted = self.seal(
            self.attack.craft, honest.expression, tensors(arrays), self.knowledge
        )
        self.common = {name: Array(tensor) for name, tensor in self.crafted.arrays.items()}
        messages = self._selected(messages, server_round, grid)
        several, lies = False, 0
        for message in messages:
            client = client_of(message.metadata.dst_node_id)
            model = self._model_for(self.crafted, client, server_round)
            several |= model is not self.crafted
            lies += _differ(model, honest)
            self._put(model, message, client, server_round)
        self.sent = {message.metadata.dst_node_id: message.content for message in messages}
        self.receipts.append(
            f"sent a modified model{', to each its own,' * several} to "
            f"{lies}/{len(messages)} clients in round {server_round}"
        )
        return messages

    def _model_for(self, crafted: ModelToSend, client: int, server_round: int) -> ModelToSend:
        """Return a client's model; the last one is kept, for one of its arrays after the other."""
        last = self._tailored
        if last is None or last[0] is not crafted or last[1:3] != (client, server_round):
            self._tailored = None  # two at a time may be too much
            model = self.seal(self.attack.tailor, crafted, client, server_round)
            self._tailored = last = crafted, client, server_round, model
        return last[3]

    def _put(self, model: ModelToSend, message: Message, client: int, server_round: int) -> None:
        changed = ConfigRecord(dict(message.content.config_records["config"]))
        changed["model"] = model.expression
        arrays = self._record(model, client, server_round)
        message.content = RecordDict({"arrays": arrays, "config": changed})
        if model.places:
            message.content[PLACES] = record_of(model.places)

    def _record(self, model: ModelToSend, client: int, server_round: int) -> ArrayRecord:
        """Return a client's arrays: the common ones once, its own when they are asked for."""
        record = ArrayRecord()
        for name, tensor in model.arrays.items():
            if tensor is self.crafted.arrays.get(name):
                record[name] = self.common[name]
            else:
                record[name] = self._lazily(name, tensor, client, server_round)
        return record

    def _lazily(self, name: str, tensor: torch.Tensor, client: int, server_round: int) -> Array:
        crafted = self.crafted

        def load() -> Any:
            return self._model_for(crafted, client, server_round).arrays[name].numpy()

        return LazyArray(str(tensor.numpy().dtype), tuple(tensor.shape), load)

    def _selected(self, messages: list[Message], server_round: int, grid: Grid) -> list[Message]:
        if Capability.SELECTION not in self.attack.required:
            return messages
        available = [client_of(node) for node in grid.get_node_ids()]  # sybils have the last ids
        chosen = list(self.seal(self.attack.select, tuple(available), server_round))
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(available):
            raise RunFailed(
                f"{self.attack.name} selected clients {chosen} in round {server_round}; "
                "it may select some of those that are there, each once"
            )
        return [
            Message(messages[0].content, node_of(client), messages[0].metadata.message_type)
            for client in chosen
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Save the views, and give the inner strategy what belongs to its own model.

        Of the uploads of sybils, who come after the federation's own clients, nothing is saved.
        """
        replies, clients = list(replies), self.knowledge.clients
        for view in (self.view(server_round, reply) for reply in replies):
            if honest := tuple(client for client in view.senders if client < clients):
                save_view(self.folder, dataclasses.replace(view, senders=honest))
        own = [self._own(reply) for reply in replies]
        return self.inner.aggregate_train(server_round, own)

    def _own(self, reply: Message) -> Message:
        received, prefix = reply.content.array_records["arrays"], self.crafted.prefix
        own = {name: received[prefix + name] for name in self.honest if prefix + name in received}
        return with_arrays(reply, ArrayRecord(own))


@register("role", "interceptor")
class Interceptor(Eavesdropper):
    """An eavesdropper whose hand is on the line under its channel's protocol.

    It is the :class:`~fedsim.population.Tap` of the federation's population.

    Parameters
    ----------
    attack : Interception
        Says, round by round, what goes over the line.
    knowledge : Knowledge
        What the attack may know.
    seal : callable
        ``seal(function, *args)`` runs attack code out of reach of what it must not see.
    """

    def __init__(
        self,
        inner: Strategy,
        folder: Path,
        kind: str,
        *,
        attack: Attack,
        knowledge: Knowledge,
        seal: Seal,
    ) -> None:
        super().__init__(inner, folder, kind)
        if not isinstance(attack, Interception):
            raise TypeError(f"{attack.name} has no hand in the protocol")
        self.attack, self.knowledge, self.seal = attack, knowledge, seal
        self.tap = RoundTap()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send what the strategy sends, with the attack on the line from here on."""
        self.tap = self.seal(self.attack.intercept, server_round, self.knowledge)
        self.round = server_round
        return super().configure_train(server_round, arrays, config, grid)

    def outgoing(self, messages: list[Message]) -> list[Message]:
        """Let the attack rewrite what the protocol sends, and count to how many it lies."""
        sent: list[Message] = self.seal(self.tap.outgoing, messages)
        honest = {id(message) for message in messages}
        if lies := sum(id(message) not in honest for message in sent):
            self.receipts.append(f"lied to {lies}/{len(sent)} clients in round {self.round}")
        return sent

    def incoming(self, replies: list[Message]) -> list[Message]:
        """Let the attack read what clients answer, and rewrite what the protocol is told."""
        told: list[Message] = self.seal(self.tap.incoming, replies)
        return told

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Save what the protocol should have hidden, then go on as an eavesdropper."""
        uploads: dict[int, Upload] = self.seal(self.tap.uploads)
        for client, upload in sorted(uploads.items()):
            sent = self.sent[node_of(client)]
            save_view(
                self.folder,
                ServerView(
                    round=server_round,
                    senders=(client,),
                    model=str(sent.config_records["config"]["model"]),
                    sent=tensors(sent.array_records["arrays"]),
                    received=upload.received,
                    kind="gradient" if self.kind == "gradient" else "weights",
                    num_examples=upload.num_examples,
                ),
            )
        if uploads:
            self.receipts.append(f"unmasked {len(uploads)} uploads in round {server_round}")
        return super().aggregate_train(server_round, replies)


def _differ(model: ModelToSend, honest: ModelToSend) -> bool:
    """Say whether a model is any other than the honest one."""
    if (model.expression, model.arrays.keys()) != (honest.expression, honest.arrays.keys()):
        return True
    pairs = ((tensor, honest.arrays[name]) for name, tensor in model.arrays.items())
    return any(one.dtype != own.dtype or not torch.equal(one, own) for one, own in pairs)


def tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return a record's arrays as tensors."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}
