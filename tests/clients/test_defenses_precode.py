"""PRECODE: the divergence is right, chance reaches every layer, and what it does not hide."""

from math import log

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from clients.defenses.model import precode
from clients.defenses.model.precode import Bottleneck, Precode
from fedsim.models import build_model
from tests.clients.model_side import images_of, inverted, sent, spec
from tests.clients.one_update import context, flat
from tests.strategies.passive.honest import psnr

SMALL = "convnet(width=8)"


def test_the_divergence_is_that_of_torch_in_bits():
    torch.manual_seed(0)
    layer = Bottleneck(6, 4, beta=0.5).double()
    features = torch.randn(5, 6, dtype=torch.float64)
    mean, std = layer.encode(features)
    nats = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1).mean()
    bits = nats / torch.log(torch.tensor(2.0, dtype=torch.float64))
    told = layer.penalty(features, torch.zeros(5))
    assert told.item() == pytest.approx(0.5 * bits.item(), abs=1e-5)
    assert precode.divergence(torch.zeros(1), torch.ones(1)).item() == 0


def test_the_known_divergence_is_as_many_bits():
    """11.73 nats are 16.92 bits."""
    layer, known = Bottleneck(6, 1, beta=1.0).double(), (2 * 11.73) ** 0.5
    mean, std = torch.tensor([[known]]).double(), torch.ones(1, 1).double()
    assert precode.divergence(mean, std).item() == pytest.approx(11.73, abs=1e-5)
    layer.encode = lambda _: (mean, std)
    assert layer.penalty(torch.zeros(1, 6), torch.zeros(1)).item() == pytest.approx(16.92, abs=5e-3)


def test_the_loss_is_cross_entropy_and_so_many_bits():
    images, labels = images_of(3)
    model = build_model(Precode(beta=0.5).architecture(SMALL), spec()).double()
    with torch.no_grad():  # no noise: the same features, twice
        mean, std = model.fc.bottleneck.encode(model.body(model.normalize(images)).flatten(1))
        bits = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1).mean() / log(2)
        told = Precode(beta=0.5).loss(model, (images, labels), context())
        assert 0.5 * bits > 1
        assert told.item() == pytest.approx(
            (cross_entropy(model(images), labels) + bits / 2).item()
        )


def test_the_bottleneck_costs_so_many_parameters():
    def size(expression: str) -> int:
        return sum(p.numel() for p in build_model(expression, spec()).parameters())

    features, units = 64, 32
    extra = size(Precode(bottleneck=units).architecture(SMALL)) - size(SMALL)
    assert extra == features * 2 * units + 2 * units + units * features + features


#: How far two draws' gradients are apart, as a share of their norm, in another untrained network:
#: before the bottleneck, in its encoder, in its decoder, and after it.
APART = {"body": 0.73, "encoder": 0.63, "decoder": 1.17, "fc.layer": 1.24}


def apart(images: Tensor, labels: Tensor, draws: tuple[int, int]) -> dict[str, float]:
    one, other = (sent(Precode(), SMALL, images, labels, draw=draw).upload for draw in draws)
    found = {}
    for part in APART:
        a, b = (flat({n: t for n, t in u.items() if part in n}) for u in (one, other))
        found[part] = ((a - b).norm() / a.norm()).item()
    return found


def test_two_draws_differ_in_every_layer_in_eval_mode_and_least_before_the_bottleneck():
    images, labels = images_of(4)
    one, again = (sent(Precode(), SMALL, images, labels, draw=1).upload for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    moved = apart(images, labels, (1, 2))
    assert moved["body"] > 0.1
    assert max(moved["body"], moved["encoder"]) < min(moved["decoder"], moved["fc.layer"])


def test_two_draws_are_as_far_apart_as_they_are_known_to_be():
    """Ours, mean over 16 images, one each: 0.63, 0.65, 1.41, 1.34; the networks are not the same.

    Two draws that have nothing in common are the square root of 2 apart, as the decoder's are.
    """
    found = [apart(*images_of(1, draw), (2 * draw, 2 * draw + 1)) for draw in range(16)]
    for part, known in APART.items():
        mean = sum(moved[part] for moved in found) / len(found)
        print(part, round(mean, 3))
        assert mean == pytest.approx(known, rel=0.25)


def test_without_gradients_the_network_repeats():
    model = build_model(Precode().architecture(SMALL), spec()).double()
    images, _ = images_of(3)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
    assert not torch.equal(model(images), model(images))


def test_a_layer_that_reads_the_pixels_gives_them_away():
    images, labels = images_of(1)
    upload = sent(Precode(), "mlp(hidden=[32])", images, labels).upload
    row = upload["1.bias"].abs().argmax()
    read = upload["1.weight"][row] / upload["1.bias"][row]
    assert (read - images.flatten()).abs().max() < 1e-9


def test_the_encoder_gives_the_features_away():
    images, labels = images_of(1)
    seen = sent(Precode(), SMALL, images, labels)
    weight, bias = (seen.upload[f"fc.bottleneck.encoder.{part}"] for part in ("weight", "bias"))
    features = seen.shared.body(seen.shared.normalize(images)).flatten()  # type: ignore[operator]
    row = 256 + bias[256:].abs().argmax()  # of the standard deviations, where chance is
    assert torch.allclose(weight[row] / bias[row], features, atol=1e-9)


def test_more_noise_goes_before_the_bottleneck_and_nowhere_else():
    images, labels = images_of(2)
    plain = sent(Precode(), SMALL, images, labels).upload
    noised = sent(Precode(upstream_std=0.1), SMALL, images, labels).upload
    same = {name: torch.equal(plain[name], noised[name]) for name in plain}
    assert {name for name, equal in same.items() if not equal} == {
        name for name in plain if name.startswith("body")
    }
    assert Precode().norm_bound("update", 1.0) == 1.0
    assert Precode(upstream_std=0.1).norm_bound("update", 1.0) is None


def test_no_fully_connected_layer_no_bottleneck():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    model.spec = spec()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="fully connected"):
        precode.classifier(model)


@pytest.mark.slow
def test_leaving_the_stochastic_layers_out_finds_the_image(monkeypatch: pytest.MonkeyPatch):
    """What the attacker matches: everything; what stands before the bottleneck."""
    truth = [images_of(1, seed) for seed in range(4)]
    seen = [sent(Precode(), SMALL, *pair, draw=i) for i, pair in enumerate(truth)]
    perturbed = [sent(Precode(upstream_std=0.05), SMALL, *p, draw=i) for i, p in enumerate(truth)]
    whole = [inverted(s, y) for s, (_, y) in zip(seen, truth, strict=True)]
    part = [inverted(s, y, "fc.") for s, (_, y) in zip(seen, truth, strict=True)]
    noisy = [inverted(s, y, "fc.") for s, (_, y) in zip(perturbed, truth, strict=True)]
    monkeypatch.setattr(precode, "drawn_from", lambda mean, std: mean)
    undefended = [inverted(sent(Precode(), SMALL, *p), p[1]) for p in truth]
    images = torch.cat([x for x, _ in truth])
    named = {"whole": whole, "before": part, "before, perturbed": noisy, "no noise": undefended}
    found = {name: psnr(images, torch.cat(made)).mean().item() for name, made in named.items()}
    print(found)
    assert found["before"] > found["whole"] + 5
    assert found["before, perturbed"] < found["before"] - 10
    assert found["no noise"] > 25
