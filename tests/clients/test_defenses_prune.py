"""Pruning keeps exactly the coordinates it says, and forgets none that it is to remember."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.defenses.perturbation.prune import Prune, largest
from fedsim.defense import Rank, Tensors
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


def drawn(*shape: int, seed: int = 0) -> Tensors:
    return {"a": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def test_a_random_draw_keeps_as_many_anew_each_round_and_follows_the_secret_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, defense = {"a": torch.ones(1000)}, Prune(ratio=0.9, by="random")

    def kept(round: int) -> list[int]:
        after = defense.transform_update(before, context(round=round))["a"]
        return after.nonzero().flatten().tolist()

    assert len(kept(1)) == 100
    assert kept(1) == kept(1) != kept(2)
    public = kept(1)
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "ff" * 32)
    assert kept(1) != public  # who knows every public seed does not know the draw


def test_a_threshold_keeps_what_reaches_it_and_nothing_else() -> None:
    before = {"a": torch.tensor([0.5, -1.0, 0.999, 1.5, 0.0])}
    after = Prune(by="threshold", threshold=1.0).transform_update(before, context())["a"]
    assert after.tolist() == [0.0, -1.0, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("wrong", [{"by": "threshold"}, {"threshold": 0.1}])
def test_a_threshold_is_written_where_it_is_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Prune(**wrong)


@pytest.mark.parametrize("by", ["top-k", "random", "threshold"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_with_feedback_nothing_is_lost(by: Any, scope: Any) -> None:
    """What 20 rounds sent and what is still kept add up to what they computed."""
    threshold = 1.5 if by == "threshold" else None
    defense = Prune(by=by, scope=scope, threshold=threshold, feedback=True)
    store: Tensors = {}
    computed, sent = torch.zeros(30, 10), torch.zeros(30, 10)
    for round in range(1, 21):
        ctx = context(round=round)
        ctx.store = {name: tensor.clone() for name, tensor in store.items()}  # a restart
        update = drawn(30, 10, seed=round)
        computed += update["a"]
        sent += defense.transform_update(update, ctx)["a"]
        store = ctx.store
    (rest,) = store.values()
    assert rest.norm() > 1
    assert (sent + rest - computed).abs().max() < 3e-6  # ten units in the last place


def test_what_was_kept_back_is_forgotten_where_the_server_changed_the_shape() -> None:
    ctx, defense = context(), Prune(feedback=True)
    defense.transform_update(drawn(50), ctx)
    other = drawn(20, 4, seed=1)
    after = defense.transform_update(other, ctx)
    assert torch.equal(after["a"], largest(other["a"], 0.9))


def test_feedback_voids_a_norm_bound_where_it_acts() -> None:
    defense = Prune(feedback=True)
    assert (defense.norm_bound("update", 1.0), defense.norm_bound("gradient", 1.0)) == (None, 1.0)
    assert Prune.rank is Rank.SPARSIFY


def test_the_auditor_is_told_the_share_and_the_bytes() -> None:
    ctx = context()
    Prune(ratio=0.9).transform_update(drawn(1000), ctx)
    figures = ctx.effects["prune"].figures
    # 100 values and a bitmap of 1000 bits are smaller than 100 values and 100 indices
    assert figures == {"share_sent": 0.1, "bytes_coded": 525.0, "bytes_saved": 4000.0 - 525.0}
