"""Signs are fair and leave the absolute value; from a few encodings the images' come back."""

import itertools

import torch
from torch import Tensor

from clients.defenses.learning.instahide import InstaHide, signs
from clients.defenses.learning.mixup import MixUp
from tests.clients.test_defenses_mixup import SPEC, client, encoded, images

MEAN = torch.tensor(SPEC.mean, dtype=torch.float64).view(-1, 1, 1)


def test_the_absolute_value_around_the_mean_is_that_of_the_mixture() -> None:
    held, labels = images(8), torch.arange(8)
    flipped, targets = encoded(InstaHide(), held, labels, client())
    mixture = torch.einsum("bn,n...->b...", targets[:, :8], held)
    assert torch.allclose((flipped - MEAN).abs(), (mixture - MEAN).abs(), atol=1e-14)
    assert not torch.allclose(flipped, mixture)
    assert torch.allclose(targets.sum(dim=1), torch.ones(8, dtype=torch.float64))


def test_signs_are_fair_and_independent_of_the_sample() -> None:
    drawn = signs(torch.empty(64, 3, 32, 32), torch.Generator().manual_seed(4))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 3 / drawn.numel() ** 0.5
    assert abs(float((drawn[0] * drawn[1]).mean())) < 4 / drawn[0].numel() ** 0.5


def test_a_few_encodings_give_the_absolute_values_of_every_image() -> None:
    """Phase retrieval, four images of different classes: three epochs' absolute values.

    ``|w_e x| = b_e`` for 12 encodings e and 4 unknowns a pixel: of the signs of the first four
    equations (eight choices, up to a common one) the right ones agree with the other eight.
    """
    held = images(4)
    epochs = [
        encoded(InstaHide(), held, torch.arange(4), client(4, step=step)) for step in range(3)
    ]
    seen = torch.cat([(e[0] - MEAN).abs() for e in epochs]).flatten(1)
    weights = torch.cat([e[1] for e in epochs])[:, :4]
    found = retrieved(weights, seen)
    error = (found.abs() - (held - MEAN).abs().flatten(1)).abs()
    assert error.median() < 1e-9
    assert (error < 1e-6).double().mean() > 0.99


def retrieved(weights: Tensor, seen: Tensor) -> Tensor:
    """Return ``[4, D]`` up to a sign for each column."""
    choices = [torch.tensor((1.0, *s)).double() for s in itertools.product((-1.0, 1.0), repeat=3)]
    solved = torch.stack(
        [torch.linalg.solve(weights[:4], s.unsqueeze(1) * seen[:4]) for s in choices]
    )
    misfit = ((weights @ solved).abs() - seen).square().sum(dim=1)
    best = misfit.argmin(dim=0)
    return solved[best, :, torch.arange(seen.shape[1])].T


def test_it_mixes_as_mixup_does() -> None:
    held, labels = images(8), torch.arange(8)
    ours = encoded(InstaHide(), held, labels, client())[1]
    theirs = encoded(MixUp(), held, labels, client())[1]
    assert ours.shape == theirs.shape
    assert (ours.max(dim=1).values <= 0.65).all()
