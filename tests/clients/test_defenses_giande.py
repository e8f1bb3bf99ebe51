"""Twins are what the formula says; they hide nothing from who can solve or isolate."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.learning.giande import Giande, restyled, stage, style_amounts
from fedsim.models import initial_model
from tests.clients.one_update import gradient
from tests.clients.test_defenses_mixup import SPEC, client, images
from tests.clients.test_defenses_oasis import best, read

MEAN = torch.tensor(SPEC.mean, dtype=torch.float64).view(-1, 1, 1)
HELD = images(8)
LABELS = torch.arange(8)


def extended(defense: Giande, count: int = 8) -> tuple[Tensor, Tensor]:
    return defense.transform_batch((HELD[:count], LABELS[:count]), client())


def test_the_batch_doubles_and_its_second_half_is_the_formula() -> None:
    shown, labels = extended(Giande())
    assert torch.equal(shown[:8], HELD)
    assert torch.equal(labels, LABELS.repeat(2))
    standard = HELD - MEAN
    for i in range(8):
        twin = -0.8 * standard[i] + 0.2 * standard[(i + 1) % 8]
        assert torch.allclose(shown[8 + i] - MEAN, twin, atol=1e-12)


def test_reverse_is_the_negative_alone() -> None:
    shown, _ = extended(Giande(twin="reverse"))
    assert torch.allclose(shown[8:] - MEAN, -(HELD - MEAN), atol=1e-12)


def test_a_batch_of_one_mixes_with_itself_and_its_ratio_is_the_image_up_to_a_factor() -> None:
    shown, _ = extended(Giande(), 1)
    assert torch.allclose(shown[1] - MEAN, -0.6 * (HELD[0] - MEAN), atol=1e-12)
    parts = [gradient(one.unsqueeze(0)) for one in shown]
    weight, bias = (parts[0][n] + parts[1][n] for n in ("1.weight", "1.bias"))
    row = int(bias.abs().argmax())
    found = (weight[row] / bias[row]).view(3, 32, 32) - MEAN
    likeness = torch.cosine_similarity(found.flatten(), (HELD[0] - MEAN).flatten(), dim=0)
    assert abs(float(likeness)) > 1 - 1e-9


def test_the_twins_alone_are_the_images() -> None:
    twins = (extended(Giande())[0][8:] - MEAN).flatten(1)
    mixing = -0.8 * torch.eye(8).double() + 0.2 * torch.eye(8).double().roll(1, 1)
    assert (torch.linalg.solve(mixing, twins) - (HELD - MEAN).flatten(1)).abs().max() < 1e-9


@pytest.mark.parametrize(("functional", "exact"), [("mean", 6), ("random", 6)])
def test_an_imprint_still_reads_most_images_exactly(functional: str, exact: int) -> None:
    row = torch.full((3072,), 1 / 3072, dtype=torch.float64)
    if functional == "random":
        row = torch.randn(3072, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert int((best(read(row, *extended(Giande())), HELD) >= 95).sum()) >= exact


def test_restyling_gives_the_statistics_in_between_and_the_twins_at_one() -> None:
    features = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    own, twin = features.flatten(2).chunk(2)
    for amount in (0.0, 0.3, 1.0):
        found = restyled(features, torch.full((3,), amount)).flatten(2)
        for moment in (torch.mean, torch.std):
            wanted = (1 - amount) * moment(own, dim=2) + amount * moment(twin, dim=2)
            assert torch.allclose(moment(found, dim=2), wanted, atol=1e-5)


def test_amounts_are_small_and_secret() -> None:
    drawn = style_amounts(4000, torch.Generator().manual_seed(1))
    # E Beta(10 U, 10) = E U / (U + 1) = 1 - ln 2
    assert float(drawn.mean()) == pytest.approx(1 - 0.6931, abs=0.01)
    assert not torch.equal(drawn, style_amounts(4000, torch.Generator().manual_seed(2)))


def test_the_feature_loss_is_added_and_its_hook_removed() -> None:
    model = initial_model("convnet(width=4)", SPEC, 0).double()
    batch = extended(Giande())
    plain = cross_entropy(model(batch[0]), batch[1])
    defense = Giande(features="body.4", feature_weight=2.0)
    loss = defense.loss(model, batch, client())
    assert loss is not None
    assert float((loss - plain).detach()) == pytest.approx(2 * 2.3, abs=1.0)
    assert torch.equal(cross_entropy(model(batch[0]), batch[1]), plain)
    assert Giande().loss(model, batch, client()) is None
    body = torch.nn.Module()
    body.body = model
    assert stage(body, "body.4") is model.get_submodule("body.4")


@pytest.mark.parametrize("features", ["blocks.9", "blocks.6", "blocks.0.conv1", "fc"])
def test_features_that_cannot_be_restyled_are_refused(features: str) -> None:
    """Of images of 4 x 4 the third stage makes maps of one place, which have no deviation.

    What a shortcut passes by would be halved, and the shortcut not.
    """
    model = initial_model("resnet20(width=4)", replace(SPEC, shape=(3, 4, 4)), 0)
    with pytest.raises(ValueError, match=r"features= is one of .*, blocks\.5$") as refused:
        Giande(features=features).check(model, "gradient")
    listed = str(refused.value).rpartition("one of ")[2].split(", ")
    assert listed == ["normalize", "conv1", "norm1", *(f"blocks.{n}" for n in range(6))]
    images, labels = extended(Giande())
    small = nn.functional.interpolate(images, 4)
    for name in listed:
        Giande(features=name).check(model, "gradient")
        loss = Giande(features=name).loss(model.double(), (small, labels), client())
        assert loss is not None
        assert bool(loss.isfinite())


@pytest.mark.parametrize(("network", "features"), [("mlp(hidden=[8])", "1"), ("vit", "blocks.0")])
def test_rows_and_tokens_are_no_maps(network: str, features: str) -> None:
    model = initial_model(network, SPEC, 0)
    with pytest.raises(ValueError, match="one of nothing in this model: leave it out"):
        Giande(features=features).check(model, "gradient")
    Giande().check(model, "gradient")
