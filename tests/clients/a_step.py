"""One step of a small network on a few images, for defenses that look at model and examples."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim import seeds
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, Tensors
from fedsim.models import build_model
from tests.clients.one_update import context

SPEC = DataSpec(shape=(3, 16, 16), num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


def small_model(expression: str = "convnet(width=8, stride=2)", seed: int = 0) -> nn.Module:
    with seeds.seeded_globals(seed):
        return build_model(expression, SPEC)


def few_images(count: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SPEC.shape, generator=generator), torch.arange(count) % 10


def true_gradient(model: nn.Module, batch: Batch) -> Tensors:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = cross_entropy(model(batch[0]), batch[1])
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def a_step(
    model: nn.Module, batch: Batch, *, step: int = 0, seed: int = 0
) -> tuple[Tensors, ClientContext]:
    """Return the batch gradient and the context that a defense sees it in."""
    ctx = context(seed, step=step)
    ctx.trainee, ctx.batch = model, batch
    return true_gradient(model, batch), ctx


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])
