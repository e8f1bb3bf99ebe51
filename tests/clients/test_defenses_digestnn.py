"""DigestNN: a private network that is trained, remembered, and never sent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.learning.digestnn import DigestNN
from fedsim import seeds
from fedsim.data import load_dataset
from fedsim.models import build_model
from tests.clients.a_step import few_images, small_model, true_gradient
from tests.clients.one_update import context
from tests.fedsim.small import federated


@pytest.mark.parametrize("local", ["fedsgd(batch_size=4, lr=0.1)", "fedavg(batch_size=32)"])
def test_its_parameters_are_never_sent_and_are_remembered(local: str, tmp_path: Path) -> None:
    changes = {"defenses": "digestnn", "federation.local": local, "attack": "linear-inversion"}
    ran = federated(tmp_path, {**changes, "federation.rounds": 2})
    assert not ran.failures
    assert all("digest" not in name for view in ran.views for name in view.received)
    assert len(ran.views) == 8


def test_training_moves_what_is_remembered() -> None:
    ctx = context()
    model = DigestNN().wrap_model(small_model(), ctx)
    before = {name: tensor.clone() for name, tensor in ctx.store.items()}
    assert sorted(before) == [f"digestnn.{name}" for name in ("b1", "b2", "w1", "w2")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("digest_"):
                parameter.add_(1)
    assert all(torch.equal(ctx.store[name], before[name] + 1) for name in before)
    again = DigestNN().wrap_model(small_model(), ctx)
    assert torch.equal(dict(again.named_parameters())["digest_b1"], torch.ones(16))


def test_what_the_shared_parameters_get_is_the_gradient_of_the_digest() -> None:
    """The distance has no derivative by them."""
    defense, ctx, (images, labels) = DigestNN(), context(), few_images()
    model = defense.wrap_model(small_model(), ctx)
    digest = defense.digested(model, images).detach()
    assert digest.shape == images.shape
    assert 0 <= float(digest.min()) < float(digest.max()) <= 1
    plain = true_gradient(small_model(), (digest, labels))
    loss = defense.loss(model, (images, labels), ctx)
    shared = [(n, p) for n, p in model.named_parameters() if n in plain]
    found = torch.autograd.grad(loss, [p for _, p in shared], retain_graph=True)
    for (name, _), g in zip(shared, found, strict=True):
        assert torch.allclose(g, plain[name], atol=1e-6)
    assert ctx.effects["digestnn"].figures["distance"] > 0.1


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_the_loss_is_less_by_the_distance(apart: float) -> None:
    defense, ctx, (images, labels) = DigestNN(apart=apart), context(), few_images(3)
    model = defense.wrap_model(small_model(), ctx)
    digest = defense.digested(model, images).detach()
    lengths = [float((digest[i] - images[i]).square().mean().sqrt()) for i in range(3)]
    assert min(lengths) > 0.1
    plain = float(cross_entropy(small_model()(digest), labels).detach())
    told = float(defense.loss(model, (images, labels), ctx).detach())
    assert told == pytest.approx(plain - apart * sum(lengths) / 3, rel=1e-5)


def test_it_learns_to_be_right_and_elsewhere() -> None:
    defense, ctx, batch = DigestNN(), context(), few_images()
    model = defense.wrap_model(small_model(), ctx)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        losses.append(defense.loss(model, batch, ctx))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


def test_each_client_has_a_digest_of_its_own() -> None:
    first = DigestNN().initial(3, context(0))["w1"]
    assert not torch.equal(first, DigestNN().initial(3, context(1))["w1"])


def psnr(one: Tensor, other: Tensor) -> float:
    """Return the mean over images."""
    errors = (one - other).square().flatten(1).mean(dim=1).clamp_min(1e-12)
    return float((-10 * errors.log10()).mean().detach())


def digit_network(client: int) -> nn.Module:
    """Return the shared model behind a client's first digest, drawn from its secret stream."""
    with seeds.seeded_globals(0):
        model = build_model("mlp(hidden=[64])", load_dataset("digits").spec)
    return DigestNN().wrap_model(model, context(client))


def digested(client: int) -> Callable[[Tensor], Tensor]:
    model = digit_network(client)
    return lambda images: DigestNN().digested(model, images).detach()


def inverted(
    digests: list[Callable[[Tensor], Tensor]], images: Tensor, steps: int
) -> Callable[[Tensor], Tensor]:
    """Return what a network learns that goes from digests of public images to the images."""
    with seeds.seeded_globals(0):
        inverter = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 256),
            nn.ReLU(), nn.Linear(256, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(inverter.parameters(), lr=1e-3)
    for step in range(steps):
        few = images[torch.randint(len(images), (64,), generator=generator)]
        loss = (inverter(digests[step % len(digests)](few)) - few).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda digest: inverter(digest).detach()


@pytest.mark.parametrize("client", range(4))
def test_an_attacker_gets_the_digest_exactly_and_the_image_not(client: int) -> None:
    """The ratio attack on a first linear layer, scored against D(x) and against x."""
    train = load_dataset("digits").train
    image, label = train.images[client : client + 1], train.labels[client : client + 1]
    model = digit_network(client)
    gradient = true_gradient(model, (image, label))
    weight, bias = gradient["1.weight"], gradient["1.bias"]
    unit = bias.abs().argmax()
    read = (weight[unit] / bias[unit]).view_as(image)
    assert psnr(read, DigestNN().digested(model, image)) > 80
    assert psnr(read, image) < 10


@pytest.mark.slow
def test_whoever_has_the_digest_inverts_it_and_surrogates_of_it_hardly_help() -> None:
    images = load_dataset("digits").train.images
    public, private = images[:1000], images[1000:1064]
    guess = psnr(public.mean(dim=0, keepdim=True).expand_as(private), private)
    clients = [digested(client) for client in range(4)]
    surrogates = inverted([digested(100 + n) for n in range(200)], public, 1500)
    print(f"mean image {guess:.1f} dB; D(x) itself, D known, 200 surrogates of D:")
    for digest in clients:
        seen = digest(private)
        known = psnr(inverted([digest], public, 500)(seen), private)
        blind = psnr(surrogates(seen), private)
        print(f"{psnr(seen, private):.1f} {known:.1f} {blind:.1f}")
        assert known > max(blind, guess) + 2
        assert guess < blind < guess + 2
