"""SecAgg+ unmasking: name a client as living and as dropped, and its masks come off.

Double masking (Bonawitz et al., CCS 2017; SecAgg+: Bell et al., CCS 2020).  Client u uploads

    y_u = x_u + PRG(b_u) + sum over its neighbors v of (+-) PRG(s_uv)    modulo 2^32

with a private seed ``b_u`` and seeds ``s_uv`` agreed with each neighbor from the key ``sk_u``;
``b_u`` and ``sk_u`` are shared out among the neighbors, ``t`` of them recover either.  In the last
stage the server lists who lives and who dropped, and each client answers with a share of ``b_u``
for every u that lives (its pairwise masks cancel in the sum) and of ``sk_u`` for every u that
dropped (they do not).  All rests on one rule: *no client gives out both for the same u*.

Flower 1.41's client does not check the rule: it answers both lists, whether or not they are
disjoint, and whatever threshold the server sets.  A server that names u in both has both seeds, all
of u's masks, and ``x_u``: the update times its weight, in steps of the quantization, exactly.  It
hands the shares it was owed on to its own honest half of the protocol, and the sum comes out as if
nothing had happened: every client of a round can be named at once, and the sum stays what it was.
(Were the other shares left in, the server's code would combine shares of two secrets, and fail.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray
from pydantic import Field

from fedsim.attack import Paper, Reconstruction, Setting, ToyCase
from fedsim.errors import ScenarioError
from fedsim.interception import Interception, RoundTap, Upload
from fedsim.population import client_of, node_of
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.handing_on import HandsOn
from strategies.channels.secagg import SecAgg, possible_uploads

Lists = Literal["overlapping", "split"]
Integers = list[NDArray[Any]]


@register("attack", "secagg-unmasking")
@dataclass(frozen=True, kw_only=True)
class SecAggUnmasking(HandsOn, Interception):
    """Take single clients' uploads out of SecAgg+, then let a passive attack work on them.

    Threat model F (or what ``then`` needs beyond it), on the channel ``secagg``; clients of
    ``secagg(strict=True)`` refuse.  The model that clients get is the honest one, and so is the
    aggregate.  Costs nothing that travels but one more share a victim and neighbor, and for each
    victim as many masks as it has neighbors.

    Parameters
    ----------
    then : str
        The passive attack that reads the uploads, as an expression.
    victims : list of int or None
        Whose uploads; None takes those of all.
    lists : {"overlapping", "split"}
        ``overlapping``: each neighbor is told that the victim lives, and that it dropped.
        ``split``: some are told the one and some the other, so that no single client can see the
        lie; this wants two sets of neighbors that can each recover a seed, and the server lowers
        the threshold that it tells clients as far as that takes.
    """

    paper: ClassVar[Paper] = Paper(
        title="Practical Secure Aggregation for Privacy-Preserving Machine Learning",
        authors="Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth",
        venue="CCS",
        year=2017,
        published="no figures: the paper states the rule that clients must keep (never both kinds "
        "of shares for one client), and Flower's clients do not keep",
        measured="Flower 1.41, photo-tiles, mlp, one image a client, then linear-inversion: "
        "fedsim run scenarios/secagg_unmasking.toml (8 clients, 1 victim): its image at 95 dB with "
        "its label; all victims: 8 of 8, median 96 dB, of 32 clients 32, median 96 dB; "
        "secagg(max_weight=1000), steps a thousand times as wide: 35 dB.  linear-inversion on the "
        "sum alone: none of 8, best 18 dB.  strict=True: every client refuses, no view",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.MANIPULATION}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "F",
            "attack": "secagg-unmasking",
            "channel": "secagg(max_weight=1)",
            "data.dataset": "digits",
            "model.name": "mlp",
            "federation.clients": 3,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        # Limited by the steps of the quantization; seeds 0 to 9 gave 96.6 to 100.1.
        low=90.0,
        high=110.0,
    )

    then: str = "linear-inversion"
    victims: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    lists: Lists = "overlapping"

    def check_setting(self, setting: Setting) -> None:
        """Refuse a channel without this protocol, victims that do not exist, and idle splits."""
        channel = setting.channel
        if not isinstance(channel, SecAgg):
            raise ScenarioError(
                "channel",
                channel.name,
                f"{self.name} breaks the protocol of secagg; use channel = 'secagg', or without "
                f"secure aggregation attack = {self.then!r}",
            )
        if absent := sorted(v for v in self.victims or () if v >= setting.clients):
            raise ValueError(
                f"victim {absent[0]} is none of the {setting.clients} clients, 0 and up"
            )
        shares, threshold = channel.shares(setting.cohort)
        if self.lists == "split" and shares == threshold:
            raise ValueError(
                f"all {shares} shares of a seed are wanted for the sum, none is left to tell of "
                "the other; lists='split' needs a threshold below 1"
            )
        super().check_setting(replace(setting, cohort=1))

    def intercept(self, server_round: int, knowledge: Knowledge) -> RoundTap:  # noqa: ARG002
        """Return a tap that lies."""
        knowledge.require(Capability.MANIPULATION)
        nodes = None if self.victims is None else frozenset(map(node_of, self.victims))
        return Unmasking(nodes, self.lists)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Let the passive attack read the single uploads, or the sums where there are none."""
        single = [at for at, view in enumerate(views) if len(view.senders) == 1]
        chosen = single or list(range(len(views)))
        found = self.inner.reconstruct([views[at] for at in chosen], knowledge)
        what = "single uploads" if single else "sums: no upload could be unmasked"
        return replace(
            found,
            views=torch.tensor(chosen, dtype=torch.int64)[found.views],
            receipts=(f"{self.then} read {len(chosen)} {what}", *found.receipts),
        )


@dataclass
class Unmasking(RoundTap):
    """What the server holds of one round of SecAgg+, and what it says in the last stage.

    Attributes
    ----------
    victims : frozenset of int or None
        Node ids; None for all.
    lists : {"overlapping", "split"}
        As in the attack.
    terms : ConfigRecord
        What the first stage told clients.
    owed : int
        How many shares that a client lives the sum needs: the honest threshold.
    keys : dict of int to bytes
        Public keys ``pk1`` by node.
    neighbors : dict of int to list of int
        With whom a victim masked its upload: whose ciphertexts the server forwarded to it.
    masked : dict of int to list of ndarray
        ``y_u``: the weight ``[1]`` and every array, int64 below the modulus.
    asked : dict of int to tuple
        Whom a client was told to live, and to have dropped, and who really did.
    seeds, secrets : dict of int to list of bytes
        Shares of ``b_u`` and of ``sk_u``.
    """

    victims: frozenset[int] | None
    lists: Lists
    terms: ConfigRecord = field(default_factory=ConfigRecord)
    owed: int = 0
    keys: dict[int, bytes] = field(default_factory=dict)
    neighbors: dict[int, list[int]] = field(default_factory=dict)
    names: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    masked: dict[int, Integers] = field(default_factory=dict)
    asked: dict[int, tuple[list[int], list[int], list[int]]] = field(default_factory=dict)
    seeds: dict[int, list[bytes]] = field(default_factory=dict)
    secrets: dict[int, list[bytes]] = field(default_factory=dict)

    def outgoing(self, messages: list[Message]) -> list[Message]:
        """Note what the server says, and lie about the victims where masks are to come off."""
        if not messages or RECORD_KEY_CONFIGS not in messages[0].content:
            return messages
        stage = _record(messages[0])[Key.STAGE]
        if stage == Stage.SETUP:
            return self._set_up(messages)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self.names = possible_uploads(messages[0])
            for message in messages:
                sources = cast(list[int], _record(message)[Key.SOURCE_LIST])
                self.neighbors[message.metadata.dst_node_id] = list(sources)
        if stage == Stage.UNMASK:
            return self._misnamed(messages)
        return messages

    def incoming(self, replies: list[Message]) -> list[Message]:
        """Keep keys, masked uploads and shares; hand on what the honest half asked for."""
        told = []
        for reply in replies:
            node, said = reply.metadata.src_node_id, reply.content.config_records
            record = said.get(RECORD_KEY_CONFIGS, ConfigRecord())
            if Key.PUBLIC_KEY_1 in record:
                self.keys[node] = cast(bytes, record[Key.PUBLIC_KEY_1])
            if Key.MASKED_PARAMETERS in record and self._is_victim(node):
                arrays = cast(list[bytes], record[Key.MASKED_PARAMETERS])
                self.masked[node] = [bytes_to_ndarray(array) for array in arrays]
            told.append(self._sorted_out(reply) if Key.SHARE_LIST in record else reply)
        return told

    def uploads(self) -> dict[int, Upload]:
        """Take the masks off every victim of whom enough shares came."""
        enough = cast(int, self.terms.get(Key.THRESHOLD, 0))
        return {
            client_of(victim): self._unmasked(victim)
            for victim in sorted(self.masked)
            if min(len(self.seeds.get(victim, ())), len(self.secrets.get(victim, ()))) >= enough > 0
        }

    def _is_victim(self, node: int) -> bool:
        return self.victims is None or node in self.victims

    # -- what the server says ------------------------------------------------------------------
    def _set_up(self, messages: list[Message]) -> list[Message]:
        """Keep the terms; to split the lists, let fewer shares be enough, if that takes less."""
        self.terms = ConfigRecord(dict(_record(messages[0])))
        self.owed = cast(int, self.terms[Key.THRESHOLD])
        left = cast(int, self.terms[Key.SHARE_NUMBER]) - self.owed
        if self.lists == "overlapping" or left >= self.owed:
            return messages
        self.terms = ConfigRecord({**self.terms, Key.THRESHOLD: left})
        return [_with_record(message, self.terms) for message in messages]

    def _misnamed(self, messages: list[Message]) -> list[Message]:
        """Say of each victim that it dropped: to all, or to those who are not owed to the sum."""
        living = {
            message.metadata.dst_node_id: cast(list[int], _record(message)[Key.ACTIVE_NODE_ID_LIST])
            for message in messages
        }
        sent = []
        for message in messages:
            node, record = message.metadata.dst_node_id, _record(message)
            alive, dead = living[node], cast(list[int], record[Key.DEAD_NODE_ID_LIST])
            named = [v for v in alive if v in self.masked and node in self._for(v, living)]
            if self.lists == "split":
                alive = [v for v in alive if v not in named]
            self.asked[node] = alive, dead + named, dead
            lie = ConfigRecord(dict(record))
            lie[Key.ACTIVE_NODE_ID_LIST], lie[Key.DEAD_NODE_ID_LIST] = alive, dead + named
            sent.append(_with_record(message, lie) if named else message)
        return sent

    def _for(self, victim: int, living: dict[int, list[int]]) -> list[int]:
        """Return who is told that a victim dropped.

        Of those who may be asked, the sum is owed ``self.owed`` shares that the victim lives.  To
        split, begin with the victim and go round, so that nobody is told it of too many.
        """
        asked = sorted(node for node, alive in living.items() if victim in alive)
        if self.lists == "overlapping":
            return asked
        start = sum(node < victim for node in asked)
        return (asked[start:] + asked[:start])[: len(asked) - self.owed]

    # -- what the server hears -----------------------------------------------------------------
    def _sorted_out(self, reply: Message) -> Message:
        """Keep all shares, and return the reply without those that only the lie asked for."""
        alive, dead, really_dead = self.asked[reply.metadata.src_node_id]
        record = _record(reply)
        shares = cast(list[bytes], record[Key.SHARE_LIST])
        seeds, secrets = shares[: len(alive)], shares[len(alive) :]
        for kept, nodes, found in ((self.seeds, alive, seeds), (self.secrets, dead, secrets)):
            for node, share in zip(nodes, found, strict=True):
                kept.setdefault(node, []).append(share)
        honest = ConfigRecord(dict(record))
        honest[Key.NODE_ID_LIST] = alive + really_dead
        honest[Key.SHARE_LIST] = seeds + secrets[: len(really_dead)]
        return _with_record(reply, honest)

    # -- what follows --------------------------------------------------------------------------
    def _unmasked(self, victim: int) -> Upload:
        """Return ``x_u``, divided by its weight.

        The private mask, then each neighbor's, with the sign that the victim gave it; what is left
        is the quantized weight and the weighted arrays in steps of
        ``2 * clipping_range / target_range``.
        """
        masked, modulus = self.masked[victim], cast(int, self.terms[Key.MOD_RANGE])
        shapes = [array.shape for array in masked]
        own = pseudo_rand_gen(combine_shares(self.seeds[victim]), modulus, shapes)
        values = parameters_subtraction(masked, own)
        secret = bytes_to_private_key(combine_shares(self.secrets[victim]))
        for neighbor in self.neighbors[victim]:
            agreed = generate_shared_key(secret, bytes_to_public_key(self.keys[neighbor]))
            mask = pseudo_rand_gen(agreed, modulus, shapes)
            taken_off = parameters_subtraction if victim > neighbor else parameters_addition
            values = taken_off(values, mask)
        (weight,), *quantized = parameters_mod(values, modulus)
        steps = cast(int, self.terms[Key.TARGET_RANGE])
        weighted = dequantize(quantized, cast(float, self.terms[Key.CLIPPING_RANGE]), steps)
        share = int(weight) / steps
        shaped = next(names for names in self.names if len(names) == len(weighted))
        received = {
            name: torch.from_numpy(np.asarray(array / share).reshape(shape))
            for (name, shape), array in zip(shaped.items(), weighted, strict=True)
        }
        largest = cast(float, self.terms[Key.MAX_WEIGHT])
        return Upload(received, num_examples=round(share * largest))


def _record(message: Message) -> ConfigRecord:
    return message.content.config_records[RECORD_KEY_CONFIGS]


def _with_record(message: Message, record: ConfigRecord) -> Message:
    """Return a message that says something else in the protocol, and all else as before."""
    changed = copy.copy(message)
    changed.content = RecordDict({**message.content, RECORD_KEY_CONFIGS: record})
    return changed
