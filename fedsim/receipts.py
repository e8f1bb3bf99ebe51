"""What a defense really did, measured on the way and never sent."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsim.defense import Batch, ClientContext, Effect, Tensors


def measured_update(
    effect: Effect,
    hook: Callable[[Tensors, ClientContext], Tensors],
    value: Tensors,
    ctx: ClientContext,
) -> Tensors:
    """Apply a hook on a gradient or an update, and add what it did to ``effect``."""
    started = time.perf_counter()
    result = hook(value, ctx)
    effect.seconds += time.perf_counter() - started
    if result is not value:
        for name, after in result.items():
            before = value.get(name, after)
            effect.changed |= before is not after and not torch.equal(before, after)
            effect.dot += float(torch.sum(before * after))
            effect.before += float(torch.sum(before * before))
            effect.after += float(torch.sum(after * after))
    return result


def measured_hook(effect: Effect, hook: Callable[..., Any], *arguments: Any) -> Any:
    """Call a hook that has no before and after to compare; what it returns is what it changes."""
    started = time.perf_counter()
    result = hook(*arguments)
    effect.seconds += time.perf_counter() - started
    effect.changed |= result is not None
    return result


def measured_batch(
    effect: Effect,
    hook: Callable[[Batch, ClientContext], Batch],
    batch: Batch,
    ctx: ClientContext,
) -> Batch:
    """Apply a hook on a batch, and note in ``effect`` whether it changed anything."""
    started = time.perf_counter()
    result = hook(batch, ctx)
    effect.seconds += time.perf_counter() - started
    effect.changed |= any(_differs(a, b) for a, b in zip(batch, result, strict=True))
    return result


def _differs(before: Tensor, after: Tensor) -> bool:
    return before is not after and not torch.equal(before, after)
