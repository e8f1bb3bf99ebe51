"""Mixtures are convex, capped, of different images; and they can be un-mixed."""

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from clients.defenses.learning.mixing import Mixing, drawn_weights, soft, with_partners
from clients.defenses.learning.mixup import MixUp
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, TrainingPlan
from tests.clients.one_update import context, eavesdrop, gradient, smooth_image

SPEC = DataSpec((3, 32, 32), 10, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def client(examples: int = 8, *, round: int = 1, step: int = 0) -> ClientContext:
    ctx = context(round=round, step=step)
    ctx.spec, ctx.labels = SPEC, torch.arange(examples) % 10
    return ctx


def images(count: int) -> Tensor:
    return torch.cat([smooth_image(draw) for draw in range(count)])


def encoded(defense: Mixing, held: Tensor, labels: Tensor, ctx: ClientContext) -> Batch:
    (indices,) = defense.sampler([torch.arange(len(held))], len(held), ctx)
    return defense.transform_batch((held[indices], labels[indices]), ctx)


@pytest.mark.parametrize("kind", ["dirichlet", "normal"])
@pytest.mark.parametrize("k", [2, 4, 6])
def test_weights_are_on_the_simplex_and_under_the_cap(
    kind: Literal["dirichlet", "normal"], k: int
) -> None:
    weights = drawn_weights(2000, k, 0.65, kind, torch.Generator().manual_seed(1))
    assert torch.allclose(weights.sum(dim=1), torch.ones(2000, dtype=torch.float64))
    assert weights.min() >= 0
    assert weights.max() <= 0.65


@pytest.mark.parametrize(
    ("kind", "accepted", "first"), [("dirichlet", 0.75, 0.43), ("normal", 0.93, 0.25)]
)
def test_shares_accepted_and_led_are_those_of_the_two_readings(
    kind: Literal["dirichlet", "normal"], accepted: float, first: float
) -> None:
    free = drawn_weights(20_000, 4, 1.0, kind, torch.Generator().manual_seed(2))
    assert float((free.max(dim=1).values <= 0.65).double().mean()) == pytest.approx(
        accepted, abs=0.015
    )
    capped = drawn_weights(20_000, 4, 0.65, kind, torch.Generator().manual_seed(3))
    assert float(capped[:, 0].mean()) == pytest.approx(first, abs=0.01)


def test_each_mixture_is_led_by_its_own_example_and_no_image_is_in_it_twice() -> None:
    batch = torch.tensor([5, 2, 9])
    found = with_partners(batch, 12, 4, torch.Generator().manual_seed(0)).view(3, 4)
    assert torch.equal(found[:, 0], batch)
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_soft_labels_sum_to_one_and_images_are_what_the_weights_say() -> None:
    held, labels = images(8), torch.arange(8)
    mixtures, targets = encoded(MixUp(), held, labels, client())
    assert mixtures.shape == held.shape
    assert torch.allclose(targets.sum(dim=1), torch.ones(8, dtype=torch.float64))
    # one image a class: the soft label says how much of each image is in it
    assert torch.allclose(mixtures, torch.einsum("bn,n...->b...", targets[:, :8], held))


def test_mixtures_come_from_the_secret_stream_and_are_new_in_every_step_and_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, labels = images(8), torch.arange(8)
    ctxs = [client(), client(step=1), client(round=2)]
    targets = [encoded(MixUp(), held, labels, ctx)[1] for ctx in ctxs]
    assert not torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[0], targets[2])
    assert torch.equal(targets[0], encoded(MixUp(), held, labels, client())[1])
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "01" * 32)
    assert not torch.equal(targets[0], encoded(MixUp(), held, labels, client())[1])


def test_soft_labels_stay_as_they_are() -> None:
    already = torch.full((2, 10), 0.1)
    assert soft(already, images(2), client()) is already


def test_the_client_counts_its_batch_and_not_the_partners() -> None:
    plan = TrainingPlan("gradient", 0.1, 8, 100, 1, 1)
    assert MixUp().weight(plan) == 8
    assert MixUp().weight(dataclasses.replace(plan, examples=5)) == 5
    assert MixUp().weight(dataclasses.replace(plan, kind="weights")) is None


def test_a_cap_that_no_draw_meets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"let cap be at least 0\.325"):
        MixUp(k=4, cap=0.3)


def test_the_ratio_returns_the_mixture_exactly_and_not_the_image() -> None:
    held = images(4)
    mixtures, targets = encoded(MixUp(), held, torch.arange(4), client(4))
    clean = gradient(mixtures[:1])
    assert eavesdrop(clean, clean, mixtures[:1]).best_row == 120.0
    own = int(targets[0].argmax())
    assert eavesdrop(clean, clean, held[own : own + 1]).best_row < 30.0


def test_two_epochs_of_mixtures_of_images_of_different_classes_are_unmixed_exactly() -> None:
    """The soft label, which the last bias gradient shows, tells the weights."""
    held = images(4)
    epochs = [encoded(MixUp(), held, torch.arange(4), client(4, step=step)) for step in (0, 1)]
    mixtures = torch.cat([e[0] for e in epochs]).flatten(1)
    weights = torch.cat([e[1] for e in epochs])[:, :4]
    unmixed = torch.linalg.lstsq(weights, mixtures).solution
    assert (unmixed - held.flatten(1)).abs().max() < 1e-9
