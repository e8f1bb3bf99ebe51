"""One label and one sum: what cross-entropy takes apart, a batch of one class does not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.learning.gradient_mixing import GradientMixing
from fedsim.defense import Refusal
from tests.clients.test_defenses_mixup import client, images

HELD = images(4)


def rows(labels: Tensor, defense: GradientMixing | None = None) -> tuple[Tensor, Tensor]:
    """Return weight and bias gradient of softmax regression from zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    loss = None if defense is None else defense.loss(model, (HELD, labels), client())
    if loss is None:
        loss = cross_entropy(model(HELD), labels)
    weight, bias = torch.autograd.grad(loss, list(model.parameters()))
    return weight, bias


def test_cross_entropy_of_different_labels_is_taken_apart_exactly() -> None:
    weight, bias = rows(torch.arange(4))
    for label in range(4):  # class 9 is in no example: its row is the sum of all
        found = (weight[9] - weight[label]) / (bias[9] - bias[label])
        assert (found - HELD[label].flatten()).abs().max() < 1e-9


@pytest.mark.parametrize("objective", ["squared", "cross-entropy"])
def test_of_one_label_every_row_is_the_mean_of_all_images(objective: str) -> None:
    defense = GradientMixing(objective=objective)  # type: ignore[arg-type]
    weight, bias = rows(torch.full((4,), 3), defense)
    heard = bias.abs() > 1e-12
    ratios = weight[heard] / bias[heard].unsqueeze(1)
    assert (ratios - HELD.mean(dim=0).flatten()).abs().max() < 1e-9


def test_squared_error_is_the_mean_of_half_the_squared_distance() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 10), 0.5).double()

    loss = GradientMixing().loss(Fixed(), (HELD, torch.arange(4)), client())
    assert float(loss) == pytest.approx(10 * 0.25 / 2)  # type: ignore[arg-type]
    assert GradientMixing(objective="cross-entropy").loss(Fixed(), (HELD, HELD), client()) is None


def test_each_batch_is_of_one_class_as_large_as_it_can_be() -> None:
    ctx = client(60)
    assert ctx.labels is not None
    batches = list(GradientMixing().sampler([torch.arange(4), torch.arange(16)] * 4, 60, ctx))
    assert [len(b) for b in batches] == [4, 6] * 4
    assert all(len(set(ctx.labels[b].tolist())) == 1 for b in batches)
    assert len({int(ctx.labels[b[0]]) for b in batches}) > 1


def test_a_client_without_two_of_any_class_refuses() -> None:
    with pytest.raises(Refusal, match="no class has the 2 examples"):
        list(GradientMixing().sampler([torch.arange(4)], 8, client(8)))
