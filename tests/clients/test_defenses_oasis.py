"""Quarter turns keep the mean, which is all that a mean imprint measures, and nothing else."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.learning.oasis import Oasis, quarters
from fedsim.data import DataSpec
from tests.clients.one_update import context, smooth_image

IMAGES = torch.cat([smooth_image(draw) for draw in range(8)])
LABELS = torch.arange(8)
BINS = 200


def test_turning_by_quarters_keeps_the_mean() -> None:
    means = [turned.mean(dim=(1, 2, 3)) for turned in quarters(IMAGES)]
    assert max((m - IMAGES.mean(dim=(1, 2, 3))).abs().max() for m in means) < 1e-6


@pytest.mark.parametrize(
    ("transforms", "copies"),
    [
        ("major-rotation", 4),
        ("minor-rotation", 4),
        ("shear", 4),
        ("flip", 3),
        ("major-rotation+shear", 7),
    ],
)
def test_every_copy_is_another_image_of_the_same_label(
    transforms: Literal["major-rotation", "shear"], copies: int
) -> None:
    images, labels = Oasis(transforms=transforms).transform_batch((IMAGES, LABELS), context())
    assert torch.equal(labels, LABELS.repeat(copies))
    stacked = images.view(copies, *IMAGES.shape)
    assert torch.equal(stacked[0], IMAGES)
    assert all(
        (stacked[a] - stacked[b]).flatten(1).abs().max(dim=1).values.min() > 0.01
        for a in range(copies)
        for b in range(a)
    )
    assert images.min() >= 0
    assert images.max() <= 1


def test_soft_labels_are_repeated_too() -> None:
    soft = torch.full((8, 10), 0.1)
    assert Oasis().transform_batch((IMAGES, soft), context())[1].shape == (32, 10)


def test_images_that_are_not_square_are_not_turned() -> None:
    model = nn.Linear(1, 1)
    model.spec = DataSpec((1, 8, 9), 10, (0.5,), (0.5,))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="transforms='flip'"):
        Oasis().check(model, "gradient")
    Oasis(transforms="shear").check(model, "gradient")


def test_a_mean_imprint_reads_the_average_of_the_four_turns_and_nothing_better() -> None:
    row = torch.full((3072,), 1 / 3072, dtype=torch.float64)
    plain = read(row, IMAGES, LABELS)
    assert (best(plain, IMAGES) == 120).all()
    defended = read(row, *Oasis().transform_batch((IMAGES, LABELS), context()))
    average = (IMAGES + sum(quarters(IMAGES))) / 4
    assert best(defended, average).min() >= 117
    assert 14 <= best(defended, IMAGES).min() <= best(defended, IMAGES).max() <= 21


def test_a_random_imprint_reads_the_images_themselves() -> None:
    row = torch.randn(3072, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    defended = read(row, *Oasis().transform_batch((IMAGES, LABELS), context()))
    assert int((best(defended, IMAGES) >= 112).sum()) >= 6


def read(row: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Read all bins of an imprint ``relu(<row, x> - c_i)`` before a linear layer, ``[k, D]``."""
    values = images.flatten(1) @ row
    middle, spread = values.mean(), values.std()
    cutoffs = middle + torch.linspace(-4, 4, BINS, dtype=torch.float64) * spread
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(10, 1, generator=generator, dtype=torch.float64)
    weight = row.repeat(BINS, 1).requires_grad_()
    bias = (-cutoffs).requires_grad_()
    signal = torch.relu(images.flatten(1) @ weight.T + bias).mean(dim=1, keepdim=True)
    loss = cross_entropy(signal / spread @ head.T, labels)
    of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
    rows = of_weight.diff(dim=0, append=torch.zeros(1, 3072))
    moved = of_bias.diff(append=torch.zeros(1))
    heard = moved.abs() > 1e-9 * of_bias.abs().max()
    return rows[heard] / moved[heard].unsqueeze(1)


def best(found: Tensor, wanted: Tensor) -> Tensor:
    """Return each image's best PSNR in dB, at most 120."""
    errors = (found.clamp(0, 1).unsqueeze(1) - wanted.flatten(1)).square().mean(dim=2)
    return -10 * errors.min(dim=0).values.clamp_min(1e-12).log10()
