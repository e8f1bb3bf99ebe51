"""Pruning keeps exactly the largest coordinates."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.defenses.perturbation.prune import Prune, largest
from tests.clients.one_update import context, flat


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 10**6))
def test_exactly_so_many_are_kept_and_none_is_smaller_than_one_dropped(
    size: int, ratio: float, seed: int
) -> None:
    before = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    after = largest(before, ratio)
    kept = after != 0
    assert int(kept.sum()) == max(1, round(size * (1 - ratio)))
    assert torch.equal(after[kept], before[kept])
    if not kept.all():
        assert before[kept].abs().min() >= before[~kept].abs().max()


def test_ties_do_not_keep_more() -> None:
    assert int((largest(torch.ones(100), 0.9) != 0).sum()) == 10


def test_a_tensor_of_mostly_zeros_keeps_only_its_largest() -> None:
    before = torch.zeros(100)
    before[:20] = torch.arange(1.0, 21.0)
    after = largest(before, 0.9)
    assert torch.equal(after.nonzero().flatten(), torch.arange(10, 20))


@pytest.mark.parametrize(("scope", "kept"), [("layer", (10, 10)), ("global", (20, 0))])
def test_coordinates_compete_within_their_scope(
    scope: Literal["layer", "global"], kept: tuple[int, int]
) -> None:
    before = {"large": 100 + torch.arange(100.0).view(10, 10), "small": torch.arange(1.0, 101.0)}
    after = Prune(ratio=0.9, scope=scope).transform_update(before, context())
    assert tuple(int((t != 0).sum()) for t in after.values()) == kept
    assert [t.shape for t in after.values()] == [t.shape for t in before.values()]


def test_pruning_never_lengthens() -> None:
    before = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    after = Prune(ratio=0.3).transform_update(before, context())
    assert flat(after).norm() <= flat(before).norm()
    assert Prune().norm_bound("update", 1.0) == 1.0


def test_at_the_gradient_the_upload_is_left_alone() -> None:
    before = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    defense = Prune(at="gradient")
    assert defense.transform_update(before, context()) is before
    assert int((defense.transform_gradient(before, context())["a"] != 0).sum()) == 5
