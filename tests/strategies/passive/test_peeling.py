"""Cascading peeling: all that stand alone, then those that stood beside them, and nothing else."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsim.models import build_model
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form import peeling
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


def matched(found, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which image each candidate is, and how far it is from it (L2)."""
    apart = torch.cdist(found.examples.flatten(1).double(), images.flatten(1).double())
    return apart.argmin(dim=1), apart.min(dim=1).values


@pytest.mark.ladder(11)
@pytest.mark.parametrize(
    ("units", "size", "normalize"),
    [(128, 8, False), (200, 16, False), (200, 24, False), (400, 32, False), (400, 8, True)],
)
def test_no_fewer_than_stand_alone_and_each_exactly(units: int, size: int, normalize: bool):
    honest = client(units, normalize=normalize)
    images, labels = batch(tiles(), size, 0, torch.float64)
    found = peeled(honest, images, labels)
    least = alone(honest, images, labels)
    print(f"{units} units, {size} images: {least} alone, {len(found.labels)} found")
    assert len(found.labels) >= least > 0
    which, off = matched(found, images)
    assert off.max() < 1e-5
    assert len(which.unique()) == len(which)
    assert found.labels.equal(labels[which])
    assert found.scores.min() > 1 - 1e-6


#: Shares that stand alone, CIFAR-10, 40 batches of each size: by hand elsewhere, and here.
SINGLETONS = {
    (128, 2): (1.00, 1.00),
    (128, 4): (0.96, 0.94),
    (128, 8): (0.68, 0.71),
    (128, 16): (0.29, 0.36),
    (128, 64): (0.06, 0.08),
    (1000, 16): (0.80, 0.83),
    (1000, 64): (0.33, 0.32),
}


@pytest.mark.slow
@pytest.mark.parametrize(("units", "size"), SINGLETONS)
def test_the_table_of_examples_that_stand_alone(units: int, size: int):
    """A default initialization; ``alone`` asks for one active example, whatever its slope."""
    shares = []
    for seed in range(4):
        model = Honest(f"mlp(hidden=[{units}], normalize=False)", spec(), seed=seed).model()
        for draw in range(10):
            images, _ = batch(cifar10(), size, 100 * seed + draw)
            with torch.no_grad():
                active = model[1](model[0](images)) > 0  # type: ignore[operator,index]
            single = active.sum(dim=0) == 1
            shares.append(active[:, single].any(dim=1).double().mean().item())
    share = sum(shares) / len(shares)
    card, ours = SINGLETONS[units, size]
    print(f"{units} units, batches of {size}: {share:.3f} stand alone")
    assert share == pytest.approx(ours, abs=0.02)
    assert share == pytest.approx(card, abs=0.1)


@pytest.mark.parametrize(
    ("units", "size", "precision"),
    [(128, 120, torch.float32), (256, 255, torch.float32), (200, 24, torch.float64)],
)
def test_what_it_returns_is_there_however_full_the_layer_is(units, size, precision):
    """Near as many examples as units any mixture comes close to the span; none may pass."""
    honest = client(units, precision)
    images, labels = batch(tiles(), size, 2, precision)
    found = peeled(honest, images, labels)
    which, off = matched(found, images)
    assert (off < 0.1).all()
    assert len(which.unique()) == len(which)


def test_it_says_why_it_finds_nothing_where_hardly_more_units_than_examples_are_active():
    honest = client(70)
    images, labels = batch(tiles(), 64, 0, torch.float64)
    found = peeled(honest, images, labels)
    assert len(found.labels) == 0
    (said,) = found.receipts
    assert "0 of 64: " in said
    assert "units are active, and it takes 72 to tell 64 examples from mixtures" in said


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


def test_an_image_that_is_there_twice_comes_back_twice_and_hides_nobody():
    honest = client(200)
    images, labels = batch(tiles(), 4, 0, torch.float64)
    twice = [0, 0, 1, 1, 2, 3]
    found = peeled(honest, images[twice], labels[twice])
    which, off = matched(found, images)
    assert off.max() < 1e-5
    assert sorted(which.tolist()) == twice


@pytest.mark.parametrize(("std", "most"), [(1e-7, 16), (1e-6, 16), (1e-3, 0)])
def test_noise_is_no_reason_to_guess_or_to_count_twice(std: float, most: int):
    honest = client(400)
    images, labels = batch(tiles(), 16, 0, torch.float64)
    view = honest.gradient(images, labels)
    noise = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + std * torch.randn(tensor.shape, generator=noise).to(tensor)
        for name, tensor in view.received.items()
    }
    spoiled = ServerView(1, view.senders, view.model, view.sent, noisy, view.kind)
    found = peeled(honest, images, labels, spoiled)
    assert len(found.labels) <= most
    if most:
        which, off = matched(found, images)
        assert len(which) > 4
        assert len(which.unique()) == len(which)
        assert off.max() < 3


def test_gradients_are_computed_a_few_units_at_a_time(monkeypatch: pytest.MonkeyPatch):
    honest = client(128)
    images, labels = batch(tiles(), 8, 0, torch.float64)
    whole = peeled(honest, images, labels)
    monkeypatch.setattr(peeling, "AT_ONCE", 5 * 128 * 10)
    assert peeled(honest, images, labels).examples.allclose(whole.examples, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "kind", "said"),
    [
        ("mlp(hidden=[64])", "weights", "fedsgd"),
        ("lenet", "gradient", "fully connected"),
        ("mlp(hidden=[])", "gradient", "no ReLU"),
    ],
)
def test_it_refuses_weights_and_networks_that_begin_otherwise(network, kind, said):
    with pytest.raises(ValueError, match=said):
        Peeling().check(build_model(network, spec()), kind)


def least(name: str, size: int, precision: torch.dtype) -> float:
    """Return what share must come back: a little less than the page says."""
    if size <= 128:
        return 0.95
    if name == "CIFAR-10":
        return 0.12
    return 0.95 if precision == torch.float64 else 0.6


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
            near = apart / images[0].numel() ** 0.5 < 1e-2  # 40 dB
            shares.append(near.any(dim=1).double().mean().item())
            singles.append(alone(honest, images, labels) / size)
            assert near.any(dim=0).all()  # nobody is returned who is not there
            assert len(found.labels) == near.any(dim=1).sum()  # nor anybody twice
            assert shares[-1] >= least(name, size, precision)
            assert shares[-1] > singles[-1]
        print(f"{name}, batches of {size}, {precision}: {shares}, alone {singles}")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "published"), [(64, 0.994), (128, 0.666)])
def test_shares_with_the_papers_weights(size: int, published: float):
    """CIFAR-10, 1,000 units, all weights N(0, 0.25): standard deviation or variance, it may be."""
    images, labels = batch(cifar10(), size, 0, torch.float64)
    honest = client(1000)
    for std in (0.25, 0.5):
        drawn = torch.Generator().manual_seed(0)
        weights = {
            name: std * torch.randn(tensor.shape, generator=drawn, dtype=torch.float64)
            for name, tensor in honest.sent().items()
        }
        found = peeled(honest, images, labels, honest.gradient(images, labels, sent=weights))
        which, off = matched(found, images)
        assert off.max() < 0.1
        assert len(which.unique()) == len(which)
        print(f"batches of {size}, std {std}: {len(which) / size}, published {published}")
        assert len(which) / size > max(published - 0.05, 0.93)
