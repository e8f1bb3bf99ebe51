"""Quantization: unbiased where it says so, within its paper's variance, on its grid."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.defenses.perturbation.grids import nearest, on_grid, stochastically
from clients.defenses.perturbation.quantize import Quantize
from fedsim.defense import Defense
from tests.clients.one_update import context

DRAWS = 2000


def vector(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def drawn(defense: Quantize, tensor: Tensor, draws: int = DRAWS) -> Tensor:
    """Return ``[draws, size]`` quantized vectors, the chance of each its own."""
    chance = stochastically(torch.Generator().manual_seed(5))
    return torch.stack([defense.quantized(tensor, chance) for _ in range(draws)])


UNBIASED = [
    (Quantize(), "max", 127),
    (Quantize(bits=3), "max", 3),
    (Quantize(kind="qsgd", levels=1), "norm", 1),
    (Quantize(kind="qsgd", levels=4), "norm", 4),
    (Quantize(kind="qsgd", levels=255), "norm", 255),
    (Quantize(kind="ternary"), "max", 1),
]


@pytest.mark.parametrize(("defense", "limit", "levels"), UNBIASED)
def test_stochastic_grids_are_right_on_average(defense: Quantize, limit: str, levels: int) -> None:
    tensor = vector(100)
    step = (tensor.norm() if limit == "norm" else tensor.abs().max()) / levels
    share = (tensor / step).abs() % 1
    sigma = step * (share * (1 - share)).sqrt()
    error = (drawn(defense, tensor).mean(dim=0) - tensor).abs() / (sigma + 1e-9)
    # 3 sigma is a statement about each entry: of 100 it may miss one, and none by another sigma
    assert int((error > 3 / math.sqrt(DRAWS)).sum()) <= 1
    assert float(error.max()) <= 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize(("levels", "published"), [(1, 23.7), (4, 5.22), (255, 0.0026)])
def test_qsgds_error_is_below_its_papers_bound_and_as_measured_elsewhere(
    levels: int, published: float
) -> None:
    """Lemma 3.1, and the figures for a normal vector of 1,000 entries that are known."""
    tensor = vector(1000)
    errors = (drawn(Quantize(kind="qsgd", levels=levels), tensor, 200) - tensor).square().sum(1)
    relative = float(errors.mean() / tensor.square().sum())
    assert relative <= min(1000 / levels**2, math.sqrt(1000) / levels)
    assert relative == pytest.approx(published, rel=0.06)


def test_ternarys_error_is_what_its_probabilities_say() -> None:
    """``E ||Q(v) - v||^2 = max|v| ||v||_1 - ||v||^2``."""
    tensor = vector(1000)
    errors = (drawn(Quantize(kind="ternary"), tensor, 200) - tensor).square().sum(1)
    expected = tensor.abs().max() * tensor.abs().sum() - tensor.square().sum()
    assert float(errors.mean()) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_max_norm_moves_nothing_further_than_a_step(bits: int, rounding: Any) -> None:
    tensor = vector(500)
    defense = Quantize(bits=bits, rounding=rounding)
    step = tensor.abs().max() / defense.steps
    after = drawn(defense, tensor, 1)[0]
    assert (
        float((after - tensor).abs().max() / step) <= (0.5 if rounding == "nearest" else 1) + 1e-9
    )
    units = after / step
    assert (units - units.round()).abs().max() < 1e-6
    assert after.abs().max() == pytest.approx(float(tensor.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 3, 127, 255, 32767])
def test_what_lies_on_the_grid_stays(levels: int, dtype: torch.dtype) -> None:
    limit = torch.tensor(0.37, dtype=dtype)
    chance = stochastically(torch.Generator().manual_seed(1))
    once = on_grid(vector(400).to(dtype) / 8, limit, levels, chance)
    for rounding in (chance, nearest):
        assert torch.equal(on_grid(once, limit, levels, rounding), once)


@pytest.mark.parametrize("kind", ["max-norm", "qsgd", "ternary", "sign"])
def test_zeros_stay_zeros(kind: Any) -> None:
    before = {"a": torch.zeros(4, 3)}
    assert torch.equal(Quantize(kind=kind).transform_update(before, context())["a"], before["a"])


@pytest.mark.parametrize(
    ("scaled", "sign_of_zero", "expected"),
    [
        (False, 0, [1.0, -1.0, 0.0, 1.0]),
        (False, 1, [1.0, -1.0, 1.0, 1.0]),
        (True, 0, [1.5, -1.5, 0.0, 1.5]),
        (True, 1, [1.5, -1.5, 1.5, 1.5]),
    ],
)
def test_the_sign_of_zero_is_as_written(
    scaled: bool, sign_of_zero: Any, expected: list[float]
) -> None:
    before = {"a": torch.tensor([1.0, -2.0, 0.0, 3.0])}
    defense = Quantize(kind="sign", scaled=scaled, sign_of_zero=sign_of_zero)
    assert defense.transform_update(before, context())["a"].tolist() == expected


@pytest.mark.parametrize(
    ("defense", "bits", "scales"),
    [
        (Quantize(), 8, 2),
        (Quantize(bits=4), 4, 2),
        (Quantize(kind="qsgd", levels=255), 9, 2),
        (Quantize(kind="ternary"), 2, 2),
        (Quantize(kind="sign", sign_of_zero=1), 1, 2),
        (Quantize(kind="sign", sign_of_zero=1, scaled=False), 1, 0),
    ],
)
def test_the_auditor_is_told_the_bytes_of_a_code(defense: Defense, bits: int, scales: int) -> None:
    ctx = context()
    defense.transform_update({"a": vector(1000).float(), "b": vector(10).float()}, ctx)
    figures = ctx.effects["quantize"].figures
    assert figures["bytes_coded"] == (1010 * bits + 32 * scales) / 8
    assert figures["bytes_saved"] == 4040 - figures["bytes_coded"]


def test_the_chance_follows_the_secret_key_and_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    before, defense = {"a": vector(100)}, Quantize(bits=2)
    first = defense.transform_update(before, context())["a"]
    assert torch.equal(first, defense.transform_update(before, context())["a"])
    assert not torch.equal(first, defense.transform_update(before, context(round=2))["a"])
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "ff" * 32)
    assert not torch.equal(first, defense.transform_update(before, context())["a"])


def test_it_rounds_where_it_says_and_voids_the_bound_there() -> None:
    before, defense = {"a": vector(50)}, Quantize(at="gradient")
    assert defense.transform_update(before, context()) is before
    assert defense.transform_gradient(before, context()) is not before
    assert (defense.norm_bound("gradient", 1.0), defense.norm_bound("update", 1.0)) == (None, 1.0)
