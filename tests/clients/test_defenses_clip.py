"""Clipping bounds the norm and changes nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.defenses.perturbation.clip import Clip, clipped, global_norm
from tests.clients.one_update import context, cosine, flat


def update(seed: int, scale: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 30), "b": (40,), "c": ()}
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e6),
    norm=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_norm_never_exceeds_the_bound(
    seed: int, scale: float, norm: float, dtype: torch.dtype
) -> None:
    before = update(seed, scale, dtype)
    after = clipped(before, norm)
    assert global_norm(after) <= norm
    assert cosine(before, after) == pytest.approx(1.0, abs=1e-6)
    assert clipped(after, norm) is after
    if global_norm(before) <= norm:
        assert after is before
    else:
        assert global_norm(after) == pytest.approx(norm, rel=1e-6)


def test_the_norm_is_over_all_tensors_together() -> None:
    before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    after = clipped(before, 1.0)
    assert flat(after).tolist() == pytest.approx([0.6, 0.0, 0.8], abs=1e-6)


def test_an_update_of_zeros_stays_as_it_is() -> None:
    before = {"a": torch.zeros(5)}
    assert Clip(norm=1.0).transform_update(before, context()) is before


def test_it_acts_where_it_is_told_to() -> None:
    before = update(0, 10.0)
    at_update, at_gradient = Clip(norm=1.0), Clip(norm=1.0, at="gradient")
    assert at_update.transform_gradient(before, context()) is before
    assert at_gradient.transform_update(before, context()) is before
    assert global_norm(at_update.transform_update(before, context())) <= 1
    assert global_norm(at_gradient.transform_gradient(before, context())) <= 1


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_as_nothing(odd: float) -> None:
    tensors = {"a": torch.tensor([1.0, odd]), "b": torch.ones(3)}
    assert all(not tensor.any() for tensor in clipped(tensors, 1.0).values())
