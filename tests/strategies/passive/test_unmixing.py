"""Exact mixtures over rounds give the originals; what is not certain is not un-mixed."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clients.defenses.learning.mixing import drawn_weights, with_partners
from fedsim.attack import Setting
from fedsim.engines.inline import run_inline
from fedsim.threat import TrainingDetails
from strategies.attacks.analytic.closed_form.unmixing import (
    Law,
    Unmixed,
    Unmixing,
    sparse_columns,
    unmixed,
    verified,
)
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import batch, tiles

SMALL = {
    "threat-model": "C",
    "defenses": "mixup(k=2)",
    "data.partition": "size(partition_sizes=[6, 6])",
    "federation.clients": 2,
    "federation.rounds": 30,
    "federation.local": "fedsgd(batch_size=1, lr=0.01)",
    "model.name": "mlp",
}


def mixing(images: int, k: int, mixtures: int, seed: int = 0) -> Tensor:
    """Return MixUp's weights ``[mixtures, images]``."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(images, (mixtures,), generator=generator)
    partners = with_partners(own, images, k, generator).view(mixtures, k)
    weights = drawn_weights(mixtures, k, 0.65, "dirichlet", generator)
    return torch.zeros(mixtures, images, dtype=torch.float64).scatter_(1, partners, weights)


def held(images: int, seed: int = 0) -> Tensor:
    return batch(tiles(), images, seed, torch.float64)[0].flatten(1)


def solved(
    weights: Tensor, originals: Tensor, labels: Tensor, k: int, noise: float = 0.0
) -> Unmixed | None:
    generator = torch.Generator().manual_seed(1)
    mixtures = weights @ originals
    mixtures = mixtures + noise * torch.randn(
        mixtures.shape, generator=generator, dtype=torch.float64
    )
    soft = weights @ one_hot(labels, 10).double()
    return unmixed(mixtures, soft, Law(k, 0.65, 1e-3), generator)


def farthest(found: Unmixed | None, originals: Tensor) -> float:
    """Return the largest error of any pixel, over all originals."""
    assert found is not None
    assert found.originals.shape == originals.shape
    nearest = torch.cdist(originals, found.originals).argmin(dim=1)
    assert len(nearest.unique()) == len(originals)
    return float((found.originals[nearest] - originals).abs().max())


def test_at_the_truth_the_residual_is_zero_and_the_originals_come_back():
    weights, originals = mixing(8, 4, 24), held(8)
    found = verified(weights @ originals, weights, Law(4, 0.65, 1e-3), "the truth")
    assert found is not None
    assert found.residual < 1e-12
    assert farthest(found, originals) < 1e-5


def test_wrong_weights_are_not_verified():
    weights, originals = mixing(8, 4, 24), held(8)
    mixtures = weights @ originals
    assert verified(mixtures, weights.roll(1, dims=0), Law(4, 0.65, 1e-3), "others'") is None
    assert verified(mixtures, weights, Law(3, 0.65, 1e-3), "too many in one") is None
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert verified(mixtures, weights @ turned, Law(4, 0.65, 1e-3), "the same span") is None


@pytest.mark.parametrize(("images", "k", "mixtures"), [(4, 2, 24), (8, 2, 32), (8, 4, 48)])
@pytest.mark.parametrize("seed", range(3))
def test_mixtures_alone_give_the_originals(images: int, k: int, mixtures: int, seed: int):
    """All of one class: labels say nothing."""
    originals = held(images, seed)
    labels = torch.zeros(images, dtype=torch.int64)
    found = solved(mixing(images, k, mixtures, seed), originals, labels, k)
    assert farthest(found, originals) < 1e-5
    assert found is not None
    assert found.by == "which mixtures they are not in"


def test_classes_of_their_own_tell_also_where_every_image_is_in_every_mixture():
    weights, originals = mixing(4, 4, 8), held(4)
    found = solved(weights, originals, torch.tensor([7, 2, 0, 5]), 4)
    assert farthest(found, originals) < 1e-5
    assert found is not None
    assert found.by == "their classes"


@pytest.mark.parametrize(
    ("images", "k", "mixtures", "noise"),
    [
        pytest.param(4, 4, 64, 0.0, id="every image in every mixture"),
        pytest.param(8, 2, 8, 0.0, id="no more mixtures than images"),
        pytest.param(8, 2, 48, 1e-2, id="noise"),
    ],
)
def test_what_is_not_certain_is_not_unmixed(images: int, k: int, mixtures: int, noise: float):
    labels = torch.zeros(images, dtype=torch.int64)
    assert solved(mixing(images, k, mixtures), held(images), labels, k, noise) is None


@pytest.mark.parametrize("partners", [[0], [0, 0]])
def test_a_mixture_is_not_taken_for_an_image_always_mixed_with_the_same_other(partners: list[int]):
    extra = torch.zeros(len(partners), 7, dtype=torch.float64)
    extra[:, 6] = torch.linspace(0.4, 0.6, len(partners))
    extra[range(len(partners)), partners] = 1 - extra[:, 6]
    others = torch.cat([mixing(6, 2, 40), torch.zeros(40, 1, dtype=torch.float64)], dim=1)
    labels = torch.zeros(7, dtype=torch.int64)
    assert farthest(solved(others, held(7), labels, 2), held(7)[:6]) < 1e-5
    assert solved(torch.cat([others, extra]), held(7), labels, 2) is None


def test_columns_have_the_zeros_of_the_weights():
    weights = mixing(6, 2, 30)
    basis = torch.linalg.svd(weights @ held(6), full_matrices=False)[0][:, :6]
    columns = sparse_columns(basis, 1e-3, torch.Generator().manual_seed(0))
    assert columns is not None
    likeness = (columns / columns.norm(dim=0)).T @ (weights / weights.norm(dim=0))
    assert torch.allclose(likeness.max(dim=1).values, torch.ones(6, dtype=torch.float64))


def test_active_readers_and_local_training_are_refused():
    with pytest.raises(ValueError, match="must be passive"):
        Unmixing(then="robbing-the-fed")
    assert Unmixing(then="linear-inversion").inner.clip  # mixtures without signs stay in [0, 1]
    with pytest.raises(ValueError, match=r"write linear-inversion\(clip=False\)"):
        Unmixing(then="linear-inversion", signs=True)
    with pytest.raises(ValueError, match=r"use federation\.local = 'fedsgd"):
        Unmixing().check(torch.nn.Linear(1, 1), "weights")
    training = TrainingDetails("gradient", 0.1, 2, 1, 0.0, 0.0)
    setting = Setting(torch.nn.Linear(1, 1), 1, 9, (8,), training, "frozen", channel=None)
    with pytest.raises(ValueError, match="gradients of 2; use"):
        Unmixing().check_setting(setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "k", "mixtures"),
    [
        (n, k, m * n)
        for n, k in ((4, 2), (8, 2), (16, 2), (8, 4), (16, 4), (8, 6))
        for m in (2, 4, 8)
    ],
)
def test_how_many_mixtures_it_takes_and_that_none_is_unmixed_wrongly(
    images: int, k: int, mixtures: int
):
    whole = 0
    for seed in range(10):
        originals, labels = held(images, seed), torch.zeros(images, dtype=torch.int64)
        weights = mixing(images, k, mixtures, seed)
        found = solved(weights, originals, labels, k, 1e-7)
        if found is not None:
            whole += 1
            assert farthest(found, originals[weights.any(dim=0)]) < 1e-4
    print(f"{images} images, k = {k}, {mixtures} mixtures: {whole} of 10")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_in_a_federation_it_beats_the_reader_alone(seed: int, tmp_path: Path):
    psnr = {}
    for attack in ("linear-inversion", "unmixing(k=2)"):
        asked = scenario(tmp_path, {**SMALL, "attack": attack, "seed": seed})
        report = json.loads((run_inline(asked, "a test").parent / "report.json").read_text())
        psnr[attack] = report["leak"]["psnr"]["mean"]
    print(f"seed {seed}: {psnr}")
    assert psnr["linear-inversion"] < 30
    assert psnr["unmixing(k=2)"] > 100
