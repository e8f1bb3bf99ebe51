"""Fragmented federated learning: two clients swap parts of their updates before they upload.

FFL (Jebreel, Domingo-Ferrer, Blanco-Justicia, Sánchez, ACM TIST 2022).  In each round the clients
pair up, and the two of a pair agree on a secret mask M over the coordinates.  Of updates w they
upload ::

    u_k = (1 - M) w_k + M w_j          u_j = (1 - M) w_j + M w_k          u_k + u_j = w_k + w_j

so that the server's sum is what it would have been, and no upload is anybody's.

**How the fragments travel.**  The server relays them, and cannot read them.  Three stages: each
client makes a key pair (X25519) and the server tells each its partner's public key; each trains
and sends ``M w`` encrypted with ChaCha20-Poly1305 under a key of its own direction, bound to the
round; each decrypts its partner's, mixes and uploads.  M comes out of the shared secret too
(ChaCha20's stream), so that it never travels.  Private keys come from the client's secret stream,
or from the operating system (``secret='entropy'``).  They do not survive a restart: a client that
is started anew within a round has no key any more, and sits the round out.

**Unequal clients.**  A client of n examples weighs n in the federation's mean, and the sum that has
to stay is ``n_k w_k + n_j w_j``.  Both upload updates scaled by ``n / m`` and say that they weigh
``m = (n_k + n_j) / 2``.  With equal n nothing is scaled and the equations are those above.  Of
weights (FedAvg) it is the change that is mixed, and the model sent is added again.

**What was wrong in the reference implementation** (najeebjebreel/FFL): its mask is
``randn >= 0.5``, which exchanges 30.9 % of the coordinates, not half (``share=0.309`` is that);
its fragments are blinded in name only, and no encryption takes place.

**What it promises**: an honest-but-curious server that looks at one upload sees at every
coordinate one of two clients' true values and not whose.  **What it does not**: magnitudes are not
hidden, a coordinate that only one of the two moves (a class, a bias of one's own) tells whose it
is; ``share`` of the coordinates are the other's, the rest true.  Keys are not authenticated.
**What breaks it**: a partner that talks to the server (a sybil among them) knows the whole update
from ``u_k`` and the fragments it got (``fragment-collusion``); attacks on sums add ``u_k + u_j``
and read a batch of two.

The paper's reputations (who is paired with whom, how uploads weigh) guard against poisoning and are
not here.  Who is left without a partner, by an odd number or because the partner failed, sits the
round out: alone its upload would be its own.
"""

import random
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
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
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import Field

from fedsim import registry, seeds
from fedsim.channel import Channel
from fedsim.grid import GridWrapper
from fedsim.models import is_buffer
from fedsim.placing import PLACES
from fedsim.population import Population, client_of
from fedsim.registry import register

RECORD = "fragmented"  # what the protocol says, and a client's own memory of the round
HELD = "fragmented-held/"  # before "upload" and "sent": what a client holds until it mixes


@register("channel", "fragmented")
@dataclass(frozen=True, kw_only=True)
class Fragmented(Channel):
    """Clients swap encrypted fragments of their updates in pairs; the server gets mixed ones.

    Parameters
    ----------
    share : float
        Expected share of the coordinates that the two of a pair exchange; 0.309 is what the
        authors' code does.
    """

    strengths: ClassVar[tuple[str, ...]] = (
        "fragmented(share=0.05)",
        "fragmented",
        "fragmented(share=0.7)",
    )
    adversary: ClassVar[str] = (
        "fragment-collusion(then='inverting-gradients(iterations=200, tv=1e-2)')"
    )

    mixes = True

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    #: How many pairs there were in each round so far, as the server counts.
    pairs: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: ARG002
        """Refuse a cohort without a pair."""
        if clients < 2:
            raise ValueError(f"a cohort of {clients} makes no pair; let at least 2 clients train")

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:
        """Return a grid that pairs clients and relays their fragments."""
        seed = cast(int, context.run_config["seed"])
        return FragmentedGrid(inner, timeout, seed, self.pairs)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer the stage that is asked for; train in the second."""
        if msg.metadata.message_type != MessageType.TRAIN:
            return call_next(msg, context)
        asked = msg.content.config_records.get(RECORD, ConfigRecord())
        memory = context.state.config_records.get(RECORD, ConfigRecord())
        stage, this_round = asked.get("stage"), asked.get("round") == memory.get("round")
        if stage == "keys":
            return Message(_public_key(asked, memory, context), reply_to=msg)
        if stage == "fragment" and this_round and "secret" not in memory:
            reply = call_next(msg, context)
            return reply if reply.has_error() else self._fragment(msg, reply, context)
        if stage == "mix" and this_round and "secret" in memory and "done" not in memory:
            return self._mixed(msg, context)
        raise RuntimeError(f"a client does not answer {stage!r} now: one partner, once a round")

    def _fragment(self, msg: Message, reply: Message, context: Context) -> Message:
        """Keep the upload, and encrypt for the partner what lies under the mask."""
        if PLACES in msg.content:
            raise RuntimeError("a block that is one client's own cannot be mixed with another's")
        asked, memory = msg.content.config_records[RECORD], context.state.config_records[RECORD]
        held = Held(msg.content.array_records["arrays"], reply.content.array_records["arrays"])
        examples = cast(int, reply.content.metric_records["metrics"]["num-examples"])
        partner, public = cast(int, asked["partner"]), cast(bytes, asked["key"])
        memory["secret"] = secret = shared_secret(cast(bytes, memory["key"]), public)
        memory["partner"], memory["examples"] = partner, examples
        context.state[HELD + "sent"], context.state[HELD + "upload"] = held.sent, held.upload
        flat = held.flat(_kind(context))
        fragment = flat[mask(secret, len(flat), self.share)].astype(held.dtype).tobytes()
        sealed = seal(secret, context.node_id, partner, examples.to_bytes(8, "big") + fragment)
        return Message(RecordDict({RECORD: ConfigRecord({"fragment": sealed})}), reply_to=msg)

    def _mixed(self, msg: Message, context: Context) -> Message:
        """Put the partner's fragment in the place of one's own, and upload."""
        asked, memory = msg.content.config_records[RECORD], context.state.config_records[RECORD]
        memory["done"] = True
        records = context.state.array_records
        held = Held(records[HELD + "sent"], records[HELD + "upload"])
        context.state[HELD + "sent"] = context.state[HELD + "upload"] = ArrayRecord()
        secret, partner = cast(bytes, memory["secret"]), cast(int, memory["partner"])
        opened = unseal(secret, partner, context.node_id, cast(bytes, asked["fragment"]))
        own, others = cast(int, memory["examples"]), int.from_bytes(opened[:8], "big")
        fragment = np.frombuffer(opened[8:], dtype=held.dtype)
        mean = (own + others) / 2
        flat = held.flat(_kind(context)) * (own / mean)
        exchanged = mask(secret, len(flat), self.share)
        if len(fragment) != exchanged.sum():
            raise RuntimeError("the partner's fragment is of another model")
        flat[exchanged] = fragment * (others / mean)
        metrics = MetricRecord({"num-examples": int(mean) if mean.is_integer() else mean})
        arrays = held.arrays(flat, _kind(context))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    def figures(self) -> dict[str, Any]:
        """Return the share exchanged, and how many pairs there were."""
        return {"share_exchanged": self.share, "pairs": sum(self.pairs)}


# -- the client's side -----------------------------------------------------------------------------


def _kind(context: Context) -> str:
    """Return what clients upload: gradients or weights."""
    local = str(context.run_config["federation.local"])
    return str(registry.build("local", local, "federation.local").kind)


def _public_key(asked: ConfigRecord, memory: ConfigRecord, context: Context) -> RecordDict:
    """Return this round's public key; the private one is new in a round, and remembered.

    It is named by the client's own count of keys too: a server that goes back to a round gets no
    second message under the first one's key.
    """
    server_round = cast(int, asked["round"])
    if memory.get("round") != server_round:
        made = cast(int, memory.get("made", 0)) + 1
        new = _private_key(context, server_round, made)
        memory = ConfigRecord({"round": server_round, "made": made, "key": new})
        context.state[RECORD] = memory
    private = X25519PrivateKey.from_private_bytes(cast(bytes, memory["key"]))
    return RecordDict({RECORD: ConfigRecord({"key": private.public_key().public_bytes_raw()})})


def _private_key(context: Context, server_round: int, made: int) -> bytes:
    """Return a new private key: the operating system's, or the secret stream's.

    That hangs on the process too: a client that was started anew has lost its count, and asked for
    the same round again it must not seal another fragment under the same key and nonce.  Under
    ``FEDSIM_SECRET_KEY`` it repeats.
    """
    if context.node_config.get("secret") == "entropy":
        return secrets.token_bytes(32)
    fresh = [process] if (process := seeds.of_this_process()) else []
    names = "fragmented", context.node_id, server_round, made, *fresh
    seed = cast(int, context.run_config["seed"])
    return seeds.secret_bytes(seed, *names, run_id=context.run_id)


@dataclass(frozen=True)
class Held:
    """What a client was sent and would upload: one flat vector of changes, and back."""

    sent: ArrayRecord
    upload: ArrayRecord

    @property
    def dtype(self) -> np.dtype[Any]:
        """What fragments travel as, little-endian."""
        return np.result_type(*(array.dtype for array in self.upload.values())).newbyteorder("<")

    def flat(self, kind: str) -> NDArray[np.float64]:
        """Return the gradient (of buffers the change), or what training changed."""
        return np.concatenate(
            [
                (array.numpy() - self._start(name, kind)).astype(np.float64).ravel()
                for name, array in self.upload.items()
            ]
        )

    def arrays(self, flat: NDArray[np.float64], kind: str) -> ArrayRecord:
        """Return changes as what is uploaded."""
        found, at = ArrayRecord(), 0
        for name, array in self.upload.items():
            own = array.numpy()
            change = flat[at : at + own.size].reshape(own.shape)
            found[name] = Array((self._start(name, kind) + change).astype(own.dtype))
            at += own.size
        return found

    def _start(self, name: str, kind: str) -> Any:
        if kind == "gradient" and not is_buffer(name):
            return 0.0
        return self.sent[name].numpy().astype(np.float64)


def shared_secret(private: bytes, public: bytes) -> bytes:
    """Return what only the two of a pair can compute, 32 bytes."""
    own = X25519PrivateKey.from_private_bytes(private)
    return own.exchange(X25519PublicKey.from_public_bytes(public))


def mask(secret: bytes, length: int, share: float) -> NDArray[np.bool_]:
    """Return which coordinates a pair exchanges, ``[length]``: each with probability ``share``."""
    cipher = Cipher(algorithms.ChaCha20(_derived(secret, "mask"), bytes(16)), mode=None)
    stream = np.frombuffer(cipher.encryptor().update(bytes(4 * length)), dtype="<u4")
    return np.asarray(stream < share * 2**32)


def seal(secret: bytes, sender: int, receiver: int, content: bytes) -> bytes:
    """Encrypt what one of a pair tells the other; once, for the key is of this direction."""
    key = _derived(secret, f"from {sender} to {receiver}")
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unseal(secret: bytes, sender: int, receiver: int, sealed: bytes) -> bytes:
    """Return what the partner encrypted.

    Raises
    ------
    RuntimeError
        If it is not what the partner encrypted.
    """
    key = _derived(secret, f"from {sender} to {receiver}")
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag as error:
        raise RuntimeError("the fragment is not what the partner encrypted") from error


def _derived(secret: bytes, purpose: str) -> bytes:
    info = f"fedsim fragmented: {purpose}".encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


# -- the server's side -----------------------------------------------------------------------------


def _beside(content: RecordDict, told: ConfigRecord) -> RecordDict:
    return RecordDict({**dict(content), RECORD: told})


@dataclass
class FragmentedGrid(GridWrapper):
    """Pairs clients at random, relays keys and fragments, and returns the mixed uploads."""

    inner: Population
    timeout: float
    seed: int
    pairs: list[int]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the three stages for training messages; pass anything else on."""
        messages = list(messages)
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return self.inner.send_and_receive(messages, timeout=timeout)
        limit = self.timeout if timeout is None else timeout
        server_round = len(self.pairs) + 1
        contents = {m.metadata.dst_node_id: m.content for m in messages}
        keys = self._told("key", self._ask("keys", server_round, dict.fromkeys(contents), limit))
        partners = self._paired(sorted(keys), server_round)
        asked = {
            node: _beside(contents[node], ConfigRecord({"partner": other, "key": keys[other]}))
            for node, other in partners.items()
        }
        replies = self._ask("fragment", server_round, asked, limit)
        fragments = self._told("fragment", replies)
        for node in (node for node in fragments if partners[node] not in fragments):
            self._left_out(node, "its partner dropped out: alone its upload would be its own")
        exchanged = {
            node: RecordDict({RECORD: ConfigRecord({"fragment": fragments[partner]})})
            for node in fragments
            if (partner := partners[node]) in fragments
        }
        self.pairs.append(len(exchanged) // 2)
        return self._ask("mix", server_round, exchanged, limit)

    def _ask(
        self,
        stage: str,
        server_round: int,
        contents: Mapping[int, RecordDict | None],
        timeout: float,
    ) -> list[Message]:
        asked = []
        for node, content in contents.items():
            filled = content or RecordDict({RECORD: ConfigRecord()})
            filled.config_records[RECORD]["stage"] = stage
            filled.config_records[RECORD]["round"] = server_round
            asked.append(Message(filled, node, MessageType.TRAIN))
        return list(self.inner.send_and_receive(asked, timeout=timeout)) if asked else []

    def _told(self, what: str, replies: list[Message]) -> dict[int, bytes]:
        """Return what clients said; who said nothing of the kind is left out."""
        found = {}
        for reply in replies:
            told = reply.content.config_records.get(RECORD, ConfigRecord()).get(what)
            if isinstance(told, bytes):
                found[reply.metadata.src_node_id] = told
            else:
                self._left_out(reply.metadata.src_node_id, f"its reply holds no {what}")
        return found

    def _paired(self, nodes: list[int], server_round: int) -> dict[int, int]:
        """Return everybody's partner; the last of an odd number has none."""
        shuffled = list(nodes)
        random.Random(seeds.derive(self.seed, "fragmented", server_round)).shuffle(shuffled)
        if len(shuffled) % 2:
            self._left_out(shuffled.pop(), "nobody was left to pair it with in this round")
        pairs = list(zip(shuffled[::2], shuffled[1::2], strict=True))
        return dict(pairs) | {second: first for first, second in pairs}

    def _left_out(self, node: int, reason: str) -> None:
        self.inner.ledger.fail(client_of(node), reason)

    def push_messages(self, _: Iterable[Message]) -> Iterable[str]:
        """Refuse: a single push would bypass the protocol."""
        raise RuntimeError("behind fragmented learning use send_and_receive")

    def pull_messages(self, _: Iterable[str]) -> Iterable[Message]:
        """Refuse: a single pull would bypass the protocol."""
        raise RuntimeError("behind fragmented learning use send_and_receive")
