"""A client whose defense is in its model, and an attacker of its upload, with no federation."""

import copy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from clients.trainer import step_gradient, trainable, upload_transformed
from fedsim import seeds
from fedsim.data import DataSpec, Split, load_dataset
from fedsim.defense import ClientContext, Defense, Tensors
from fedsim.models import initial_model, travelling
from fedsim.penalized import penalized_loss
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from tests.clients.one_update import context
from tests.strategies.passive.honest import Honest


@cache
def digits() -> Split:
    return load_dataset("digits").train


@cache
def spec() -> DataSpec:
    return load_dataset("digits").spec


def images_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(seed))
    return digits().batch(chosen[:count], torch.float64)


@dataclass(frozen=True)
class Sent:
    """One client's upload, and the modules behind it: what was shared, and what was trained."""

    expression: str
    shared: nn.Module
    trained: nn.Module
    upload: Tensors
    ctx: ClientContext

    @property
    def batchnorm(self) -> str:
        """The scenario's policy that has clients in this mode."""
        return "private" if self.shared.training else "frozen"

    def view(self) -> ServerView:
        """Return what the server sees.

        The wrapped model's own parameters stand in for what the server sent where names are equal.
        """
        sent = travelling(self.shared)
        return ServerView(1, (0,), self.expression, sent, self.upload, "gradient")


def sent(
    defense: Defense,
    of: str,
    images: Tensor,
    labels: Tensor,
    *,
    draw: int = 1,
    train: bool = False,
    ctx: ClientContext | None = None,
) -> Sent:
    """Return a FedSGD upload in float64; ``draw`` stands for the secret that the client seeds."""
    expression = defense.architecture(of)
    shared = initial_model(expression, spec(), 0).to(images.dtype).train(train)
    ctx = ctx or context()
    trained = defense.wrap_model(copy.deepcopy(shared), ctx)
    ctx.shared = frozenset(trainable(shared))
    with seeds.seeded_globals(draw):
        gradient = step_gradient(trained, (images, labels), (defense,), ctx)
    upload = upload_transformed(ctx.public_part(gradient), (defense,), ctx)
    return Sent(expression, shared, trained, upload, ctx)


def inverted(
    seen: Sent, labels: Tensor, *without: str, iterations: int = 300, tv: float = 1e-3
) -> Tensor:
    """Return what Inverting Gradients makes of an upload, some parameters left out of the match.

    It knows the labels.
    """
    client = replace(Honest(seen.expression, spec()), dtype=torch.float64)
    view = seen.view()
    known = client.knowledge(
        "B", len(labels), labels={view.label: labels}, batchnorm=seen.batchnorm
    )
    attack = InvertingGradients(iterations=iterations, tv=tv, labels="oracle", without=without)
    with seeds.seeded_globals(0):
        return attack.reconstruct([view], known).examples


def given_the_secret(seen: Sent, labels: Tensor, **settings: float) -> Tensor:
    """Do as :func:`inverted`, with the client's own module in the attacker's hands."""
    with pytest.MonkeyPatch.context() as patch:
        secret = copy.deepcopy(seen.trained).train(seen.shared.training)
        secret.spec = spec()  # type: ignore[assignment]
        patch.setattr(Knowledge, "model", lambda _, __: secret)
        return inverted(seen, labels, **settings)  # type: ignore[arg-type]


def guessed(seen: Sent, defense: Defense) -> nn.Module:
    """Return the network with private parts that another secret drew."""
    return defense.wrap_model(copy.deepcopy(seen.shared), context(99))


def jointly(
    seen: Sent, guess: nn.Module, labels: Tensor, *, iterations: int = 400, tv: float = 1e-3
) -> Tensor:
    """Search images together with what the client keeps to itself, begun at the attacker's guess.

    Cosine distance of the whole upload; signed Adam on pixels, Adam on the guess's parameters that
    were not uploaded.
    """
    model = guess.train(seen.shared.training)
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in seen.upload]
    private = [p for name, p in parameters.items() if name not in seen.upload]
    target = torch.cat([t.flatten() for t in seen.upload.values()])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(labels), *spec().shape, generator=generator, dtype=target.dtype)
    images.requires_grad_()
    search = torch.optim.Adam([{"params": [images], "lr": 0.1}, {"params": private, "lr": 0.01}])
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(search, iterations)
    for _ in range(iterations):
        loss = penalized_loss(model, (images, labels))
        found = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
        cosine = torch.cosine_similarity(torch.cat([g.flatten() for g in found]), target, dim=0)
        rough = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
        (1 - cosine + tv * rough).backward(inputs=[images, *private])
        assert images.grad is not None
        images.grad.sign_()
        search.step()
        search.zero_grad()
        falling.step()
        images.data.clamp_(0, 1)
    return images.detach()
