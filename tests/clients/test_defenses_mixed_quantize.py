"""Every layer is on the grid it drew, and the draw is secret and anew each round."""

import itertools
from typing import Any

import pytest
import torch

from clients.defenses.perturbation.grids import nearest
from clients.defenses.perturbation.mixed_quantize import Grid, MixedQuantize, layer_of
from fedsim.defense import Tensors
from tests.clients.one_update import context


def update(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"1.weight": (16, 30), "1.bias": (16,), "3.weight": (4, 2, 3, 3), "3.bias": (4,)}
    return {n: torch.randn(*s, generator=generator) * 3 + 1 for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("format", "range", "granularity"),
    itertools.product(
        ["int2", "int4", "int8", "int16"], ["symmetric", "affine"], ["tensor", "channel"]
    ),
)
def test_each_layers_step_is_the_declared_one(format: Any, range: Any, granularity: Any) -> None:
    defense = MixedQuantize(formats=(format,), ranges=(range,), granularities=(granularity,))
    before = update()
    after = defense.transform_update(before, context())
    bits = int(format[3:])
    for name, tensor in before.items():
        flat = (
            tensor.flatten(1)
            if granularity == "channel" and tensor.dim() > 1
            else tensor.view(1, -1)
        )
        sent = after[name].reshape(flat.shape)
        if range == "symmetric":
            step = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        else:
            high, low = (
                flat.amax(1, keepdim=True).clamp(min=0),
                flat.amin(1, keepdim=True).clamp(max=0),
            )
            step = (high - low) / (2**bits - 1)
        units = sent / step
        assert (units - units.round()).abs().max() < 2e-3 * (1 if bits < 16 else 4)
        assert ((sent - flat).abs() / step).max() <= 0.5 + 1e-2
        levels = [len(set(row.round().tolist())) for row in units]
        assert max(levels) <= 2**bits


def test_ternary_layers_hold_three_values() -> None:
    after = MixedQuantize(formats=("ternary",), granularities=("tensor",)).transform_update(
        update(), context()
    )
    for name, tensor in after.items():
        assert len(set(tensor.flatten().tolist())) <= 3, name


def test_a_layers_weight_and_bias_share_a_kind_and_layers_draw_apart() -> None:
    defense = MixedQuantize()
    drawn = [defense.draw(update(), context(round=n)) for n in range(1, 60)]
    assert all(grids.keys() == {"1", "3"} for grids in drawn)
    assert {grids["1"].format for grids in drawn} == set(defense.formats)
    assert sum(grids["1"] == grids["3"] for grids in drawn) < 20  # of 12 kinds, a twelfth
    assert layer_of("a.b.weight") == "a.b"


def test_the_draw_follows_the_secret_key(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, names = MixedQuantize(), [f"{n}.weight" for n in range(20)]
    first = defense.draw(names, context())
    assert first == defense.draw(names, context())
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "ff" * 32)
    assert first != defense.draw(names, context())


@pytest.mark.parametrize("format", ["int4", "int8", "int16"])
def test_what_lies_on_the_grid_stays(format: Any) -> None:
    grid, before = Grid(format, "symmetric", "channel"), update()["1.weight"]
    once = grid.rounded(before, nearest)
    assert torch.allclose(grid.rounded(once, nearest), once, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    for format, range in itertools.product(("int8", "ternary"), ("symmetric", "affine")):
        defense = MixedQuantize(formats=(format,), ranges=(range,))  # type: ignore[arg-type]
        assert not defense.transform_update({"1.weight": torch.zeros(3, 4)}, context())[
            "1.weight"
        ].any()


def test_the_auditor_is_told_the_bytes() -> None:
    ctx = context()
    defense = MixedQuantize(formats=("int8",), ranges=("affine",), granularities=("channel",))
    defense.transform_update(update(), ctx)
    entries, scales = 480 + 16 + 72 + 4, 2 * (16 + 1 + 4 + 1)
    figures = ctx.effects["mixed-quantize"].figures
    assert figures["bytes_coded"] == (8 * entries + 32 * scales) / 8
    assert (defense.norm_bound("update", 1.0), defense.norm_bound("gradient", 1.0)) == (None, 1.0)


def test_to_draw_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="formats"):
        MixedQuantize(formats=())
