"""What sparsifiers share: who competes with whom, what was dropped and comes later, what it weighs.

Error feedback is that of Lin et al., "Deep Gradient Compression", ICLR 2018, and Stich, Cordonnier,
Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, Algorithm 1:

    a = g + e,   s = C(a),   e <- a - s

with ``s`` uploaded and ``e`` kept by the client over rounds.  What was ever sent and what is still
kept add up to what was ever computed: nothing is lost, only late.  That is what saves the accuracy,
and what an observer of many rounds collects.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fedsim.defense import ClientContext, Defense, Place, Tensors

Scope = Literal["layer", "global"]
#: Bits of one float32, and of one index of a sparse message.
FLOAT, INDEX = 32, 32


def within(scope: Scope, tensors: Tensors, choose: Callable[[Tensor], Tensor]) -> Tensors:
    """Return the tensors with zeros where ``choose`` does not name a coordinate.

    ``choose`` maps a flat vector, one tensor's or all tensors' together, to the indices it keeps.
    """
    if scope == "layer":
        return {name: _kept(t.flatten(), choose).view_as(t) for name, t in tensors.items()}
    joined = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = torch.split(_kept(joined, choose), [t.numel() for t in tensors.values()])
    return {
        name: part.view_as(tensor)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def _kept(flat: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    chosen = choose(flat)
    sparse = torch.zeros_like(flat)
    sparse[chosen] = flat[chosen]
    return sparse


def with_feedback(
    defense: Defense,
    at: Place,
    tensors: Tensors,
    ctx: ClientContext,
    compress: Callable[[Tensors], Tensors],
) -> Tensors:
    """Compress what was computed now and what was kept back before; keep the new rest.

    The rest is in the client's store, one for each place.  Where the server changed a tensor's
    shape since, what was kept of the old one is of no use and is forgotten.
    """
    owed = {}
    for name, tensor in tensors.items():
        rest = ctx.store.get(f"{defense.name}/{at}/{name}")
        fits = rest is not None and rest.shape == tensor.shape
        owed[name] = tensor + rest.to(tensor) if rest is not None and fits else tensor
    sent = compress(owed)
    for name, tensor in owed.items():
        ctx.store[f"{defense.name}/{at}/{name}"] = (tensor - sent[name]).detach()
    return sent


def tell_sparsity(defense: Defense, sent: Tensors, ctx: ClientContext) -> None:
    """Tell the auditor what share is not zero, and the bytes of the smaller of two sparse codes.

    Indices and values, or a bitmap and values; uploads travel dense all the same.
    """
    size = sum(tensor.numel() for tensor in sent.values())
    left = sum(int(tensor.count_nonzero()) for tensor in sent.values())
    coded = min(left * (FLOAT + INDEX), left * FLOAT + size) / 8
    ctx.effect(defense).figures |= {
        "share_sent": left / max(size, 1),
        "bytes_coded": coded,
        "bytes_saved": size * FLOAT / 8 - coded,
    }
