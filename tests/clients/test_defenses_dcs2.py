"""DCS-2: never against the true gradient, and a search that ends as it says."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clients.defenses.learning.dcs2 import DCS2, projected
from clients.defenses.learning.stand_ins import descended, flat, similarity
from tests.clients.a_step import a_step, few_images, small_model, true_gradient
from tests.clients.one_update import cosine


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lambda_y", [0.0, 0.7, 1.0])
def test_it_never_points_against_the_true_gradient(seed: int, lambda_y: float) -> None:
    model, batch = small_model(seed=seed), few_images(2, seed=seed)
    true, ctx = a_step(model, batch, seed=seed)
    made = DCS2(iterations=2, lambda_y=lambda_y).gradients(model, batch, ctx)
    assert made.keys() == true.keys()
    assert 0 <= cosine(made, true) < 0.9999
    figures = ctx.effects["dcs2"].figures
    assert figures["cosine to the true gradient"] == pytest.approx(cosine(made, true), abs=1e-5)


def test_what_it_lessens_by_hand() -> None:
    model, (images, labels) = small_model(), few_images(2)
    true, others = true_gradient(model, (images, labels)), labels + 1
    concealed = images.flip(0)
    moved = (concealed - images) / 0.25
    cos = cosine(true_gradient(model, (concealed, others)), true)
    lengths = moved.flatten(1).norm(dim=1).tolist()
    near = math.exp(-0.05 * (lengths[0] + lengths[1]) / 2)
    z, was = model(concealed).detach(), model(images).detach()
    apart = sum(float((z[i] - was[i]).norm() / was[i].norm()) for i in range(2)) / 2
    assert near > 0.1
    assert 0.02 < apart < 10
    for epsilon, margin in ((0.01, 2.0 * (apart - 0.01)), (10.0, 0.0)):
        defense = DCS2(lambda_x=0.05, lambda_z=2.0, epsilon=epsilon)
        told = defense.objective(model, images, others, true)(moved)
        assert float(told.detach()) == pytest.approx(1 - cos + near + margin, rel=1e-4)


@pytest.mark.parametrize(("lambda_y", "shares"), [(0.9, 3), (0.2, 3), (1.0, 2)])
def test_the_gradient_is_of_the_three_terms(
    lambda_y: float, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (images, labels) = small_model(), few_images()
    concealed, others = images.flip(0), (labels + 3) % 10
    _, ctx = a_step(model, (images, labels))
    monkeypatch.setattr(DCS2, "concealed", lambda *_: (concealed, others, 1))
    made = DCS2(lambda_y=lambda_y).gradients(model, (images, labels), ctx)
    assert ctx.effects["dcs2"].figures["projected"] == 0
    loss = lambda_y * cross_entropy(model(concealed), others)
    loss = loss + (1 - lambda_y) * cross_entropy(model(concealed), labels)
    loss = (loss + cross_entropy(model(images), labels)) / shares
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for mine, other in zip(made.values(), expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_the_projection_is_the_quadratic_programs_solution() -> None:
    true = {"a": torch.tensor([2.0, 0.0])}
    for along, added in ((1.0, 0.0), (-0.5, 0.5), (-3.0, 1.5)):
        got, share = projected({"a": torch.tensor([along, 7.0])}, true, 0.5)
        assert share == added
        assert got["a"].tolist() == [along + 2 * added, 7.0]
        assert float(flat(got) @ flat(true)) >= 0


def test_the_search_ends_far_away_or_with_its_iterations() -> None:
    model, batch = small_model(), few_images(2)
    true, ctx = a_step(model, batch)
    near = DCS2(iterations=3, enough=20.0)
    images, others, iterations = near.concealed(model, batch, true, ctx.secret("a"))
    length = (4 * (images - batch[0])).flatten(1).norm(dim=1).mean()  # the std is 1/4
    assert (length > 20) == (iterations < 3)
    _, _, iterations = DCS2(iterations=3).concealed(model, batch, true, ctx.secret("a"))
    assert iterations == 3
    assert bool((others != batch[1]).all())


def test_what_it_lessens_falls_on_average() -> None:
    model, batch = small_model(), few_images(2)
    true, _ = a_step(model, batch)
    value = DCS2().objective(model, batch[0], batch[1] + 1, true)
    seen = []

    def watched(moved: Tensor) -> Tensor:
        seen.append(value(moved))
        return seen[-1]

    descended(torch.randn_like(batch[0]), watched, 40, 0.1)
    thirds = [sum(seen[start : start + 13]) for start in (0, 13, 26)]
    assert thirds[0] > thirds[1] > thirds[2]


def test_descent_keeps_its_box_and_lessens_its_objective() -> None:
    low, high = torch.zeros(3), torch.full((3,), 0.5)

    def objective(x: Tensor) -> Tensor:
        return (x - 1).square().sum()

    found, iterations = descended(torch.zeros(3), objective, 100, 0.1, box=(low, high))
    assert iterations == 100
    assert found.tolist() == [0.5] * 3


def test_similarity_is_one_for_the_same_and_small_for_noise() -> None:
    images, _ = few_images(2)
    other, _ = few_images(2, seed=1)
    assert similarity(images, images).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert float(similarity(images, other).abs().max()) < 0.5
    assert float(similarity(images, (images + 0.01).clamp(0, 1)).min()) > 0.9
