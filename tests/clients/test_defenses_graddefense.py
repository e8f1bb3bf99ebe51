"""GradDefense: slices of equal sensitivity, exactly so many of them with noise."""

import itertools

import pytest
import torch

from clients.defenses.perturbation.graddefense import EDGES, GradDefense, edges
from tests.clients.a_step import a_step, few_images, joined, small_model


def test_exactly_so_many_slices_change_and_the_others_not_by_a_bit() -> None:
    before, ctx = a_step(small_model(), few_images())
    after = GradDefense(perturbed=3, scale=0.01).transform_gradient(before, ctx)
    moved = joined(after) - joined(before)
    ends = ctx.store[EDGES].tolist()
    assert len(ends) == 11
    assert (ends[0], ends[-1]) == (0, len(moved))
    slices = [moved[a:b] for a, b in itertools.pairwise(ends)]
    changed = [part for part in slices if (part != 0).any()]
    assert len(changed) == 3
    noise = torch.cat(changed)
    assert noise.std().item() == pytest.approx(0.01, rel=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=5e-4)
    share = ctx.effects["graddefense"].figures["share of entries with noise"]
    assert share == pytest.approx(len(noise) / len(moved))


def test_slices_tell_equally_much() -> None:
    gradient = {"a": torch.zeros(100), "b": torch.zeros(50), "c": torch.zeros(850)}
    ends = edges({"a": 2.0, "b": 1.0, "c": 1.0}, gradient, 4)
    assert ends.tolist() == pytest.approx([0, 50, 100, 150, 1000], abs=1)


def test_what_tells_nothing_falls_to_the_last_slice_and_none_is_empty() -> None:
    gradient = {"a": torch.zeros(2), "b": torch.zeros(98)}
    assert edges({"a": 1.0, "b": 0.0}, gradient, 2).tolist() == [0, 1, 100]
    assert edges({"a": 1.0, "b": 0.0}, gradient, 5).tolist() == [0, 1, 2, 3, 4, 100]
    assert edges({"a": 0.0, "b": 1.0}, gradient, 100).tolist() == list(range(101))
    assert edges({"a": 0.0, "b": 0.0}, gradient, 4).tolist() == [0, 25, 50, 75, 100]


def test_with_ones_the_last_layer_tells_nothing() -> None:
    """The reference's flaw: probabilities minus label sum to 0, whatever the image."""
    model, batch = small_model(), few_images()
    generator = torch.Generator().manual_seed(0)
    ones = GradDefense(projection="ones").sensitivity(model, batch, generator)
    normal = GradDefense().sensitivity(model, batch, generator)
    largest = max(ones.values())
    assert max(ones["fc.weight"], ones["fc.bias"]) < 1e-5 * largest
    assert min(normal["fc.weight"], normal["fc.bias"]) > 1e-3 * max(normal.values())


def test_slices_are_cut_once_a_round_and_drawn_anew_each_step() -> None:
    model, batch = small_model(), few_images()
    before, ctx = a_step(model, batch)
    defense = GradDefense(perturbed=1)
    first = joined(defense.transform_gradient(before, ctx)) != joined(before)
    cut = ctx.store[EDGES]
    seen = []
    for step in range(1, 6):
        ctx.step = step
        seen.append(joined(defense.transform_gradient(before, ctx)) != joined(before))
        assert ctx.store[EDGES] is cut
    assert any(not torch.equal(first, other) for other in seen)


def test_more_slices_than_there_are() -> None:
    with pytest.raises(ValueError, match="of 3 slices 5 cannot"):
        GradDefense(slices=3)
    with pytest.raises(ValueError, match="cannot be cut"):
        GradDefense(slices=50, perturbed=5).check(torch.nn.Linear(3, 2), "gradient")
