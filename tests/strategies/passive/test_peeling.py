"""Cascading peeling: all that stand alone, then those that stood beside them, and nothing else."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.peeling import Peeling
from tests.strategies.passive.honest import Honest, batch, cifar10, matched_psnr, spec, tiles


def client(width: int, dtype: torch.dtype = torch.float64, *, normalize: bool = False) -> Honest:
    return Honest(f"mlp(hidden=[{width}], normalize={normalize})", spec(), dtype=dtype)


def peeled(honest: Honest, images, labels, view: ServerView | None = None):
    view = view or honest.gradient(images, labels)
    return Peeling().reconstruct([view], honest.knowledge("B", len(labels)))


def alone(honest: Honest, images, labels) -> int:
    """Count the examples that are the only one to be active at some unit."""
    view = honest.gradient(images, labels)
    model = honest.knowledge("B", len(labels)).model(view)
    outputs = model[1](model[0](images)).detach().requires_grad_()
    logits = model[2:](outputs)  # type: ignore[operator,index]
    (slopes,) = torch.autograd.grad(cross_entropy(logits, labels), outputs)
    active = slopes != 0
    return int(active[:, active.sum(dim=0) == 1].any(dim=1).sum())


@pytest.mark.parametrize(("units", "size"), [(128, 8), (200, 16), (200, 24), (400, 32)])
@pytest.mark.parametrize("normalize", [False, True])
def test_no_fewer_than_stand_alone_and_each_exactly(units: int, size: int, normalize: bool):
    honest = client(units, normalize=normalize)
    images, labels = batch(tiles(), size, 0, torch.float64)
    found = peeled(honest, images, labels)
    least = alone(honest, images, labels)
    print(f"{units} units, {size} images: {least} alone, {len(found.labels)} found")
    assert len(found.labels) >= least
    if len(found.labels):
        apart = torch.cdist(found.examples.flatten(1), images.flatten(1))
        assert apart.min(dim=1).values.max() < 1e-5
        nearest = apart.argmin(dim=1)
        assert len(nearest.unique()) == len(nearest)
        assert found.labels.equal(labels[nearest])
        assert found.scores.min() > 1 - 1e-6


def test_it_goes_on_where_linear_inversion_ends():
    """A batch that is not all alone comes back whole, in more than one round."""
    honest = client(400)
    images, labels = batch(tiles(), 48, 0, torch.float64)
    assert alone(honest, images, labels) < 48
    found = peeled(honest, images, labels)
    assert len(found.labels) == 48
    assert matched_psnr(images, found.examples).min() > 120
    assert "48 of 48 in" in found.receipts[0]
    assert "in 1 rounds" not in found.receipts[0]


def test_single_precision_is_enough():
    honest = client(400, torch.float32)
    images, labels = batch(tiles(), 16, 0)
    assert matched_psnr(images, peeled(honest, images, labels).examples).min() > 90


def test_clipping_costs_nothing():
    honest = client(200)
    images, labels = batch(tiles(), 16, 0, torch.float64)
    view = honest.gradient(images, labels)
    tenth = {name: 0.1 * tensor for name, tensor in view.received.items()}
    clipped = ServerView(1, view.senders, view.model, view.sent, tenth, view.kind)
    found = peeled(honest, images, labels, clipped)
    assert matched_psnr(images, found.examples).min() > 120


def test_two_of_the_same_image_and_noise_are_no_reason_to_guess():
    honest = client(128)
    images, labels = batch(tiles(), 4, 0, torch.float64)
    twice, same = images[[0, 0, 1, 2]], labels[[0, 0, 1, 2]]
    found = peeled(honest, twice, same)
    apart = torch.cdist(found.examples.flatten(1), twice.flatten(1)).min(dim=1).values
    assert (apart < 1e-5).all()
    view = honest.gradient(images, labels)
    noise = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=noise).to(tensor)
        for name, tensor in view.received.items()
    }
    spoiled = ServerView(1, view.senders, view.model, view.sent, noisy, view.kind)
    assert len(peeled(honest, images, labels, spoiled).labels) == 0


@pytest.mark.parametrize("kind", ["weights", "gradient"])
def test_it_refuses_weights_and_networks_that_do_not_begin_with_such_a_layer(kind: str):
    honest = client(64) if kind == "weights" else Honest("lenet", spec())
    images, labels = batch(tiles(), 1, 0)
    view = honest.gradient(images, labels)
    model = honest.knowledge("B", 1).model(view)
    with pytest.raises(ValueError, match="fedsgd" if kind == "weights" else "fully connected"):
        Peeling().check(model, kind)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_shares_of_large_batches(size: int, precision: torch.dtype):
    """CIFAR-10 and photo tiles, two batches each, 1,000 units."""
    for name, data in (("CIFAR-10", cifar10()), ("photo tiles", tiles())):
        shares, singles = [], []
        for seed in range(2):
            images, labels = batch(data, size, seed, precision)
            honest = client(1000, precision)
            found = peeled(honest, images, labels)
            apart = torch.cdist(images.flatten(1).double(), found.examples.flatten(1).double())
            near = apart / images[0].numel() ** 0.5 < 1e-3  # 60 dB
            shares.append(near.any(dim=1).double().mean().item())
            singles.append(alone(honest, images, labels) / size)
        print(f"{name}, batches of {size}, {precision}: {shares}, alone {singles}")
        assert sum(shares) >= sum(singles)
