"""What a model does with noise: all that a server without data can try on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsim.data import DataSpec

IMAGES = 32


def noise(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return uniform images ``[32, C, H, W]`` in ``[0, 1]`` and labels ``[32]`` of every class."""
    spec: DataSpec = model.spec  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, *spec.shape, generator=generator)
    return images.to(next(model.parameters())), torch.arange(IMAGES) % spec.num_classes


def features(model: nn.Module, head: nn.Linear) -> Tensor:
    """Return what the last layer gets of the noise, ``[32, D]``; the model's state stays."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad(), _in_eval_mode(model):
        model(noise(model)[0])
    handle.remove()
    return seen[0]


def moved(model: nn.Module) -> set[str]:
    """Return the parameters whose gradient on the noise is anything but exactly zero."""
    images, labels = noise(model)
    parameters = dict(model.named_parameters())
    with _in_eval_mode(model):
        loss = nn.functional.cross_entropy(model(images), labels.to(images.device))
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return {name for name, g in zip(parameters, gradients, strict=True) if g.count_nonzero()}


def last_hidden(model: nn.Module, head: str) -> str | None:
    """Return the name of the last layer with a bias that is run before the one named ``head``."""
    run: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: run.append(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
    ]
    with torch.no_grad(), _in_eval_mode(model):
        model(noise(model)[0])
    for handle in handles:
        handle.remove()
    before = run[: run.index(head)] if head in run else []
    return before[-1] if before else None


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """BatchNorm's statistics stay as they are."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
