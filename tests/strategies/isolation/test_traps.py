"""Trap weights by their own laws, the way to the layer, and rows that agree: no federation yet."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.models import build_model
from strategies.attacks.analytic.isolation.agreement import isolated, noise_of
from strategies.attacks.analytic.isolation.sybil_sa_dp import gain_for
from strategies.attacks.analytic.isolation.trap import (
    expected_recall,
    firing_rate,
    gaussian_rows,
    quantile_rows,
    trap_rows,
    tuned_scale,
)
from strategies.attacks.analytic.isolation.trapped_layer import TrappedLayer
from tests.strategies.isolation.one_client import SPEC, pixels, tiles
from tests.strategies.isolation.trapped_federation import cifar, needs_cifar


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int, seed: int = 0) -> Tensor:
    order = torch.randperm(len(tiles()), generator=generator(seed))[:count]
    return pixels(tiles().subset(order)).double()


# -- Alg. 1 ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("features", [64, 65])
def test_half_of_a_row_is_negative_and_the_other_half_smaller_by_the_scale(features: int) -> None:
    weight, bias = trap_rows(20, features, 0.7, 0.5, generator())
    assert not bias.any()
    for row in weight:
        negative, positive = -row[row < 0], row[row > 0]
        assert len(negative) == len(positive) == 32
        assert torch.allclose(positive.sort().values, 0.7 * negative.sort().values)
    first, second = (set((row < 0).nonzero().flatten().tolist()) for row in weight[:2])
    assert first != second


def test_the_spread_of_the_magnitudes_is_the_one_asked_for() -> None:
    weight, _ = trap_rows(100, 3072, 0.95, 0.5, generator())
    assert float(weight[weight < 0].square().mean().sqrt()) == pytest.approx(0.5, rel=0.01)


# -- the law ---------------------------------------------------------------------------------------
def measured(images: Tensor, scale: float, rows: int = 2000) -> Tensor:
    weight, _ = trap_rows(rows, images.shape[1], scale, 0.5, generator())
    return (images @ weight.T > 0).double().mean(dim=1)


@needs_cifar
@pytest.mark.parametrize("scale", [0.95, 0.96, 0.97])
def test_rows_fire_on_cifar_as_often_as_the_law_says(scale: float) -> None:
    images = cifar().train.batch(torch.arange(500), torch.float64)[0].flatten(1)
    law = float(firing_rate(images, scale).mean())
    assert law == pytest.approx(float(measured(images, scale).mean()), rel=0.1)


def test_rows_fire_on_photographs_as_often_as_the_law_says() -> None:
    images = photographs(300).flatten(1)
    law, seen = firing_rate(images, 0.96), measured(images, 0.96)
    assert float(law.mean()) == pytest.approx(float(seen.mean()), rel=0.1)
    assert float(torch.corrcoef(torch.stack([law, seen]))[0, 1]) > 0.99


def test_flat_images_never_fire() -> None:
    flat = torch.tensor([0.0, 0.5, 1.0]).view(3, 1).expand(3, 100)
    assert not firing_rate(flat, 0.99).any()


def test_the_scale_that_leaks_most_nears_one_as_the_square_root_of_the_size() -> None:
    images = torch.rand(50, 100 * 16, generator=generator())
    small, large = (tuned_scale(part, 1000, 100) for part in (images[:, :100], images))
    assert (1 - small) / (1 - large) == pytest.approx(4, rel=0.3)
    around = [expected_recall(firing_rate(images, s), 1000, 100) for s in (large, 0.9, 0.999)]
    assert max(around) == around[0]


def test_no_independent_rows_recover_more_than_the_bound() -> None:
    bound = 1 - (1 - 0.01 * 0.99**99) ** 1000
    assert bound == pytest.approx(0.976, abs=1e-3)
    fired = torch.rand(20, 1000, 100, generator=generator()) < 0.01
    alone = fired & (fired.sum(dim=2, keepdim=True) == 1)
    drawn = float(alone.any(dim=1).double().mean())
    assert drawn == pytest.approx(bound, abs=0.01)
    best = max(
        expected_recall(torch.full((100,), p), 1000, 100) for p in torch.linspace(0.001, 0.05, 99)
    )
    assert bound - 1e-3 <= best <= bound + 1e-12


def test_quantile_rows_fire_for_one_image_in_a_batch() -> None:
    noise = torch.randn(2000, *SPEC.shape, generator=generator(), dtype=torch.float64)
    mean, std = (torch.tensor(f, dtype=torch.float64).view(-1, 1, 1) for f in (SPEC.mean, SPEC.std))
    weight, bias = quantile_rows(200, SPEC, 50, generator())
    fired = (mean + std * noise).flatten(1) @ weight.T + bias > 0
    assert float(fired.double().mean()) == pytest.approx(1 / 50, rel=0.1)


def test_signed_gaussian_rows_fire_for_half_of_all_images() -> None:
    weight, bias = gaussian_rows(500, 3072, 2.0, generator())
    fired = photographs(100).flatten(1) @ weight.T + bias > 0
    assert float(fired.double().mean()) == pytest.approx(0.5, abs=0.05)


# -- the way to the layer --------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mlp(hidden=[16])", "mlp(hidden=[16, 8])"])
def test_a_model_that_starts_with_the_layer_reads_pixels_in_their_order(name: str) -> None:
    opened = TrappedLayer.opened(build_model(name, SPEC), generator())
    assert torch.equal(opened.pixels.positions, torch.arange(3072))
    assert opened.passage.convolutions == ()


def test_convolutions_become_a_permutation_of_the_pixels() -> None:
    opened = TrappedLayer.opened(build_model("convnet(hidden=[16])", SPEC), generator())
    images = photographs(4)
    read: list[Tensor] = []
    opened.layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        opened.model(images)
    back = opened.pixels.pixels(read[0][:, opened.pixels.positions])
    assert torch.allclose(back, images.flatten(1), atol=1e-6)
    others = torch.ones(read[0].shape[1], dtype=torch.bool)
    others[opened.pixels.positions] = False
    assert others.sum() == 1024
    assert not read[0][:, others].any()


def test_a_normalization_in_front_is_undone_in_the_rows() -> None:
    from fedsim.models.building import Normalize

    model = nn.Sequential(
        Normalize(SPEC), nn.Flatten(), nn.Linear(3072, 40), nn.ReLU(), nn.Linear(40, 6)
    )
    model.spec = SPEC  # type: ignore[assignment]
    opened = TrappedLayer.opened(model, generator())
    rows = trap_rows(40, 3072, 0.97, 0.5, generator())
    opened.set(rows)
    images = photographs(50)
    heard = opened.model[:3](images)
    assert torch.allclose(heard, images.flatten(1) @ rows[0].T, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("mlp(hidden=[])", "needs a bias, a ReLU"),
        ("convnet", "needs a bias, a ReLU"),
        ("convnet(hidden=[16], stride=2)", "has 64 filters, and 192 are needed"),
        ("resnet20(norm='batch')", "cannot be led through"),
        ("lenet(activation='sigmoid')", "cannot be led through"),
        ("vgg16", "cannot be led through"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_a_remedy(name: str, because: str) -> None:
    with pytest.raises(ValueError, match=because) as refused:
        TrappedLayer.opened(build_model(name, SPEC), generator())
    assert "mlp(hidden=[1000])" in str(refused.value)


def test_turning_up_changes_gradients_and_nothing_that_is_computed() -> None:
    opened = TrappedLayer.opened(build_model("mlp(hidden=[64])", SPEC), generator())
    opened.set(trap_rows(64, 3072, 0.97, 0.5, generator()))
    images, labels = photographs(16), torch.arange(16) % 6
    before, quiet = opened.model(images), opened.signal_gradient(images, labels)
    opened.turn_up(50.0)
    assert torch.allclose(opened.model(images), before)
    assert opened.signal_gradient(images, labels) == pytest.approx(50 * quiet)


def test_the_layer_takes_the_share_of_the_norm_that_was_asked_for() -> None:
    opened = TrappedLayer.opened(build_model("mlp(hidden=[64])", SPEC), generator())
    opened.set(trap_rows(64, 3072, 0.98, 0.5, generator()))
    batch = photographs(16), torch.arange(16) % 6
    opened.turn_up(gain_for(0.9, *opened.energies(*batch)))
    layer, after, rest = opened.energies(*batch)
    assert layer / (layer + after + rest) == pytest.approx(0.9, abs=1e-6)


# -- rows that agree -------------------------------------------------------------------------------
def held(images: Tensor, signals: list[tuple[dict[int, float], int]]) -> tuple[Tensor, Tensor]:
    """Return gradients of rows, each a mixture given by image and strength, so many times."""
    weights, biases = [], []
    for mixture, times in signals:
        for k in range(times):
            parts = {j: g * (1 + k / times) ** 0.5 for j, g in mixture.items()}
            weights.append(sum(g * images[j] for j, g in parts.items()))
            biases.append(sum(parts.values()))
    return torch.stack(weights), torch.tensor(biases, dtype=torch.float64)


def test_rows_of_one_image_are_gathered_and_mixtures_stay_alone() -> None:
    images = photographs(3).flatten(1)
    rows = [({0: 0.1}, 5), ({1: -0.02}, 3), ({0: 0.1, 1: 0.05, 2: 0.02}, 1)]
    found = isolated(*held(images, rows), sigma=0.0)
    assert found.rows.tolist() == [5, 3, 1]
    assert torch.allclose(found.inputs[:2], images[:2], atol=1e-9)


def test_the_error_is_that_of_least_squares() -> None:
    """Variance sigma^2 / sum g_i^2 a pixel, and a little for the brightness."""
    images, sigma = photographs(1).flatten(1), 0.01
    weight, bias = held(images, [({0: 0.1}, 40)])
    weight = weight + sigma * torch.randn(weight.shape, generator=generator(), dtype=torch.float64)
    noisy = bias + sigma * torch.randn(len(bias), generator=generator(1), dtype=torch.float64)
    found = isolated(weight, noisy, sigma)
    assert found.rows.tolist() == [40]
    predicted = sigma / float(bias.square().sum()) ** 0.5
    assert float(found.error[0]) == pytest.approx(predicted, rel=0.05)
    error = (found.inputs[0] - images[0]).square().mean().sqrt()
    assert predicted * 0.95 <= float(error) <= predicted * 1.5


def test_noise_is_read_off_quiet_rows_and_rounding_off_the_lattice() -> None:
    weight, bias = held(photographs(1).flatten(1), [({0: 0.1}, 20), ({0: 0.0}, 20)])
    assert noise_of(weight, bias) == 0.0
    noise = 0.003 * torch.randn(weight.shape, generator=generator(), dtype=torch.float64)
    assert noise_of(weight + noise, bias) == pytest.approx(0.003, rel=0.1)
    step = 2.0**-18
    rounded = (weight / step).round() * step, (bias / step).round() * step
    assert noise_of(*rounded, summands=4) == pytest.approx(step, rel=1e-6)


def test_a_picture_of_any_shape_fits() -> None:
    spec = DataSpec((1, 9, 7), 3, (0.5,), (0.2,))
    opened = TrappedLayer.opened(build_model("mlp(hidden=[10])", spec), generator())
    assert math.prod(opened.pixels.positions.shape) == 63
