"""DigestNN: a private network that is trained, remembered, and never sent."""

from pathlib import Path

import pytest
import torch

from clients.defenses.learning.digestnn import DigestNN
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
