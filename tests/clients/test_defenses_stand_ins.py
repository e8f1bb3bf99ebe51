"""Refiner and Learning to obscure: what is uploaded is of other images, that are like enough."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from clients.defenses.aside import gradient_of
from clients.defenses.learning.dcs2 import DCS2
from clients.defenses.learning.obscure import Obscure, features, grouped
from clients.defenses.learning.refiner import Refiner, key_weights
from clients.defenses.model.pefl import PEFL
from fedsim import seeds
from fedsim.data import load_dataset
from fedsim.defense import Defense
from fedsim.models import build_model
from tests.clients.a_step import a_step, few_images, joined, small_model
from tests.fedsim.small import federated


@pytest.mark.parametrize("defense", [Refiner(iterations=3), Obscure(iterations=3)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_upload_is_a_gradient_of_no_private_image(defense: Defense, soft: bool) -> None:
    model, (images, labels) = small_model(), few_images()
    batch = images, torch.eye(10)[labels] if soft else labels
    true, ctx = a_step(model, batch)
    made = defense.gradients(model, batch, ctx)
    assert made is not None
    assert made.keys() == true.keys()
    figures = ctx.effects[defense.name].figures
    assert figures["cosine to the true gradient"] < 0.99
    assert figures["ssim to the private image"] < 0.9


def test_a_longer_search_for_robust_data_keeps_the_key_parameters() -> None:
    model, batch = small_model(), few_images()
    _, ctx = a_step(model, batch)
    seen = []
    for iterations in (1, 60):
        Refiner(iterations=iterations).gradients(model, batch, ctx)
        seen.append(ctx.effects.pop("refiner").figures)
    assert seen[1]["cosine of key parameters"] > max(0.85, seen[0]["cosine of key parameters"])
    assert seen[1]["ssim to the private image"] < 0.3


@pytest.mark.parametrize("image", range(3))
def test_an_attacker_gets_the_robust_image_exactly_and_the_private_one_not(image: int) -> None:
    """The ratio attack on a first linear layer, scored against x* and against x."""
    data = load_dataset("photo-tiles")
    one = data.train.subset(torch.tensor([40 * image]))
    images, labels = one.images.float() / 255, one.labels
    with seeds.seeded_globals(0):
        model = build_model("mlp(hidden=[64])", data.spec)
    true, ctx = a_step(model, (images, labels))
    defense = Refiner()
    made = defense.gradients(model, (images, labels), ctx)
    objective = defense.objective(model, (images, labels), true, key_weights(model, true))
    robust = defense.robust(images, objective, ctx)
    weight, bias, *_ = made.values()
    unit = bias.abs().argmax()
    read = (weight[unit] / bias[unit]).view_as(images)
    figures = ctx.effects["refiner"].figures
    print(figures, f"PSNR to x* {psnr(read, robust):.1f}, to x {psnr(read, images):.1f}")
    assert psnr(read, robust) > 100
    assert psnr(read, images) < 13
    assert figures["cosine of key parameters"] > 0.7
    assert figures["ssim to the private image"] < 0.3


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).square().mean().clamp_min(1e-12).log10())


def test_robust_data_stay_near_if_told() -> None:
    model, batch = small_model(), few_images()
    _, ctx = a_step(model, batch)
    Refiner(radius=0.01, iterations=3).gradients(model, batch, ctx)
    assert ctx.effects["refiner"].figures["ssim to the private image"] > 0.95


def test_weights_are_of_key_parameters_and_fall_with_depth() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 3.0]]))
        model[1].weight.copy_(torch.tensor([[2.0], [0.0]]))
    gradient = {"0.weight": torch.ones(1, 2), "1.weight": torch.ones(2, 1)}
    assert key_weights(model, gradient).tolist() == [2 * 0.5, 2 * 1.5, 1 * 2, 0]


def test_synthetic_images_come_to_have_the_private_features() -> None:
    model, batch = small_model(), few_images()
    _, ctx = a_step(model, batch)
    seen = []
    for iterations in (1, 60):
        Obscure(iterations=iterations).gradients(model, batch, ctx)
        seen.append(ctx.effects.pop("obscure").figures)
    assert seen[1]["distance of features"] < 0.7 * seen[0]["distance of features"]
    assert seen[1]["ssim to the private image"] < 0.3


def test_what_obscuring_lessens_by_hand() -> None:
    """Two examples share the first synthetic image, the third has one of its own."""
    model, (images, _) = small_model(), few_images(3)
    synthetic, _ = few_images(2, seed=1)
    z, target = features(model, synthetic), features(model, images)
    target = torch.stack([(target[0] + target[1]) / 2, target[2]])
    shares = [float((z[i] - target[i]).norm() / target[i].norm()) for i in range(2)]
    pairs = ((0, 0), (0, 1), (1, 2))
    rms = [float((synthetic[s] - images[i]).square().mean().sqrt()) for s, i in pairs]
    like = sum(math.exp(-length / 0.6) for length in rms) / 3
    objective = Obscure(beta=2.0, reach=0.6).objective(model, images, torch.tensor([0, 0, 1]))
    expected = (shares[0] ** 2 + shares[1] ** 2) / 2 + 2.0 * like
    assert like > 0.1
    assert float(objective(synthetic).detach()) == pytest.approx(expected, rel=1e-5)


def test_several_examples_can_share_a_synthetic_one() -> None:
    rows = torch.tensor([[1.0, 0], [3, 0], [5, 5]])
    assert grouped(rows, torch.tensor([0, 0, 1])).tolist() == [[2, 0], [5, 5]]
    model, batch = small_model(), few_images(3)
    _, ctx = a_step(model, batch)
    made = Obscure(per=2, iterations=2).gradients(model, batch, ctx)
    mean = torch.tensor([1 / 3] * 3 + [0.0] * 7)
    # The last bias's gradient is probabilities less labels: the labels of all three are in it.
    assert float((made["fc.bias"] + mean).min()) > 0
    assert float((made["fc.bias"] + mean).sum()) == pytest.approx(1, abs=1e-5)


def test_the_gradient_of_the_private_images_themselves_would_be_the_true_one() -> None:
    model, batch = small_model(), few_images()
    true, _ = a_step(model, batch)
    assert torch.allclose(joined(gradient_of(model, batch)), joined(true))
    assert features(model, batch[0]).shape == (4, model.fc.in_features)


@pytest.mark.parametrize(
    "defense", [Refiner(iterations=2), Obscure(iterations=2), DCS2(iterations=2)]
)
def test_a_parameter_without_a_part_in_the_loss_has_a_gradient_of_zero(defense: Defense) -> None:
    """The factor that the client's own one stands in for."""
    pefl = PEFL(private=True)
    model = small_model(pefl.architecture("convnet(width=8, stride=2)"))
    _, ctx = a_step(model, few_images())
    made = defense.gradients(pefl.wrap_model(model, ctx), few_images(), ctx)
    assert made is not None
    assert [name for name, g in made.items() if not g.any()] == ["fc.factors.0.weight"]


@pytest.mark.parametrize("defense", ["refiner", "obscure", "dcs2"])
def test_clients_with_factors_of_their_own_can_have_stand_ins(defense: str, tmp_path: Path) -> None:
    chain = f"pefl(private=True) | {defense}(iterations=2)"
    ran = federated(tmp_path, {"defenses": chain, "attack": "none"})
    assert not ran.failures


def test_no_features_to_preserve() -> None:
    with pytest.raises(ValueError, match="no fully connected layer"):
        Obscure().check(nn.Conv2d(3, 3, 1), "gradient")
