"""PEFL: the factors are the layer, and the input's factor gives the input away unless private."""

import pytest
import torch

from clients.defenses.model.pefl import PEFL, Cascade
from fedsim.models import initial_model
from tests.clients.model_side import (
    given_the_secret,
    guessed,
    images_of,
    inverted,
    jointly,
    sent,
    spec,
)
from tests.clients.one_update import context, smooth_image
from tests.strategies.passive.honest import psnr

SMALL = "convnet(width=8)"


@pytest.mark.parametrize("factors", [2, 3, 4])
@pytest.mark.parametrize("shape", [(10, 64), (64, 10), (5, 5)])
def test_the_product_is_the_layer(factors: int, shape: tuple[int, int]):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0])
    cascade = Cascade(layer, factors)
    assert len(cascade.factors) == factors
    assert torch.allclose(cascade.product(), layer.weight, atol=1e-5)
    inputs = torch.randn(3, shape[1])
    assert torch.allclose(cascade(inputs), layer(inputs), atol=1e-5)


def test_the_network_of_cascades_begins_as_the_network():
    images, _ = images_of(4)
    one, other = (
        initial_model(e, spec(), 0).double() for e in (SMALL, PEFL(factors=3).architecture(SMALL))
    )
    assert torch.allclose(one(images), other(images), atol=1e-5)


def right_singular(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(gradient, full_matrices=False).Vh[0]


@pytest.mark.parametrize("factors", [2, 3])
def test_public_factors_give_one_image_away_up_to_scale(factors: int):
    images, labels = images_of(1)
    upload = sent(PEFL(factors=factors), "mlp(hidden=[32])", images, labels).upload
    gradient = upload["1.factors.0.weight"]
    values = torch.linalg.svdvals(gradient)
    assert values[1] < 1e-12 * values[0]
    cosine = torch.cosine_similarity(right_singular(gradient), images.flatten(), dim=0)
    assert abs(cosine.item()) == pytest.approx(1.0, abs=1e-9)


def test_so_does_a_wide_cascade_of_3072_to_64_to_256():
    image = smooth_image().flatten()
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3072, 64, bias=False), torch.nn.Linear(64, 256)
    first, second = first.double(), second.double()
    (second(first(image)).relu().sum()).backward()
    assert first.weight.grad is not None
    cosine = torch.cosine_similarity(right_singular(first.weight.grad), image, dim=0)
    assert abs(cosine.item()) == pytest.approx(1.0, abs=1e-9)


def test_a_private_factor_is_not_uploaded_and_nothing_is_of_the_input():
    images, labels = images_of(1)
    seen = sent(PEFL(private=True), "mlp(hidden=[32])", images, labels)
    names = [name for name, _ in seen.shared.named_parameters()]
    assert list(seen.upload) == names
    assert not seen.upload["1.factors.0.weight"].any()
    own = seen.ctx.store["pefl.1.weight"]
    assert own.shape == (32, 64)
    assert not torch.allclose(own, seen.shared.get_parameter("1.factors.0.weight"))
    projected = right_singular(seen.upload["1.factors.1.weight"])
    cosine = torch.cosine_similarity(projected, own @ images.flatten(), dim=0)
    assert abs(cosine.item()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.slow
def test_a_known_factor_finds_the_image():
    truth = [images_of(1, seed) for seed in range(4)]
    public = [sent(PEFL(), SMALL, *pair) for pair in truth]
    defense = PEFL(private=True)
    seen = [sent(defense, SMALL, *pair, ctx=context(i)) for i, pair in enumerate(truth)]
    pairs = [(one, labels) for one, (_, labels) in zip(seen, truth, strict=True)]
    images = torch.cat([x for x, _ in truth])
    made = {
        "public": [inverted(s, y) for s, (_, y) in zip(public, truth, strict=True)],
        "private": [inverted(s, y) for s, y in pairs],
        "factor searched": [jointly(s, guessed(s, defense), y) for s, y in pairs],
        "factor known": [given_the_secret(s, y) for s, y in pairs],
    }
    found = {name: psnr(images, torch.cat(each)).mean().item() for name, each in made.items()}
    print(found)
    assert found["public"] > found["private"] + 5
    assert min(found["factor searched"], found["factor known"]) > found["private"] + 15
