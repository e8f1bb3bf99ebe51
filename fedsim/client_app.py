"""The ClientApp: one client's side of the federation, whatever process it runs in.

Nothing here depends on a process surviving: a client's state is in Flower's ``context.state``,
under its own name, because one SuperNode may host many clients.
"""

import copy
import dataclasses
import os
import sys
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fedsim import seeds
from fedsim.audit.vault import VaultRecord, deposit
from fedsim.client_state import remember, remembered
from fedsim.data import DataSpec, Split, load_dataset
from fedsim.defense import (
    REFUSED,
    Batch,
    ClientContext,
    Defense,
    Refusal,
    Tensors,
    Verdict,
    norm_bounds,
)
from fedsim.local import LocalData
from fedsim.models import build_model, load_arrays, trained_tensors, uploaded_names
from fedsim.parts import Parts
from fedsim.placing import places_in, whole
from fedsim.population import ADDRESS, node_of
from fedsim.receipts import in_network, measured_model
from fedsim.scenario import Scenario

Verdicts = dict[str, Verdict]  # by how a refusal begins
ANSWERED = "answered"  # in the store: the rounds that this client took part in


def vault_root(context: Context) -> Path:
    """Return where this client deposits: its SuperNode's own ``vault``, or this machine's."""
    named = context.node_config.get("vault")
    return Path(str(named)) if named else seeds.home() / "vaults" / str(context.run_id)


def logical_client(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Be the one client that a message is for: its node id, its state, its secret stream."""
    if ADDRESS not in msg.content:
        return call_next(msg, context)
    client = cast(int, msg.content.config_records[ADDRESS]["client"])
    del msg.content[ADDRESS]
    prefix = f"client-{client}."
    own = Context(
        run_id=context.run_id,
        node_id=node_of(client),
        node_config={**context.node_config, "client": client},
        state=RecordDict(
            {n.removeprefix(prefix): r for n, r in context.state.items() if n.startswith(prefix)}
        ),
        run_config=context.run_config,
    )
    host = msg.metadata.dst_node_id
    msg.metadata.dst_node_id = node_of(client)
    scenario = _parts(own).scenario
    secret = seeds.secret_generator(
        scenario.seed, "client", client, msg.metadata.group_id, msg.metadata.message_type,
        run_id=context.run_id, key=_key(own),
    )  # fmt: skip
    with seeds.seeded_globals(secret):  # SecAgg+ rounds with numpy's global stream
        try:
            reply = call_next(msg, own)
        except Refusal as refusal:  # of this round it remembers nothing
            msg.metadata.dst_node_id = host
            return Message(Error(REFUSED, str(refusal)), reply_to=msg)
    msg.metadata.dst_node_id = host
    for name, record in own.state.items():
        context.state[prefix + name] = record
    if reply.has_error():
        return Message(reply.error, reply_to=msg)
    return Message(reply.content, reply_to=msg)


def through_channel(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Train behind the channel that the scenario names."""
    return _parts(context).channel.client(msg, context, call_next)


app = ClientApp(mods=[logical_client])


@app.query("whoami")
def whoami(msg: Message, context: Context) -> Message:
    """Tell the server which partition this SuperNode hosts."""
    config = context.node_config
    who = MetricRecord()
    for key, default in (("partition-id", 0), ("num-partitions", 1)):
        who[key] = int(config.get(key, default))
    return Message(RecordDict({"whoami": who}), reply_to=msg)


@app.train(mods=[through_channel])
def train(msg: Message, context: Context) -> Message:
    """Train with the defenses, deposit the truth in the vault, and upload."""
    parts = _parts(context)
    if cast(int, context.node_config["client"]) >= parts.scenario.federation.clients:
        return _sybil(msg, parts)
    return _respond(msg, context, _parts(context).defenses, truth=True)


@app.train("baseline")
def baseline(msg: Message, context: Context) -> Message:
    """Train without defenses, for the auditor's comparison; only where the run asks for one."""
    if not _parts(context).scenario.audit.baseline:
        raise PermissionError("this run has no baseline: a server may not ask for one")
    return _respond(msg, context, (), truth=False)


def _sybil(msg: Message, parts: Parts) -> Message:
    """Upload, as a device of the attacker's own, what changes nothing: it has no data."""
    sent = msg.content.array_records["arrays"]
    model = build_model(*_own_model(parts, msg.content.config_records["config"])[:2])
    upload = {}
    for name in uploaded_names(model, parts.scenario.model.batchnorm):
        array = sent[name].numpy()
        upload[name] = Array(np.zeros_like(array) if parts.local.kind == "gradient" else array)
    content = RecordDict({"arrays": ArrayRecord(upload)})
    content["metrics"] = MetricRecord({"num-examples": 1})
    return Message(content, reply_to=msg)


def _parts(context: Context) -> Parts:
    """Build the scenario's components once a worker; attack code has no business here."""
    sys.audit("fedsim.private", "the clients' side")
    flat = dict(context.run_config)
    if _worker.parts is None or _worker.flat != flat:
        _worker.parts, _worker.flat = Parts(Scenario.from_flat(flat)), flat
    return _worker.parts


class _Worker(threading.local):
    """What this thread keeps between two clients: the scenario's parts, and one model.

    A client that hangs or fails keeps its model; the next one gets another.
    """

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.flat: dict[str, Any] = {}
        self.idle: dict[tuple[Any, ...], nn.Module] = {}


_worker = _Worker()


def _respond(
    msg: Message, context: Context, defenses: tuple[Defense, ...], *, truth: bool
) -> Message:
    """Look at the model, train it, look at what came of it, and upload; or refuse (``Refusal``)."""
    parts, vault = _parts(context), vault_root(context)
    torch.set_num_threads(parts.scenario.federation.threads or os.cpu_count() or 1)
    config = msg.content.config_records["config"]
    own = _own_model(parts, config)
    model = _loaded(parts, own, msg.content.array_records["arrays"])
    split = _own_data(parts, context)
    data = LocalData(split, parts.device, parts.dtype)
    ctx = _defense_context(parts, context, cast(int, config["server-round"]), len(data), model)
    ctx.model, ctx.spec, ctx.labels = own[0], own[1], split.labels
    ctx.places, ctx.bounds = places_in(msg.content), norm_bounds(defenses, ctx.plan)
    _worker.idle = {own: model}  # who refuses it has not touched it: each looks at a copy
    verdicts = _inspect(model, defenses, parts.local.probe(data, ctx), ctx)
    _refuse(verdicts, ctx, vault)
    _worker.idle = {}
    before = _before(model, defenses)
    pull = cast(float, config.get("proximal-mu", 0.0))
    used, upload = _trained(parts, model, data, defenses, ctx, pull=pull)
    verdicts |= _inspect_update(before, upload, data.batch(used), defenses, ctx)
    model.zero_grad()
    _worker.idle = {own: model}
    _refuse(verdicts, ctx, vault)
    if parts.channel.masks:
        upload = {name: whole(tensor, ctx.places.get(name)) for name, tensor in upload.items()}
    if truth:
        record = _record(parts, ctx, split, used, defenses)
        kept = upload if parts.attack is not None and parts.channel.masks else record.upload
        cut_off = _beyond(upload, parts.channel.carries(max(1, _weight(defenses, ctx, len(used)))))
        told = {**_told(verdicts), "cut_off": cut_off}
        deposit(vault, dataclasses.replace(record, upload=kept, **told))
        remember(context, ctx.store)
    arrays = ArrayRecord({name: _array(tensor) for name, tensor in upload.items()})
    metrics = MetricRecord({"num-examples": _weight(defenses, ctx, len(used))})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


def _trained(
    parts: Parts,
    model: nn.Module,
    data: LocalData,
    defenses: tuple[Defense, ...],
    ctx: ClientContext,
    *,
    pull: float,
) -> tuple[Tensor, Tensors]:
    """Train with the defenses; return which examples were used, and what would be uploaded."""
    for defense in defenses:
        there = in_network(defense, parts.scenario.model.name, ctx.model)
        ctx.effect(defense).changed |= there
    trainee = _wrapped(model, defenses, ctx)
    ctx.shared = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    with seeds.seeded_globals(ctx.secret("training")):  # nobody may know what dropout left on
        trained = parts.local.train(trainee, data, defenses, ctx, pull)
    ctx.trainee = ctx.batch = None
    names = uploaded_names(model, parts.scenario.model.batchnorm)
    return trained.indices, _upload(trainee, trained.upload, names)


def _beyond(upload: Tensors, largest: float) -> float:
    """Return the share of an upload's values that are larger than ``largest``."""
    values = sum(tensor.numel() for tensor in upload.values())
    return sum(int((tensor.abs() > largest).sum()) for tensor in upload.values()) / values


def _weight(defenses: tuple[Defense, ...], ctx: ClientContext, examples: int) -> int:
    """Return how many examples the client says that its update is of."""
    told = (defense.weight(ctx.plan) for defense in defenses)
    return next((weight for weight in told if weight is not None), examples)


def _loaded(
    parts: Parts, own: tuple[str, DataSpec, torch.dtype, str], sent: ArrayRecord
) -> nn.Module:
    """Return the model that was asked for, with what was sent: the idle one, if it is that."""
    model = _worker.idle.pop(own, None) or build_model(own[0], own[1]).to(parts.device, parts.dtype)
    load_arrays(model, {name: array.numpy() for name, array in sent.items()})
    return model.train(parts.scenario.model.batchnorm != "frozen")


def _own_model(parts: Parts, config: ConfigRecord) -> tuple[str, DataSpec, torch.dtype, str]:
    """Return what model the server asks for, and of what type and where it is wanted here."""
    spec = DataSpec(
        shape=cast(tuple[int, int, int], tuple(cast(list[int], config["shape"]))),
        num_classes=cast(int, config["num_classes"]),
        mean=tuple(cast(list[float], config["mean"])),
        std=tuple(cast(list[float], config["std"])),
    )
    return str(config["model"]), spec, parts.dtype, str(parts.device)


def _inspect(
    model: nn.Module, defenses: tuple[Defense, ...], probe: Batch, ctx: ClientContext
) -> Verdicts:
    """Let each defense look at a copy of the model received, whatever the others think of it."""
    received = {name: p.detach() for name, p in model.state_dict().items()}
    return {
        f"{d.name} refused the model": d.inspect(copy.deepcopy(model), received, probe, ctx)
        for d in defenses
        if type(d).inspect is not Defense.inspect
    }


def _before(model: nn.Module, defenses: tuple[Defense, ...]) -> Tensors:
    """Return a copy of the model received, for who will compare; training changes the model."""
    if all(type(d).inspect_update is Defense.inspect_update for d in defenses):
        return {}
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def _inspect_update(
    before: Tensors, upload: Tensors, used: Batch, defenses: tuple[Defense, ...], ctx: ClientContext
) -> Verdicts:
    """Let each defense look at what would be sent, as its reader would."""
    update = upload
    if before and ctx.plan.kind == "weights":
        update = {name: sent.double() - before[name].double() for name, sent in upload.items()}
    return {
        f"{d.name} refused to send the update": d.inspect_update(before, update, used, ctx)
        for d in defenses
        if type(d).inspect_update is not Defense.inspect_update
    }


def _refuse(verdicts: Verdicts, ctx: ClientContext, vault: Path) -> None:
    """Refuse where any verdict does, and tell the auditor what all of them said.

    Raises
    ------
    Refusal
        Saying who refused, and why.
    """
    why = [f"{refusal}: {v.reason}" for refusal, v in verdicts.items() if not v.accept]
    if why:
        nothing = torch.empty(0, dtype=torch.int64)
        record = VaultRecord(ctx.client, ctx.round, torch.empty(0, 0, 0, 0), nothing, nothing)
        told = _told(verdicts)
        deposit(vault, dataclasses.replace(record, refused="; ".join(why), **told))
        raise Refusal("; ".join(why))


def _told(verdicts: Verdicts) -> dict[str, Any]:
    """Return what the auditor is told of verdicts; a later measurement replaces an earlier."""
    return {
        "checks": {name: score for v in verdicts.values() for name, score in v.checks.items()},
        "remarks": [v.reason for v in verdicts.values() if v.accept and v.reason],
    }


def _wrapped(model: nn.Module, defenses: tuple[Defense, ...], ctx: ClientContext) -> nn.Module:
    """Let each defense wrap the model: a copy, because the next client gets this one."""
    wrapping = [d for d in defenses if type(d).wrap_model is not Defense.wrap_model]
    if wrapping:
        model = copy.deepcopy(model)
    for defense in wrapping:
        model = measured_model(ctx.effect(defense), defense.wrap_model, model, ctx)
    return model


def _own_data(parts: Parts, context: Context) -> Split:
    """Return this client's examples: its SuperNode's own data set, or its partition."""
    if named := context.node_config.get("dataset"):
        return load_dataset(str(named)).train
    return parts.dataset.train.subset(parts.partitions[cast(int, context.node_config["client"])])


def _defense_context(
    parts: Parts, context: Context, server_round: int, examples: int, model: nn.Module
) -> ClientContext:
    client, seed = cast(int, context.node_config["client"]), parts.scenario.seed
    plan = parts.local.plan(examples, parts.scenario.federation.rounds)
    store = remembered(context)
    # A server that calls two rounds by one number must not get the same noise twice.
    rounds = store.get(ANSWERED, torch.zeros(0, dtype=torch.int64))
    again = int((rounds == server_round).sum())
    store[ANSWERED] = torch.cat([rounds, torch.tensor([server_round])])

    # Nor from a SuperNode that was started anew, and forgot what it answered.
    fresh = [process] if (process := seeds.of_this_process()) else []
    key = _key(context)  # of this message: in it, one use is one draw, however often it is asked

    def secret(*names: object) -> torch.Generator:
        own = "client", client, server_round, again, *fresh, *names
        return seeds.secret_generator(seed, *own, run_id=context.run_id, key=key)

    return ClientContext(
        client=client,
        round=server_round,
        plan=dataclasses.replace(plan, tensors=trained_tensors(model)),
        public=lambda *names: seeds.generator(seed, "client", client, *names),
        secret=secret,
        store=store,
        run_id=context.run_id,
    )


def _key(context: Context) -> bytes | None:
    """Return the key of a client that draws from the operating system; None for the machine's."""
    return seeds.fresh_key() if context.node_config.get("secret") == "entropy" else None


def _upload(model: nn.Module, trained: Tensors, names: list[str]) -> Tensors:
    """Return what travels, in order: what was trained, and statistics as they are now."""
    everything = {**model.state_dict(), **trained}
    return {name: everything[name].detach() for name in names}


def _array(tensor: torch.Tensor) -> Array:
    return Array(tensor.cpu().numpy())


def _record(
    parts: Parts,
    ctx: ClientContext,
    split: Split,
    indices: torch.Tensor,
    defenses: tuple[Defense, ...],
) -> VaultRecord:
    """Return the truth for the auditor; no examples where nobody attacks them."""
    if parts.attack is None:
        indices = indices[:0]
    receipts = [
        {
            "name": defense.name,
            "parameters": dataclasses.asdict(cast(Any, defense)),
            **ctx.effect(defense).receipt(),
        }
        for defense in defenses
    ]
    own = split.subset(indices)
    return VaultRecord(ctx.client, ctx.round, own.images, own.labels, indices, receipts)
