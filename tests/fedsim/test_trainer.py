"""Local training is plain PyTorch, step for step, and the defenses' hooks are where they say."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.trainer import FedAvg, FedSGD
from fedsim import seeds
from fedsim.data import Split, load_dataset
from fedsim.defense import Batch, ClientContext, Defense, Tensors
from fedsim.local import Local, LocalData, Trained
from fedsim.models import initial_model
from tests.fedsim.small import plain_gradient

CPU = torch.device("cpu")


def digits(count: int = 50) -> Split:
    return load_dataset("digits").train.subset(torch.arange(count))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return initial_model("mlp(hidden=[8])", load_dataset("digits").spec, 3).to(dtype)


def context(local: Local, examples: int, server_round: int = 1) -> ClientContext:
    return ClientContext(
        client=2,
        round=server_round,
        plan=local.plan(examples, 4),
        public=lambda *names: seeds.generator(7, "client", 2, *names),
        secret=lambda *names: seeds.secret_generator(7, "client", 2, *names),
    )


def trained(
    local: Local,
    *defenses: Defense,
    model: nn.Module | None = None,
    split: Split | None = None,
    pull: float = 0.0,
) -> Trained:
    split = digits() if split is None else split
    data = LocalData(split, CPU, torch.float32)
    return local.train(model or mlp(), data, defenses, context(local, len(split)), pull)


def plain_loop(local: FedAvg, pull: float = 0.0) -> dict[str, Tensor]:
    """Train as a PyTorch tutorial would, on the same batches."""
    model, split = mlp(), digits()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    for epoch in range(local.epochs):
        order = torch.randperm(50, generator=seeds.generator(7, "client", 2, "batches", 1, epoch))
        for indices in torch.split(order, local.batch_size):
            images, labels = split.batch(indices)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if pull:
                moved = zip(model.parameters(), start, strict=True)
                loss = loss + pull / 2 * torch.stack([((p - s) ** 2).sum() for p, s in moved]).sum()
            loss.backward()
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "local",
    [
        FedAvg(),
        FedAvg(epochs=3, batch_size=7, lr=0.2),
        FedAvg(epochs=2, batch_size=50, momentum=0.9, weight_decay=1e-2),
        FedAvg(batch_size=1000),
    ],
)
def test_fedavg_is_the_plain_loop_bit_for_bit(local: FedAvg) -> None:
    result = trained(local)
    for name, weight in plain_loop(local).items():
        assert torch.equal(result.upload[name], weight)
    assert result.indices.tolist() == list(range(50))
    before = dict(mlp().named_parameters())
    for name, moved in result.clean.items():
        assert torch.equal(moved, result.upload[name] - before[name])


def test_the_proximal_term_is_that_of_the_paper() -> None:
    local = FedAvg(epochs=2, batch_size=10, lr=0.1)
    result = trained(local, pull=0.5)
    for name, weight in plain_loop(local, pull=0.5).items():
        assert torch.allclose(result.upload[name], weight, atol=1e-6)
        assert not torch.allclose(result.upload[name], plain_loop(local)[name], atol=1e-6)


def test_fedsgd_is_the_gradient_of_one_batch_bit_for_bit() -> None:
    result = trained(FedSGD(batch_size=8))
    order = torch.randperm(50, generator=seeds.generator(7, "client", 2, "batches", 1))
    assert result.indices.tolist() == order[:8].tolist()
    images, labels = digits().batch(order[:8])
    for name, gradient in plain_gradient(mlp(), images, labels).items():
        assert torch.equal(result.upload[name], gradient)
        assert result.clean[name] is result.upload[name]


def test_fedsgd_of_more_than_there_is_takes_all() -> None:
    assert len(trained(FedSGD(batch_size=500)).indices) == 50


@pytest.mark.parametrize(
    ("local", "examples", "steps", "share"),
    [
        (FedSGD(batch_size=8), 50, 1, 0.16),
        (FedSGD(batch_size=80), 50, 1, 1.0),
        (FedAvg(epochs=2, batch_size=8), 50, 14, 0.16),
        (FedAvg(epochs=1, batch_size=50), 50, 1, 1.0),
    ],
)
def test_the_plan_is_what_is_done(local: Local, examples: int, steps: int, share: float) -> None:
    plan = local.plan(examples, 4)
    assert (plan.steps, plan.sample_rate, plan.rounds) == (steps, share, 4)
    done = context(local, examples)
    local.train(mlp(), LocalData(digits(examples), CPU, torch.float32), (), done)
    if isinstance(local, FedAvg):
        assert done.step == steps


def test_a_frozen_parameter_is_neither_trained_nor_uploaded() -> None:
    model = mlp()
    next(iter(model.parameters())).requires_grad_(False)
    for local in (FedSGD(), FedAvg()):
        assert "1.weight" not in trained(local, model=model).upload


def test_an_unused_parameter_has_a_gradient_of_zero() -> None:
    model = mlp()
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    assert trained(FedSGD(), model=model).upload["idle"].tolist() == [0, 0, 0]


# -- hooks -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hooked(Defense):
    """Writes down which hook was called, and does nothing else."""

    name = "hooked"
    calls: Any = None
    as_: str = "a"

    def _note(self, hook: str) -> None:
        self.calls.append(self.as_ + ":" + hook)

    def sampler(self, batches: Iterable[Tensor], examples: int, ctx: ClientContext) -> Any:
        self._note("sampler")
        return batches

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        self._note("batch")
        return batch

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor | None:
        self._note("loss")
        return None

    def gradients(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensors | None:
        self._note("gradients")
        return None

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        self._note("gradient")
        return gradient

    def learning_rate(self, lr: float, ctx: ClientContext) -> float:
        self._note("rate")
        return lr

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        self._note("update")
        return update


def test_hooks_run_in_the_order_of_the_work_and_of_the_chain() -> None:
    calls: list[str] = []
    chain = Hooked(calls=calls), Hooked(calls=calls, as_="b")
    trained(FedAvg(batch_size=50), *chain)
    per_step = ["batch", "gradients", "loss", "gradient", "rate"]
    expected = [f"{who}:{hook}" for hook in ["sampler", *per_step, "update"] for who in "ab"]
    assert calls == expected
    calls.clear()
    trained(FedSGD(), *chain)
    assert calls == [call for call in expected if "rate" not in call]


def test_hooks_that_change_nothing_change_nothing() -> None:
    for local in (FedSGD(), FedAvg(epochs=2, momentum=0.9)):
        defended = trained(local, Hooked(calls=[]))
        for name, tensor in trained(local).upload.items():
            assert torch.equal(defended.upload[name], tensor)


@dataclass(frozen=True, kw_only=True)
class Negating(Defense):
    name = "negating"

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        return {name: -tensor for name, tensor in gradient.items()}


@dataclass(frozen=True, kw_only=True)
class Halving(Defense):
    name = "halving"

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        return {name: tensor / 2 for name, tensor in update.items()}


@dataclass(frozen=True, kw_only=True)
class First(Defense):
    name = "first"

    def sampler(self, batches: Iterable[Tensor], examples: int, ctx: ClientContext) -> Any:
        return [torch.arange(3), torch.arange(3, 5)]


@dataclass(frozen=True, kw_only=True)
class Resting(Defense):
    name = "resting"

    def learning_rate(self, lr: float, ctx: ClientContext) -> float:
        return 0.0 if ctx.step else lr


def test_a_gradient_is_changed_before_it_is_trained_on_and_an_update_after() -> None:
    local = FedAvg(batch_size=50, lr=0.1)
    before, honest = dict(mlp().named_parameters()), trained(local)
    negated, halved = trained(local, Negating()), trained(local, Halving())
    for name, moved in honest.clean.items():
        assert torch.allclose(negated.upload[name], before[name] - moved, atol=1e-7)
        assert torch.equal(halved.upload[name], before[name] + moved / 2)
        assert torch.equal(halved.clean[name], moved)
        assert halved.update is not None
        assert torch.equal(halved.update[name], moved / 2)


def test_the_sampler_decides_what_is_trained_on() -> None:
    assert trained(FedSGD(), First()).indices.tolist() == [0, 1, 2]
    ctx = context(FedAvg(), 50)
    data = LocalData(digits(), CPU, torch.float32)
    result = FedAvg().train(mlp(), data, [First()], ctx)
    assert ctx.step == 2
    assert result.indices.tolist() == [0, 1, 2, 3, 4]


def test_the_learning_rate_is_that_of_the_step() -> None:
    rested = trained(FedAvg(epochs=1, batch_size=10), Resting())
    order = torch.randperm(50, generator=seeds.generator(7, "client", 2, "batches", 1, 0))
    gradient = plain_gradient(mlp(), *digits().batch(order[:10]))
    for name, before in mlp().named_parameters():
        assert torch.allclose(rested.upload[name], before - 0.05 * gradient[name], atol=1e-8)
