"""Dual and large pruning: how many are dropped at which end, and that nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.defenses.perturbation.dual_prune import DualPrune, between
from clients.defenses.perturbation.large_prune import LargePrune
from fedsim.defense import Tensors
from tests.clients.one_update import context, eavesdrop, gradient, smooth_image


def drawn(*shape: int, seed: int = 0) -> Tensors:
    return {"a": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 400),
    k1=st.floats(0.01, 0.49),
    k2=st.floats(0.0, 0.5),
    seed=st.integers(0, 10**6),
)
def test_so_many_are_kept_and_they_lie_between(size: int, k1: float, k2: float, seed: int) -> None:
    before = drawn(size, seed=seed)["a"]
    kept = torch.zeros(size, dtype=torch.bool)
    kept[between(before, k1, k2)] = True
    assert int(kept.sum()) == max(1, size - round(size * k1) - round(size * k2))
    assert abs(int(kept.sum()) - size * (1 - k1 - k2)) <= 1
    order = before.abs().argsort(descending=True)
    ranks = kept[order].nonzero().flatten()
    assert int(ranks.max() - ranks.min()) + 1 == len(ranks)  # without a gap, largest to smallest
    assert int(ranks.min()) in (round(size * k1), round(size * k1) - 1)


def test_no_kept_coordinate_is_above_the_quantile() -> None:
    before = drawn(10_000)
    after = DualPrune(k1=0.05, k2=0.75).transform_update(before, context())["a"]
    magnitude = before["a"].abs()
    assert after.abs().max() <= magnitude.quantile(0.95)
    assert after[after != 0].abs().min() >= magnitude.quantile(0.75)
    assert int(after.count_nonzero()) == 2000


def test_equal_coordinates_do_not_keep_more() -> None:
    after = DualPrune(k1=0.1, k2=0.8).transform_update({"a": torch.ones(100)}, context())
    assert int(after["a"].count_nonzero()) == 10


def test_large_pruning_drops_the_largest_and_nothing_else() -> None:
    before = {"a": torch.tensor([[3.0, -5.0], [0.5, 4.0]])}
    after = LargePrune(ratio=0.5).transform_update(before, context())["a"]
    assert after.tolist() == [[3.0, 0.0], [0.5, 0.0]]


def test_layers_compete_where_they_are_told_to() -> None:
    before = {"large": 100 + torch.arange(10.0), "small": torch.arange(1.0, 11.0)}
    after = LargePrune(ratio=0.5, scope="global").transform_update(before, context())
    assert [int(t.count_nonzero()) for t in after.values()] == [0, 10]
    after = LargePrune(ratio=0.5).transform_update(before, context())
    assert [int(t.count_nonzero()) for t in after.values()] == [5, 5]


@pytest.mark.parametrize("defense", [DualPrune(), LargePrune(ratio=0.3, feedback=True)])
def test_what_rounds_sent_and_what_is_kept_add_up(defense: DualPrune | LargePrune) -> None:
    ctx = context()
    computed, sent = torch.zeros(40, 10), torch.zeros(40, 10)
    for round in range(20):
        update = drawn(40, 10, seed=round)
        computed += update["a"]
        sent += defense.transform_update(update, ctx)["a"]
    (rest,) = ctx.store.values()
    assert rest.norm() > 1
    assert (sent + rest - computed).abs().max() < 1e-5
    assert (defense.norm_bound("update", 1.0), defense.norm_bound("gradient", 1.0)) == (None, 1.0)


def test_without_feedback_nothing_is_kept() -> None:
    ctx, defense = context(), DualPrune(feedback=False)
    defense.transform_update(drawn(50), ctx)
    assert ctx.store == {}
    assert defense.norm_bound("update", 1.0) == 1.0


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        DualPrune(k1=0.5, k2=0.5)


def test_a_weak_row_gives_the_image_back_whatever_is_cut_off_the_strong_ones() -> None:
    image = smooth_image()
    clean = gradient(image)
    received = LargePrune(ratio=0.1).transform_update(clean, context())
    got = eavesdrop(received, clean, image)
    assert got.best_row == 120.0
    assert got.least_squares < 15


def test_the_rounds_together_bring_back_what_one_round_hides() -> None:
    """Feedback on the same gradient: the strongest rows are owed for ever, all others arrive."""
    image = smooth_image()
    clean = gradient(image)
    ctx, defense = context(), DualPrune(k1=0.1, k2=0.8)
    first = defense.transform_update(clean, ctx)
    summed = first
    for _ in range(29):
        sent = defense.transform_update(clean, ctx)
        summed = {name: summed[name] + tensor for name, tensor in sent.items()}
    alone, together = eavesdrop(first, clean, image), eavesdrop(summed, clean, image)
    assert alone.best_row < 9
    assert together.best_row > 25
    assert together.cosine < 0.6
