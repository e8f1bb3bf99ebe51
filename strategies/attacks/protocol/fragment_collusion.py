"""Fragment collusion: whoever swaps fragments with a client holds its whole update.

Fragmented learning (Jebreel, Domingo-Ferrer, Blanco-Justicia, Sanchez, ACM TIST 2022) pairs clients
k and j, who agree on a secret mask M and upload ::

    u_k = (1 - M) w_k + M w_j          u_j = (1 - M) w_j + M w_k

The partner j knows M and was handed ``M w_k``.  If it talks to the server, which reads u_k, the two
together hold every coordinate of w_k:

    w_k = (1 - M) u_k + M (M w_k)

The paper's threat is a server alone; that partners who collude with it see all is said there by
what a partner is sent.  Here **the server is the partner**: keys are not authenticated, so that it
tells each client a public key of its own in the place of the partner's, opens the fragment that
comes back, and sends a fragment of zeros, of as many examples as the client's own, to be mixed in.
With keys that somebody vouches for, a device of the server's that happens to be the partner has the
same, of one client in each round.

Once all is in, the channel's own server is told what clients would have uploaded in the clear: the
sum of the round stays what it would have been.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from pydantic import Field

from fedsim.attack import Paper, Reconstruction, Setting, ToyCase
from fedsim.errors import ScenarioError
from fedsim.interception import Interception, RoundTap, Upload
from fedsim.population import client_of
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.handing_on import HandsOn
from strategies.channels.fragmented import (
    RECORD,
    Fragmented,
    Held,
    mask,
    seal,
    shared_secret,
    unseal,
)

WEIGHT = 8  # bytes before a fragment: of how many examples its sender's update is


@register("attack", "fragment-collusion")
@dataclass(frozen=True, kw_only=True)
class FragmentCollusion(HandsOn, Interception):
    """Be everybody's partner in fragmented learning, then let a passive attack read the uploads.

    Threat model F (or what ``then`` needs beyond it), on the channel ``fragmented``.  The model
    that clients get is the honest one, and so is the sum.  Costs nothing that would not travel
    anyway.

    Parameters
    ----------
    then : str
        The passive attack that reads the uploads, as an expression.
    share : float
        The channel's: which coordinates a pair exchanges follows from it and the agreed secret.
    """

    paper: ClassVar[Paper] = Paper(
        title="Enhanced Security and Privacy via Fragmented Federated Learning",
        authors="Jebreel, Domingo-Ferrer, Blanco-Justicia, Sanchez",
        venue="ACM TIST",
        year=2022,
        published="no figures: the defense's paper, whose clients trust their partners",
        measured="every upload as in the clear, gradients bit for bit (pytest "
        "tests/strategies/protocol/test_fragment_collusion.py).  Photo tiles, mlp, then "
        "linear-inversion: 8 of 8 exactly, mean 153.9 dB; linear-inversion on the mixed uploads "
        "none, best 8.9 dB (fedsim run scenarios/fragment_collusion.toml; fragmented.toml)",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.DETAILS, Capability.MANIPULATION}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "F",
            "attack": "fragment-collusion",
            "channel": "fragmented",
            "data.dataset": "digits",
            "model.name": "mlp",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        # As in the clear: the ratio is exact in float32, and 200 is the auditor's cap.
        low=120.0,
        high=199.0,
    )

    then: str = "linear-inversion"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def check_setting(self, setting: Setting) -> None:
        """Refuse a channel without partners, and what the passive attack refuses."""
        if not isinstance(setting.channel, Fragmented):
            raise ScenarioError(
                "channel",
                setting.channel.name,
                f"{self.name} is a partner in fragmented learning; use channel = 'fragmented', or "
                f"attack = {self.then!r}",
            )
        if self.share != setting.channel.share:
            raise ValueError(
                f"it would look for share={self.share:g} of the coordinates where clients exchange "
                f"share={setting.channel.share:g}; write share={setting.channel.share:g}"
            )
        super().check_setting(setting)

    def intercept(self, server_round: int, knowledge: Knowledge) -> RoundTap:
        """Return a tap that is everybody's partner."""
        knowledge.require(Capability.MANIPULATION)
        generator = knowledge.generator("fragment-collusion", server_round)
        own = torch.randint(256, (32,), generator=generator, dtype=torch.uint8)
        return Colluding(bytes(own.tolist()), self.share, knowledge.training.kind)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Let the passive attack read the uploads that were put together."""
        return self.inner.reconstruct(views, knowledge)


@dataclass
class Colluding(RoundTap):
    """The partner that every client has in one round, and what it was told.

    Attributes
    ----------
    private : bytes
        The partner's own key.
    share : float
        Of the coordinates, what a pair exchanges.
    kind : {"gradient", "weights"}
        What clients upload.
    secrets : dict of int to bytes
        What was agreed with each client, by node.
    partners : dict of int to int
        The node that each client takes the partner to be.
    sent : dict of int to ArrayRecord
        The model that each client got.
    fragments : dict of int to bytes
        What each client sent its partner: of how many examples it is, and ``M w_k``.
    whole : dict of int to Upload
        By client, what each would have uploaded in the clear.
    """

    private: bytes
    share: float
    kind: str
    secrets: dict[int, bytes] = field(default_factory=dict)
    partners: dict[int, int] = field(default_factory=dict)
    sent: dict[int, ArrayRecord] = field(default_factory=dict)
    fragments: dict[int, bytes] = field(default_factory=dict)
    whole: dict[int, Upload] = field(default_factory=dict)

    def outgoing(self, messages: list[Message]) -> list[Message]:
        """Tell each client our key in the place of its partner's, then our fragment."""
        return [self._told(message) for message in messages]

    def incoming(self, replies: list[Message]) -> list[Message]:
        """Keep keys and fragments; hand on whole uploads in the place of mixed ones."""
        return [self._heard(reply) for reply in replies]

    def uploads(self) -> dict[int, Upload]:
        """Return the whole uploads, which the channel's own server was told, too."""
        return self.whole

    def _told(self, message: Message) -> Message:
        node, told = message.metadata.dst_node_id, _record(message)
        if "key" in told:
            self.partners[node] = cast(int, told["partner"])
            self.sent[node] = message.content.array_records["arrays"]
            public = X25519PrivateKey.from_private_bytes(self.private).public_key()
            return _saying(message, key=public.public_bytes_raw())
        if "fragment" in told:
            return _saying(message, fragment=self._of_zeros(node))
        return message

    def _heard(self, reply: Message) -> Message:
        node, said = reply.metadata.src_node_id, _record(reply)
        if "key" in said:
            self.secrets[node] = shared_secret(self.private, cast(bytes, said["key"]))
        elif "fragment" in said:
            sealed, partner = cast(bytes, said["fragment"]), self.partners[node]
            self.fragments[node] = unseal(self.secrets[node], node, partner, sealed)
        elif node in self.fragments and not reply.has_error():
            return self._unmixed(node, reply)
        return reply

    def _of_zeros(self, node: int) -> bytes:
        """Return a fragment in which nothing moved, of as many examples as the client's own."""
        weight, own = self.fragments[node][:WEIGHT], self.fragments[node][WEIGHT:]
        return seal(self.secrets[node], self.partners[node], node, weight + bytes(len(own)))

    def _unmixed(self, node: int, reply: Message) -> Message:
        """Put what the client gave away back into ``u_k``, whose place holds our zeros."""
        held = Held(self.sent[node], reply.content.array_records["arrays"])
        update = held.flat(self.kind)
        exchanged = mask(self.secrets[node], len(update), self.share)
        examples = int.from_bytes(self.fragments[node][:WEIGHT], "big")
        update[exchanged] = np.frombuffer(self.fragments[node][WEIGHT:], dtype=held.dtype)
        arrays = held.arrays(update, self.kind)
        received = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        self.whole[client_of(node)] = Upload(received, examples)
        changed = copy.copy(reply)
        metrics = MetricRecord({"num-examples": examples})
        changed.content = RecordDict({**reply.content, "arrays": arrays, "metrics": metrics})
        return changed


def _record(message: Message) -> ConfigRecord:
    """Return what a message says in the protocol, if anything; an error says nothing."""
    if message.has_error():
        return ConfigRecord()
    return message.content.config_records.get(RECORD, ConfigRecord())


def _saying(message: Message, **changes: bytes) -> Message:
    """Return a message that says something else in the protocol, and all else as before."""
    changed = copy.copy(message)
    told = ConfigRecord({**_record(message), **changes})
    changed.content = RecordDict({**message.content, RECORD: told})
    return changed
