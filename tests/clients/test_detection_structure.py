"""What construction leaves in a model's arrays, and what training does not."""

import pytest
import torch
from torch import Tensor, nn

from clients.defenses.detection.judged import LARGEST
from clients.defenses.detection.layers import unread
from clients.defenses.detection.structure import (
    Structure,
    alike,
    ladder,
    low_rank,
    parallel,
    structure,
)
from fedsim.data import DataSet, load_dataset
from fedsim.defense import Tensors
from fedsim.models import initial_model
from tests.clients.one_update import context

#: These checks read arrays alone.
BATCH_OF_NOTHING = torch.empty(0, 1, 1, 1), torch.empty(0, dtype=torch.int64)


def arrays(model: nn.Module) -> Tensors:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def tiles() -> DataSet:
    return load_dataset("photo-tiles")


def test_one_functional_for_all_rows_has_rank_one_and_nothing_but_duplicates() -> None:
    made = drawn(1, 1, 100).expand(64, -1).double() * torch.linspace(-1, 3, 64).unsqueeze(1)
    honest = drawn(2, 64, 100).double()
    assert parallel(made, draws()) == 1
    assert low_rank(made, draws()) == pytest.approx(1 - 1 / 64, abs=1e-6)
    assert parallel(honest, draws()) == 0
    assert low_rank(honest, draws()) < 0.3
    assert low_rank(torch.eye(64).double(), draws()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("at_once", [2**22, 2**16])
def test_copies_in_a_large_layer_have_no_place_to_hide(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a server puts them: the rows that are looked at are drawn in secret."""
    monkeypatch.setattr("clients.defenses.detection.structure.AT_ONCE", at_once)
    layer = drawn(7, 2048, 64).double()
    for odd in (slice(1, None, 2), slice(0, None, 2), slice(1024, None)):
        made = layer.clone()
        made[odd] = made[odd.start]
        assert parallel(made, draws()) == pytest.approx(0.5, abs=0.1)
    pairs = layer.clone()  # each row has one twin, which is hardly ever drawn with it
    pairs[1024:] = 3 * pairs[:1024]
    assert parallel(pairs, draws()) == 1
    assert parallel(layer, draws()) == 0


def test_what_structure_looks_at_is_drawn_from_the_secret_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = {"weight": drawn(7, 4096, 16)}
    large["weight"][:40] = 1.0
    scores = set()
    for key in ("11", "22", "33", "44"):
        monkeypatch.setenv("FEDSIM_SECRET_KEY", key * 32)
        verdict = Structure().inspect(nn.Identity(), large, BATCH_OF_NOTHING, context())
        scores.add(verdict.checks["structure/duplicate-rows"])
    assert len(scores) > 1


def test_what_is_no_number_is_seen() -> None:
    honest = {"weight": drawn(8, 64, 32), "bias": drawn(9, 64)}
    assert structure(honest, draws())["not-finite"] == 0
    for value in (-torch.inf, torch.nan):
        killed = {**honest, "bias": honest["bias"].clone()}
        killed["bias"][5] = value
        found = structure(killed, draws())
        assert found["not-finite"] == pytest.approx(1 / 64)
        assert found["huge-bias"] == LARGEST
        assert found["bias-ladder"] == pytest.approx(1 / 3, abs=0.15)
    hiding = {"weight": honest["weight"].clone(), "bias": 1e6 * honest["bias"]}
    hiding["weight"][5] = torch.inf  # would outweigh any bias
    assert structure(hiding, draws())["huge-bias"] > 1e3
    batch = torch.ones(2, 1, 4, 8), torch.zeros(2, dtype=torch.int64)
    verdict = Structure(not_finite=0.0).inspect(nn.Identity(), killed, batch, context())
    assert verdict.reason == "structure/not-finite above the limit"


def test_values_where_no_check_reads_are_named() -> None:
    flat = {
        "weight": drawn(8, 64, 32),
        "bias": drawn(9, 64),
        "steps": torch.tensor(3),
        "stored": drawn(10, 2048),
        "coded": torch.arange(9),
    }
    assert unread(flat) == ["stored (not read)", "coded (not read)"]
    verdict = Structure(zero_rows=0.1).inspect(nn.Identity(), flat, BATCH_OF_NOTHING, context())
    assert verdict.accept
    assert verdict.reason == "undecidable: stored (not read), coded (not read)"


@pytest.mark.parametrize("name", ["mlp", "lenet", "lenet5", "cnn", "convnet", "resnet20"])
def test_the_models_of_the_range_hide_nothing(name: str, tiles: DataSet) -> None:
    assert unread(arrays(initial_model(name, tiles.spec, 1))) == []


def test_drawn_biases_climb_by_chance_and_quantiles_evenly() -> None:
    uniform = torch.rand(512, generator=draws())
    for draw in (drawn(3, 512), uniform, drawn(4, 512).exp()):
        assert ladder(draw) == pytest.approx(1 / 3, abs=0.08)
    quantiles = torch.special.ndtri(torch.linspace(0, 1, 258)[1:-1])
    assert ladder(quantiles[torch.randperm(256, generator=draws())]) > 0.9
    assert torch.tensor(ladder(torch.zeros(64))).isnan()


def test_trap_weights_have_sums_alike() -> None:
    """Boenisch et al. 2023, Alg. 1, at their s for CIFAR-10."""
    size = drawn(5, 128, 1536).abs()
    traps = torch.cat([-size, 0.95 * size], dim=1)
    assert alike(traps.sum(dim=1)) > 20
    assert alike(drawn(6, 128, 3072).sum(dim=1)) < 1
