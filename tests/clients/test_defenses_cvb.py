"""CVB: its divergence keeps the noise, the authors' loses it; small, early, and what is left."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from clients.defenses.model import cvb
from clients.defenses.model.cvb import CVB, ConvolutionalBottleneck, as_log_variance, first_block
from clients.defenses.model.precode import Precode, divergence
from fedsim.models import build_model
from tests.clients.model_side import images_of, inverted, sent, spec
from tests.clients.one_update import context
from tests.strategies.passive.honest import psnr

SMALL = "convnet(width=8)"


def size(expression: str) -> int:
    return sum(p.numel() for p in build_model(expression, spec()).parameters())


def test_the_divergence_is_that_of_torch_in_nats():
    torch.manual_seed(0)
    layer = ConvolutionalBottleneck(8, 3, 0.5, "normal").double()
    features = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    mean, std = layer.encode(features)
    nats = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1).mean()
    told = layer.penalty(features, torch.zeros(2))
    assert told.item() == pytest.approx(0.5 * nats.item(), abs=1e-5)


def test_the_loss_is_cross_entropy_and_so_many_nats():
    images, labels = images_of(3)
    model = build_model(CVB(beta=0.5).architecture(SMALL), spec()).double()
    block = model.body[1]
    with torch.no_grad():  # no noise: the same features, twice
        features = block.layer(model.body[0](model.normalize(images)))
        mean, std = block.bottleneck.encode(features)
        nats = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1).mean()
        told = CVB(beta=0.5).loss(model, (images, labels), context())
        assert 0.5 * nats > 0.1
        assert told.item() == pytest.approx(
            (cross_entropy(model(images), labels) + nats / 2).item()
        )


def test_the_divergence_of_what_is_drawn_keeps_the_noise_and_the_authors_does_not():
    std = torch.nn.functional.softplus(torch.linspace(-5, 5, 10_001, dtype=torch.float64))
    zero = torch.zeros_like(std)
    assert std[divergence(zero, std).argmin()].item() == pytest.approx(1.0, abs=1e-3)
    assert std[as_log_variance(zero, std).argmin()].item() == pytest.approx(0.0067, abs=1e-4)


@pytest.mark.parametrize(
    ("reading", "low", "high"), [("normal", 0.8, 1.2), ("log-variance", 0, 0.1)]
)
def test_training_on_the_divergence_alone_goes_there(reading, low, high):
    torch.manual_seed(0)
    layer = ConvolutionalBottleneck(8, 3, 1.0, reading).double()
    features = 1 + torch.rand(4, 8, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        layer.penalty(features, torch.zeros(4)).backward()
        optimizer.step()
    assert low < layer.encode(features)[1].mean().item() < high


def test_it_has_far_fewer_parameters_than_precode():
    extra = size(CVB().architecture(SMALL)) - size(SMALL)
    assert extra == 2 * 4 * 8 * 25 + 4 * 8
    assert 10 * extra < size(Precode().architecture(SMALL)) - size(SMALL)
    assert (cvb.width(3), cvb.width(8), cvb.width(17)) == (8, 4, 8)


def test_it_stands_behind_the_first_convolution_and_what_belongs_to_it():
    places = {"convnet": "body.1", "convnet(norm='batch')": "body.2", "resnet20(width=8)": None}
    for expression, name in places.items():
        block = first_block(build_model(expression, spec()))
        assert name in (None, block.name)
        assert len(block.outputs) == 3
    with pytest.raises(ValueError, match="no convolution"):
        build_model(CVB().architecture("mlp"), spec())


def test_chance_is_in_every_layer_behind_it_in_eval_mode():
    images, labels = images_of(4)
    one, other = (sent(CVB(), SMALL, images, labels, draw=draw).upload for draw in (1, 2))
    moved = {name: ((one[name] - other[name]).norm() / one[name].norm()).item() for name in one}
    assert all(share > 0.2 for name, share in moved.items() if name != "fc.bias")
    assert (
        min(share for name, share in moved.items() if name.startswith(("body.2", "body.4"))) > 0.3
    )


@pytest.mark.slow
def test_leaving_the_stochastic_layers_out_finds_little(monkeypatch: pytest.MonkeyPatch):
    truth = [images_of(1, seed) for seed in range(4)]
    seen = [sent(CVB(), SMALL, *pair, draw=i) for i, pair in enumerate(truth)]
    whole = [inverted(s, y) for s, (_, y) in zip(seen, truth, strict=True)]
    later = ("decoder", "body.2", "body.4", "fc")
    part = [inverted(s, y, *later) for s, (_, y) in zip(seen, truth, strict=True)]
    before = [inverted(s, y, "bottleneck", *later) for s, (_, y) in zip(seen, truth, strict=True)]
    monkeypatch.setattr(cvb, "drawn_from", lambda mean, std: mean)
    undefended = [inverted(sent(CVB(), SMALL, *p), p[1]) for p in truth]
    images = torch.cat([x for x, _ in truth])
    named = {"whole": whole, "up to the encoder": part, "before": before, "no noise": undefended}
    found = {name: psnr(images, torch.cat(made)).mean().item() for name, made in named.items()}
    print(found)
    assert found["no noise"] > 25
    assert found["whole"] < 11  # a guess
    assert found["whole"] < found["up to the encoder"] < found["no noise"] - 10
    assert found["before"] < found["no noise"] - 10
