"""Soft labels sum to one; the smallest entry of the last bias gradient still names the class."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from clients.defenses.learning.label_smoothing import LabelSmoothing
from tests.clients.test_defenses_mixup import client, images

LABELS = torch.tensor([3, 7])


@pytest.mark.parametrize("amount", [0.1, 0.9, -1.0])
def test_labels_are_the_formula_and_images_stay(amount: float) -> None:
    held = images(2)
    shown, labels = LabelSmoothing(amount=amount).transform_batch((held, LABELS), client())
    assert shown is held
    wanted = (1 - amount) * one_hot(LABELS, 10) + amount / 10
    assert torch.allclose(labels, wanted.double())
    assert torch.allclose(labels.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_it_is_cross_entropys_own_smoothing() -> None:
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).double()
    labels = LabelSmoothing().transform_batch((images(2), LABELS), client())[1]
    own = cross_entropy(logits, LABELS, label_smoothing=0.1)
    assert float(cross_entropy(logits, labels)) == pytest.approx(float(own))


def test_soft_labels_are_smoothed_too() -> None:
    half = torch.zeros(2, 10, dtype=torch.float64)
    half[:, :2] = 0.5
    labels = LabelSmoothing(amount=0.5).transform_batch((images(2), half), client())[1]
    assert torch.allclose(labels[0, :3], torch.tensor([0.3, 0.3, 0.05], dtype=torch.float64))


def test_of_a_sure_model_several_entries_are_negative_and_the_smallest_is_still_the_class() -> None:
    for sureness, negative in ((0.0, 1), (4.0, 9)):
        logits = (sureness * one_hot(LABELS[:1] + 1, 10)).double().requires_grad_()
        labels = LabelSmoothing(amount=0.5).transform_batch((images(1), LABELS[:1]), client())[1]
        (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
        assert int((gradient < 0).sum()) == negative
        assert int(gradient.argmin()) == int(LABELS[0])


def test_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the labels as they are"):
        LabelSmoothing(amount=0.0)
