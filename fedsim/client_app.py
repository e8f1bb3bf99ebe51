"""The ClientApp: one client's side of the federation, whatever process it runs in.

Nothing here depends on a process surviving: a client's state is in Flower's ``context.state``,
under its own name, because one SuperNode may host many clients.
"""

import dataclasses
import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from fedsim import seeds
from fedsim.audit.vault import VaultRecord, deposit
from fedsim.data import DataSpec, Split, load_dataset
from fedsim.defense import ClientContext, Defense, Tensors
from fedsim.local import LocalData, Trained
from fedsim.models import build_model, load_arrays, uploaded_names
from fedsim.parts import Parts
from fedsim.population import ADDRESS, node_of
from fedsim.scenario import Scenario

STORE = "defense-store"


def vault_root(context: Context) -> Path:
    """Return where this client deposits: its SuperNode's own ``vault``, or this machine's."""
    named = context.node_config.get("vault")
    return Path(str(named)) if named else seeds.home() / "vaults" / str(context.run_id)


def logical_client(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Be the one client that a message is for: its node id, its state, its secret stream."""
    if ADDRESS not in msg.content:
        return call_next(msg, context)
    client = int(msg.content.pop(ADDRESS)["client"])
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
    entropy = own.node_config.get("secret") == "entropy"
    scenario = _parts(own).scenario
    secret = seeds.secret_generator(
        scenario.seed, "client", client, msg.metadata.group_id, msg.metadata.message_type,
        entropy=entropy,
    )  # fmt: skip
    with seeds.seeded_globals(secret.initial_seed()):  # SecAgg+ rounds with numpy's global stream
        reply = call_next(msg, own)
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
    who = {key: int(config.get(key, default)) for key, default in _SOLE_HOST.items()}
    return Message(RecordDict({"whoami": MetricRecord(who)}), reply_to=msg)


_SOLE_HOST = {"partition-id": 0, "num-partitions": 1}


@app.train(mods=[through_channel])
def train(msg: Message, context: Context) -> Message:
    """Train with the defenses, deposit the truth in the vault, and upload."""
    return _respond(msg, context, _parts(context).defenses, truth=True)


@app.train("baseline")
def baseline(msg: Message, context: Context) -> Message:
    """Train without defenses, for the auditor's comparison; only where the run asks for one."""
    if not _parts(context).scenario.audit.baseline:
        raise PermissionError("this run has no baseline: a server may not ask for one")
    return _respond(msg, context, (), truth=False)


@lru_cache(maxsize=2)
def _parts_of(flat: str) -> Parts:
    return Parts(Scenario.from_flat(json.loads(flat)))


def _parts(context: Context) -> Parts:
    """Build the scenario's components once a process."""
    return _parts_of(json.dumps(dict(context.run_config), sort_keys=True))


def _respond(
    msg: Message, context: Context, defenses: tuple[Defense, ...], *, truth: bool
) -> Message:
    parts = _parts(context)
    config = msg.content["config"]
    server_round = int(config["server-round"])
    torch.set_num_threads(parts.scenario.federation.threads or os.cpu_count() or 1)
    model = _received_model(parts, config, msg.content["arrays"])
    split = _own_data(parts, context)
    data = LocalData(split, parts.device, parts.dtype)
    ctx = _defense_context(parts, context, server_round, len(data))
    received = {name: p.detach() for name, p in model.state_dict().items()}
    for defense in defenses:
        verdict = defense.inspect(model, received, ctx)
        if not verdict.accept:
            raise PermissionError(f"{defense.name} refused the model: {verdict.reason}")
    for defense in defenses:
        model = defense.wrap_model(model, ctx)
    public = seeds.derive(parts.scenario.seed, "training", ctx.client, server_round)
    with seeds.seeded_globals(public):  # dropout
        trained = parts.local.train(
            model, data, defenses, ctx, float(config.get("proximal-mu", 0.0))
        )
    names = uploaded_names(model, parts.scenario.model.batchnorm)
    upload = _upload(model, trained.upload, names)
    if truth:
        _deposit(parts, context, ctx, split, trained, upload, defenses)
        _remember(context, ctx.store)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: _array(tensor) for name, tensor in upload.items()}),
            "metrics": MetricRecord({"num-examples": len(trained.indices)}),
        }
    )
    return Message(content, reply_to=msg)


@lru_cache(maxsize=2)
def _empty_model(expression: str, spec: DataSpec, precision: str, device: str) -> nn.Module:
    return build_model(expression, spec).to(getattr(torch, precision)).to(torch.device(device))


def _received_model(parts: Parts, config: ConfigRecord, arrays: ArrayRecord) -> nn.Module:
    """Load what was received into this worker's one model, in place."""
    spec = DataSpec(
        tuple(config["shape"]), config["num_classes"], tuple(config["mean"]), tuple(config["std"])
    )
    precision = parts.scenario.federation.precision
    model = _empty_model(str(config["model"]), spec, precision, str(parts.device))
    load_arrays(model, {name: array.numpy() for name, array in arrays.items()})
    return model.train(parts.scenario.model.batchnorm != "frozen")


def _own_data(parts: Parts, context: Context) -> Split:
    """Return this client's examples: its SuperNode's own data set, or its partition."""
    if named := context.node_config.get("dataset"):
        return load_dataset(str(named)).train
    return parts.dataset.train.subset(parts.partitions[int(context.node_config["client"])])


def _defense_context(
    parts: Parts, context: Context, server_round: int, examples: int
) -> ClientContext:
    client, seed = int(context.node_config["client"]), parts.scenario.seed
    entropy = context.node_config.get("secret") == "entropy"
    stored = context.state.array_records.get(STORE, ArrayRecord())
    return ClientContext(
        client=client,
        round=server_round,
        plan=parts.local.plan(examples, parts.scenario.federation.rounds),
        public=lambda *names: seeds.generator(seed, "client", client, *names),
        secret=lambda *names: seeds.secret_generator(
            seed, "client", client, server_round, *names, entropy=entropy
        ),
        store={name: torch.from_numpy(array.numpy()) for name, array in stored.items()},
    )


def _remember(context: Context, store: Tensors) -> None:
    if store:
        context.state[STORE] = ArrayRecord({name: _array(t) for name, t in store.items()})


def _upload(model: nn.Module, trained: Tensors, names: list[str]) -> Tensors:
    own = model.state_dict()
    return {name: (trained[name] if name in trained else own[name]).detach() for name in names}


def _array(tensor: torch.Tensor) -> Array:
    return Array(tensor.cpu().numpy())


def _deposit(
    parts: Parts,
    context: Context,
    ctx: ClientContext,
    split: Split,
    trained: Trained,
    upload: Tensors,
    defenses: tuple[Defense, ...],
) -> None:
    images, labels = split.batch(trained.indices)
    record = VaultRecord(
        client=ctx.client,
        round=ctx.round,
        examples=images,
        labels=labels,
        indices=trained.indices,
        receipts=[
            {
                "name": defense.name,
                "parameters": dataclasses.asdict(defense),  # type: ignore[call-overload]
                **ctx.effect(defense).receipt(),
            }
            for defense in defenses
        ],
        upload=upload if parts.channel.aggregates else None,
    )
    deposit(vault_root(context), record)
