"""What clients of ``secagg(strict=True)`` refuse, around Flower's own SecAgg+.

Flower's client answers whatever each stage asks.  A strict one keeps the rules that an actively
malicious server would have it break, and whatever it refuses ends the round for it:

====================  ==============================================================================
set up                the terms are those agreed (a small modulus leaves the upload unmasked); more
                      than half of the shares recover a seed; the cohort is large enough
share keys            the server commits to the model; enough keys; only once
masked vectors        the model is the one committed to, and each neighbor's share carries proof
                      that the neighbor was told of the same model; enough neighbors, each once
unmask                nobody lives and has dropped, or stands there twice, or is a stranger; the
                      client itself lives; enough live; only once, even if refused before
====================  ==============================================================================

**More than half.**  A server may tell one client that u lives and another that it dropped.  To get
both of u's seeds, ``t`` clients must say the one and ``t`` others the other; of ``n`` shares that
takes ``2 t <= n``.  Nor can it declare u's neighbors dropped one by one: each client lets at most
``n - t`` drop, and ``n (n - t) >= t (n - 1)`` fails for ``t > n / 2`` and ``n > 1``.

**The model is bound into the shares.**  With the ciphertext of a share, which the server forwards,
goes ``HMAC(k_uv, H(model) || u || v || ciphertext)`` with the key ``k_uv`` that u and v agreed on
for the ciphertext.  A client that was told of another model computes another tag, and is refused;
and one that was told of one model and sent another refuses.  So nobody masks, or is summed, with a
neighbor that trains another model (Pasquini et al., CCS 2022).  No masks are touched, so that
dropouts are recovered as ever; the server learns nothing, for it knew the models.

What stays: keys are not authenticated, so that a server that sits between the clients from the
first stage on can be all of a victim's neighbors, and it can fill a cohort with devices of its own;
seeds of masks have 32 bits (Flower), which is within reach of trying them all.  Where each client
shares with some of the others only (``num_shares`` below 1), clients watch their own neighbors: a
server can still sum two parts of the cohort apart, each of ``t`` clients or more.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import Array, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)

from fedsim.defense import REFUSED

#: The record by which the server commits to a model, and a client's own memory of the round.
COMMITMENT = "secagg-model"
MEMORY = "secagg-strict"
TAG = hashlib.sha256().digest_size


class Refused(Exception):  # noqa: N818 - a client's answer, not its error
    """What a strict client says instead of an answer."""


@dataclass(frozen=True)
class Rules:
    """What a strict client insists on.

    Attributes
    ----------
    terms : mapping of str to int or float
        What the first stage must say, by its keys.
    min_cohort : int
        Among how many, itself included, the client wants to be summed.
    """

    terms: Mapping[str, int | float]
    min_cohort: int

    def check_terms(self, asked: ConfigRecord) -> None:
        """Refuse other terms, a threshold of half the shares or less, a cohort too small."""
        for key, agreed in self.terms.items():
            if asked.get(key) != agreed:
                raise Refused(f"{key} = {asked.get(key)!r}, and {agreed!r} was agreed")
        shares, threshold = cast(int, asked[Key.SHARE_NUMBER]), cast(int, asked[Key.THRESHOLD])
        if 2 * threshold <= shares:
            raise Refused(
                f"{threshold} of {shares} shares would recover a seed; more than half must be "
                "needed"
            )
        self.check_enough(cast(int, asked[Key.SAMPLE_NUMBER]), "clients take part")

    def check_enough(self, count: int, what: str) -> None:
        """Refuse to be one of too few."""
        if count < self.min_cohort:
            raise Refused(f"{count} {what}, and it wants to be one of {self.min_cohort} at least")


def guarded(msg: Message, context: Context, answer: ClientAppCallable, rules: Rules) -> Message:
    """Let Flower's client (``answer``) answer what may be answered, and refuse the rest."""
    if msg.metadata.message_type != MessageType.TRAIN:
        return answer(msg, context)
    memory = context.state.config_records.get(MEMORY, ConfigRecord())
    context.state[MEMORY] = memory
    try:
        return _answered(msg, context, answer, rules)
    except Refused as refusal:
        memory["refused"] = str(refusal)
        reason = f"secagg(strict=True) refused the round: {refusal}"
        return Message(Error(REFUSED, reason), reply_to=msg)


def _answered(msg: Message, context: Context, answer: ClientAppCallable, rules: Rules) -> Message:
    memory = context.state.config_records[MEMORY]
    asked = msg.content.config_records.get(RECORD_KEY_CONFIGS, ConfigRecord())
    stage = str(asked.get(Key.STAGE))
    if stage == Stage.SETUP:
        memory.clear()
        rules.check_terms(asked)
    elif "refused" in memory:
        raise Refused(f"this round is over since it refused: {memory['refused']!s}")
    elif stage == Stage.SHARE_KEYS:
        memory["model"] = model = _commitment(msg)
        rules.check_enough(len(asked) - 1, "keys were sent")
        reply = answer(msg, context)
        _tag(reply, context, model)
        return reply
    elif stage == Stage.COLLECT_MASKED_VECTORS:
        memory["sources"] = _check_neighbors(msg, context, rules)
    elif stage == Stage.UNMASK:
        _check_lists(asked, context, rules)
    else:
        raise Refused(f"{stage!r} is no stage of the protocol")
    return answer(msg, context)


# -- the model, bound into the shares --------------------------------------------------------------


def digest(content: RecordDict, known: dict[int, bytes] | None = None) -> bytes:
    """Return the hash of all that a client is sent but the protocol: settings and arrays.

    ``known`` remembers the hashes of arrays that several clients are sent, while they live.
    """
    known = {} if known is None else known
    whole = hashlib.sha256()
    for record in sorted(content.config_records.keys() - {RECORD_KEY_CONFIGS}):
        for name, value in sorted(content.config_records[record].items()):
            whole.update(f"{record} {name} = {value!r}\n".encode())
    for name, array in sorted(content.array_records["arrays"].items()):
        if id(array) not in known:
            known[id(array)] = _array_digest(array)
        whole.update(f"{name}\n".encode() + known[id(array)])
    return whole.digest()


def _array_digest(array: Array) -> bytes:
    values = array.numpy()
    return hashlib.sha256(f"{values.dtype}{values.shape}".encode() + values.tobytes()).digest()


def _commitment(msg: Message) -> bytes:
    told = msg.content.config_records.get(COMMITMENT, ConfigRecord()).get("digest")
    if not isinstance(told, bytes):
        raise Refused("the server does not say which model it is going to send")
    return told


def _keys(context: Context) -> dict[int, bytes]:
    """Return the key agreed with each neighbor, from the state of Flower's own client."""
    state = SecAggPlusState(**context.state.config_records[RECORD_KEY_STATE])
    return state.ss2_dict


def _proof(key: bytes, model: bytes, source: int, to: int, ciphertext: bytes) -> bytes:
    ends = source.to_bytes(8, "big") + to.to_bytes(8, "big")
    return hmac.new(key, model + ends + ciphertext, hashlib.sha256).digest()


def _tag(reply: Message, context: Context, model: bytes) -> None:
    """Put the proof of the model behind each ciphertext."""
    said, keys = reply.content.config_records[RECORD_KEY_CONFIGS], _keys(context)
    to = cast(list[int], said[Key.DESTINATION_LIST])
    ciphertexts = cast(list[bytes], said[Key.CIPHERTEXT_LIST])
    said[Key.CIPHERTEXT_LIST] = [
        ciphertext + _proof(keys[node], model, context.node_id, node, ciphertext)
        for node, ciphertext in zip(to, ciphertexts, strict=True)
    ]


def _check_neighbors(msg: Message, context: Context, rules: Rules) -> list[int]:
    """Check model and proofs, take the proofs off, and return whose shares came."""
    model = context.state.config_records[MEMORY].get("model")
    if not isinstance(model, bytes) or digest(msg.content) != model:
        raise Refused("the model is not the one that the server said it would send")
    asked, keys = msg.content.config_records[RECORD_KEY_CONFIGS], _keys(context)
    sources = cast(list[int], asked[Key.SOURCE_LIST])
    tagged = cast(list[bytes], asked[Key.CIPHERTEXT_LIST])
    if len(set(sources)) < len(sources) or not set(sources) <= keys.keys():
        raise Refused("its neighbors' shares come twice, or from strangers")
    rules.check_enough(len(sources) + 1, "clients shared their keys")
    for source, one in zip(sources, tagged, strict=True):
        proof = _proof(keys[source], model, source, context.node_id, one[:-TAG])
        if not hmac.compare_digest(proof, one[-TAG:]):
            raise Refused("a neighbor was told of another model")
    asked[Key.CIPHERTEXT_LIST] = [one[:-TAG] for one in tagged]
    return sources


# -- unmask ----------------------------------------------------------------------------------------


def _check_lists(asked: ConfigRecord, context: Context, rules: Rules) -> None:
    memory = context.state.config_records[MEMORY]
    if "unmasked" in memory:
        raise Refused("shares are asked for a second time in one round")
    memory["unmasked"] = True
    living = cast(list[int], asked[Key.ACTIVE_NODE_ID_LIST])
    dropped = cast(list[int], asked[Key.DEAD_NODE_ID_LIST])
    if both := len(set(living) & set(dropped)):
        raise Refused(f"{both} clients are said to live and to have dropped")
    if len(set(living)) < len(living) or len(set(dropped)) < len(dropped):
        raise Refused("a client stands twice in the lists of who lives and who dropped")
    if context.node_id not in living:
        raise Refused("it is itself not among those who live")
    if not {*living, *dropped} <= {context.node_id, *cast(list[int], memory["sources"])}:
        raise Refused("the lists name clients that it shared no masks with")
    rules.check_enough(len(living), "clients are left")
