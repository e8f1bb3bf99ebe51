"""DCS-2: never against the true gradient, and a search that ends as it says."""

import pytest
import torch
from torch import Tensor

from clients.defenses.learning.dcs2 import DCS2, projected
from clients.defenses.learning.stand_ins import descended, flat, similarity
from tests.clients.a_step import a_step, few_images, small_model
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
