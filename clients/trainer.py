"""Local training with the defense hooks, nothing else.

``fedsgd``: one batch, its gradient is uploaded (McMahan et al. 2017, FedSGD).
``fedavg``: local epochs of SGD, the weights are uploaded (McMahan et al. 2017, FedAvg; with
Flower's FedProx as server strategy the proximal term of Li et al. 2020 is added).
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.defense import Batch, ClientContext, Defense, Tensors, TrainingPlan
from fedsim.local import Local, LocalData, Trained
from fedsim.receipts import (
    measured_batch,
    measured_gradient,
    measured_loss,
    measured_sampler,
    measured_update,
)
from fedsim.registry import register

BatchSize = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


@register("local", "fedsgd")
@dataclass(frozen=True, kw_only=True)
class FedSGD(Local):
    """One batch's mean gradient is uploaded; the server takes the step ``w - lr * gradient``."""

    batch_size: BatchSize = 8
    lr: Rate = 0.1

    kind = "gradient"

    def check(self, most: int) -> None:
        """Refuse a batch that no client can fill; one that holds less uploads what it has."""
        if self.batch_size > most:
            raise ValueError(
                f"no client holds {self.batch_size} examples; let batch_size be at most {most}"
            )

    def plan(self, examples: int, rounds: int) -> TrainingPlan:
        """One step a round."""
        return TrainingPlan(self.kind, self.lr, self.batch_size, examples, 1, rounds)

    def train(
        self,
        model: nn.Module,
        data: LocalData,
        defenses: Sequence[Defense],
        ctx: ClientContext,
        proximal_mu: float = 0.0,  # noqa: ARG002 - its pull is zero at the first step
    ) -> Trained:
        """Compute the gradient of one batch, drawn without replacement."""
        first = self._first(len(data), ctx)
        batches = sampled(iter([first]), len(data), defenses, ctx)
        indices = next(iter(batches), first[:0])
        gradient = step_gradient(model, data.batch(indices), defenses, ctx)
        clean = ctx.public_part(gradient)
        _keep_training(model, gradient.keys() - clean.keys(), gradient, self.lr)
        used = torch.tensor(list(dict.fromkeys(indices.tolist())), dtype=torch.int64)
        return Trained(upload_transformed(clean, defenses, ctx), clean, used)

    def probe(self, data: LocalData, ctx: ClientContext) -> Batch:
        """Return the one batch."""
        return data.batch(self._first(len(data), ctx))

    def _first(self, examples: int, ctx: ClientContext) -> Tensor:
        order = torch.randperm(examples, generator=ctx.public("batches", ctx.round))
        return order[: self.batch_size]


@register("local", "fedavg")
@dataclass(frozen=True, kw_only=True)
class FedAvg(Local):
    """``epochs`` of SGD over the client's own examples; the weights are uploaded."""

    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: BatchSize = 32
    lr: Rate = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    kind = "weights"

    def plan(self, examples: int, rounds: int) -> TrainingPlan:
        """``epochs * ceil(examples / batch_size)`` steps a round."""
        steps = self.epochs * -(-examples // self.batch_size)
        return TrainingPlan(self.kind, self.lr, self.batch_size, examples, steps, rounds)

    def train(
        self,
        model: nn.Module,
        data: LocalData,
        defenses: Sequence[Defense],
        ctx: ClientContext,
        proximal_mu: float = 0.0,
    ) -> Trained:
        """Train, and return ``after - before`` beside what the defenses made of it."""
        parameters = trainable(model)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = torch.optim.SGD(
            parameters.values(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        seen = torch.zeros(len(data), dtype=torch.bool)
        for indices in sampled(self._batches(len(data), ctx), len(data), defenses, ctx):
            seen[indices] = True
            gradient = step_gradient(model, data.batch(indices), defenses, ctx)
            for name, parameter in parameters.items():
                pull = proximal_mu * (parameter.detach() - before[name]) if proximal_mu else 0
                parameter.grad = gradient[name] + pull
            for group in optimizer.param_groups:
                group["lr"] = rate(self.lr, defenses, ctx)
            optimizer.step()
            ctx.step += 1
        clean = ctx.public_part({n: p.detach() - before[n] for n, p in parameters.items()})
        update = upload_transformed(clean, defenses, ctx, before)
        changed = any(update[name] is not clean[name] for name in clean)
        after = {
            name: before[name] + update[name] if changed else parameters[name].detach()
            for name in clean
        }
        return Trained(after, clean, seen.nonzero().flatten(), update)

    def probe(self, data: LocalData, ctx: ClientContext) -> Batch:
        """Return the first epoch's first batch."""
        return data.batch(next(self._batches(len(data), ctx)))

    def _batches(self, examples: int, ctx: ClientContext) -> Iterator[Tensor]:
        for epoch in range(self.epochs):
            order = torch.randperm(examples, generator=ctx.public("batches", ctx.round, epoch))
            yield from torch.split(order, self.batch_size)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rate(lr: float, defenses: Sequence[Defense], ctx: ClientContext) -> float:
    """Return this step's learning rate, as the defenses have it."""
    for defense in defenses:
        changed = defense.learning_rate(lr, ctx)
        ctx.effect(defense).changed |= changed != lr
        lr = changed
    return lr


def _keep_training(model: nn.Module, private: Set[str], gradient: Tensors, lr: float) -> None:
    """Take the one step of FedSGD with the parameters that stay here."""
    parameters = trainable(model)
    with torch.no_grad():
        for name in private:
            parameters[name].sub_(lr * gradient[name])


def sampled(
    batches: Iterator[Tensor], examples: int, defenses: Sequence[Defense], ctx: ClientContext
) -> Iterator[Tensor]:
    """Let each defense choose the batches in its turn."""
    chosen = batches
    for defense in defenses:
        if type(defense).sampler is not Defense.sampler:
            effect = ctx.effect(defense)
            chosen = measured_sampler(effect, defense.sampler, chosen, examples, ctx)
    return chosen


def step_gradient(
    model: nn.Module, batch: Batch, defenses: Sequence[Defense], ctx: ClientContext
) -> Tensors:
    """Return one step's gradient: batch, loss, gradient, each as the defenses have it."""
    for defense in defenses:
        batch = measured_batch(ctx.effect(defense), defense.transform_batch, batch, ctx)
    gradient = own_gradient(model, batch, defenses, ctx)
    if gradient is None:
        gradient = batch_gradient(model, batch, defenses, ctx)
    ctx.trainee, ctx.batch = model, batch
    for defense in defenses:
        effect = ctx.effect(defense)
        gradient = measured_update(effect, defense.transform_gradient, gradient, ctx)
    return gradient


def own_gradient(
    model: nn.Module, batch: Batch, defenses: Sequence[Defense], ctx: ClientContext
) -> Tensors | None:
    """Return the gradient of the first defense that makes it in a way of its own, or None."""
    for defense in defenses:
        if type(defense).gradients is not Defense.gradients:
            effect = ctx.effect(defense)
            found = measured_gradient(effect, defense.gradients, model, batch, ctx)
            if found is not None:
                return found
    return None


def own_loss(
    model: nn.Module, batch: Batch, defenses: Sequence[Defense], ctx: ClientContext
) -> Tensor | None:
    """Return the loss of the first defense that has one of its own, or None."""
    for defense in defenses:
        if type(defense).loss is not Defense.loss:
            found = measured_loss(ctx.effect(defense), defense.loss, model, batch, ctx)
            if found is not None:
                return found
    return None


def batch_gradient(
    model: nn.Module, batch: Batch, defenses: Sequence[Defense], ctx: ClientContext
) -> Tensors:
    """Return the gradient of the mean loss over one batch."""
    loss = own_loss(model, batch, defenses, ctx)
    if loss is None:
        loss = cross_entropy(model(batch[0]), batch[1])
    parameters = trainable(model)
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def upload_transformed(
    update: Tensors, defenses: Sequence[Defense], ctx: ClientContext, start: Tensors | None = None
) -> Tensors:
    """Let each defense change what is uploaded: the update, or what it makes of ``start``."""
    for defense in defenses:
        effect = ctx.effect(defense)
        update = measured_update(effect, defense.transform_update, update, ctx, start)
    return update
