"""What a defense really did, measured on the way and never sent."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import tee
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from fedsim import registry
from fedsim.defense import Batch, ClientContext, Defense, Effect, Tensors


def measured_update(
    effect: Effect,
    hook: Callable[[Tensors, ClientContext], Tensors],
    value: Tensors,
    ctx: ClientContext,
    start: Tensors | None = None,
) -> Tensors:
    """Apply a hook on a gradient or an update, and add what it did to ``effect``.

    ``start`` is what an update is added to before it is sent: what is rounded away there is no
    change.
    """
    result: Tensors = _timed(effect, hook, value, ctx)
    if result is not value:
        for name, after in result.items():
            before = value.get(name, after)
            if start is None or name not in start:
                effect.changed |= _differs(before, after)
            else:
                effect.changed |= _differs(start[name] + before, start[name] + after)
            effect.dot += float(torch.sum(before * after))
            effect.before += float(torch.sum(before * before))
            effect.after += float(torch.sum(after * after))
    return result


def measured_gradient(
    effect: Effect, hook: Callable[..., Tensors | None], model: nn.Module, batch: Batch, ctx: Any
) -> Tensors | None:
    """Call a hook that makes the gradient in a way of its own.

    A gradient that it makes counts as changed: to know better, one would train twice.
    """
    result: Tensors | None = _timed(effect, hook, model, batch, ctx)
    effect.changed |= result is not None
    return result


def measured_loss(
    effect: Effect, hook: Callable[..., Tensor | None], model: nn.Module, batch: Batch, ctx: Any
) -> Tensor | None:
    """Call a hook that computes the loss, and note whether it is another than cross-entropy.

    That is compared with the mean cross-entropy of the logits that the hook itself computed.
    """
    logits: list[Tensor] = []
    handle = model.register_forward_hook(lambda *seen: logits.append(seen[-1].detach()))
    try:
        loss: Tensor | None = _timed(effect, hook, model, batch, ctx)
    finally:
        handle.remove()
    if loss is not None and not effect.changed:
        usual = len(logits) == 1 and logits[0].shape[:1] == batch[1].shape[:1]
        effect.changed = not usual or _differs(loss.detach(), cross_entropy(logits[0], batch[1]))
    return loss


def measured_model(
    effect: Effect,
    hook: Callable[[nn.Module, ClientContext], nn.Module],
    model: nn.Module,
    ctx: ClientContext,
) -> nn.Module:
    """Let a hook wrap a model, and note whether modules, parameters or buffers are others.

    Hooks that it leaves in the model are not seen: they may do no more than count.
    """
    modules, tensors = _modules(model), {n: t.clone() for n, t in _tensors(model).items()}
    result: nn.Module = _timed(effect, hook, model, ctx)
    after = _tensors(result)
    effect.changed |= _modules(result) != modules or after.keys() != tensors.keys()
    effect.changed |= any(_differs(tensor, after[n]) for n, tensor in tensors.items() if n in after)
    return result


def _modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def _tensors(model: nn.Module) -> Tensors:
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def in_network(defense: Defense, base: str, sent: str) -> bool:
    """Say whether the network that was sent has in it what a defense makes of the scenario's.

    False for one that tells by itself when that network comes to anything.

    Parameters
    ----------
    defense : Defense
    base, sent : str
        Model expressions: the scenario's, and the one to train.
    """
    made = base if defense.tells_of_network else defense.architecture(base)
    return made != base and registry.parse(made, "model.name")[0].name in sent


def measured_sampler(
    effect: Effect,
    hook: Callable[..., Iterable[Tensor]],
    batches: Iterable[Tensor],
    examples: int,
    ctx: ClientContext,
) -> Iterator[Tensor]:
    """Let a hook choose the batches, and note, as they are drawn, whether they are others."""
    drawn, given = tee(batches)
    return _compared(effect, drawn, _timed(effect, hook, given, examples, ctx))


def _compared(
    effect: Effect, drawn: Iterator[Tensor], chosen: Iterable[Tensor]
) -> Iterator[Tensor]:
    for indices in chosen:
        before = next(drawn, None)
        effect.changed |= before is None or _differs(before, indices)
        yield indices
    effect.changed |= next(drawn, None) is not None


def _timed(effect: Effect, hook: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = hook(*arguments)
    effect.seconds += time.perf_counter() - started
    return result


def measured_batch(
    effect: Effect,
    hook: Callable[[Batch, ClientContext], Batch],
    batch: Batch,
    ctx: ClientContext,
) -> Batch:
    """Apply a hook on a batch, and note in ``effect`` whether it changed anything."""
    result: Batch = _timed(effect, hook, batch, ctx)
    effect.changed |= _differs(batch[0], result[0]) or _labeled_otherwise(batch[1], result[1])
    return result


def _labeled_otherwise(before: Tensor, after: Tensor) -> bool:
    """Say whether labels ``[B]`` or ``[B, K]`` are others, by more than a probability's rounding.

    The gradient has them beside probabilities; what is rounded away there is no change.
    """
    if after.is_floating_point() and before.shape == after.shape[:1]:
        before = one_hot(before, after.shape[1]).to(after)
    if not after.is_floating_point() or before.shape != after.shape:
        return _differs(before, after)
    return not bool(((after - before).abs() <= torch.finfo(after.dtype).eps).all())


def _differs(before: Tensor, after: Tensor) -> bool:
    return before is not after and not torch.equal(before, after)
