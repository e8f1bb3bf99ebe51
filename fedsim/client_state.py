"""What a client remembers between rounds: ledgers of privacy, residuals, keys.

It is kept in Flower's ``context.state``, which a SuperNode holds in memory: one that is started
anew has forgotten it.  A SuperNode whose node config names a folder, ``state='...'``, keeps a copy
there, by run and client, and reads it when Flower has none.
"""

from pathlib import Path
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedsim.defense import Tensors
from fedsim.files import write_atomically

STORE = "defense-store"


def remembered(context: Context) -> Tensors:
    """Return the store of the client that a context is of.

    Raises
    ------
    RuntimeError
        If its copy on disk is damaged: a client that lost its ledger must not begin anew.
    """
    if STORE in context.state.array_records:
        stored = context.state.array_records[STORE]
        return {name: torch.from_numpy(array.numpy().copy()) for name, array in stored.items()}
    path = _copy(context)
    if path is None or not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"this client's state is damaged: {path}: {error}") from error


def remember(context: Context, store: Tensors) -> None:
    """Keep a store for the next round; on disk first, where there is a folder for it."""
    if not store:
        return
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in store.items()}
    if path := _copy(context):
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, save({name: tensor.clone() for name, tensor in plain.items()}))
    context.state[STORE] = ArrayRecord({name: Array(t.numpy()) for name, t in plain.items()})


def _copy(context: Context) -> Path | None:
    """Return where this client's store is kept on disk, if it is."""
    named = context.node_config.get("state")
    if not named:
        return None
    client = cast(int, context.node_config["client"])
    return Path(str(named)) / str(context.run_id) / f"client-{client}.safetensors"
