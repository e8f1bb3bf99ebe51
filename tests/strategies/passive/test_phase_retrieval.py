"""Sizes of mixtures give the images; which sign neighbors have is told by votes and by range."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clients.defenses.learning.instahide import InstaHide
from fedsim.engines.inline import run_inline
from strategies.attacks.analytic.closed_form.phase_retrieval import (
    originals_behind,
    retrieved,
    signs_by_neighbors,
    span_of_weights,
)
from strategies.attacks.analytic.closed_form.unmixing import Law, Unmixed, unmixed_sizes
from tests.clients.test_defenses_mixup import SPEC, client, encoded
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import batch, cifar10, tiles
from tests.strategies.passive.test_unmixing import farthest, mixing

MEAN = torch.tensor(SPEC.mean, dtype=torch.float64).view(-1, 1, 1)
COLLIDING = torch.tensor([3, 3, 3, 3, 3, 0, 0, 0])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_signs(*shape: int) -> Tensor:
    return drawn(*shape, seed=5).sign()


def products_span(weights: Tensor) -> Tensor:
    """Return an orthonormal basis of all products of two columns."""
    pairs = itertools.combinations_with_replacement(weights.T, 2)
    return torch.linalg.qr(torch.stack([one * other for one, other in pairs], dim=1)).Q


def images(count: int, seed: int = 0) -> Tensor:
    return batch(tiles(), count, seed, torch.float64)[0]


def encodings(held: Tensor, labels: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return what InstaHide makes of these images, around the mean, and the soft labels."""
    clients = [client(len(held), round=1 + past) for past in range(rounds)]
    made = [encoded(InstaHide(), held, labels, each) for each in clients]
    return torch.cat([one[0] for one in made]) - MEAN, torch.cat([one[1] for one in made])


def solved(held: Tensor, labels: Tensor, rounds: int, noise: float = 0.0) -> Unmixed | None:
    seen, soft = encodings(held, labels, rounds)
    seen = seen + noise * drawn(*seen.shape)
    law = Law(4, 0.65, 1e-3)
    return unmixed_sizes(seen, MEAN, soft, law, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("originals", "mixtures"), [(2, 3), (4, 10), (8, 36), (8, 48)])
def test_sizes_and_weights_give_every_value_up_to_a_sign(originals: int, mixtures: int):
    weights, values = drawn(mixtures, originals), drawn(originals, 100, seed=1)
    found = retrieved((weights @ values).abs(), weights)
    assert torch.minimum((found - values).norm(dim=0), (found + values).norm(dim=0)).max() < 1e-7


def test_how_many_images_a_number_of_products_is_of():
    assert [originals_behind(count) for count in (3, 10, 36, 136)] == [2, 4, 8, 16]
    assert [originals_behind(count) for count in (2, 8, 35, 37)] == [None] * 4


@pytest.mark.parametrize(
    ("mixtures", "found"),
    [
        pytest.param(64, True, id="two classes, n (n - 1) / 2 mixtures more than products"),
        pytest.param(63, False, id="one fewer"),
    ],
)
def test_the_span_of_the_weights_is_in_that_of_their_products(mixtures: int, found: bool):
    weights = mixing(8, 4, mixtures)
    labels = weights @ one_hot(COLLIDING, 10).double()
    basis = span_of_weights(products_span(weights), labels[:, [0, 3]], 8)
    assert (basis is not None) == found
    if basis is not None:
        assert (basis @ torch.linalg.lstsq(basis, weights).solution - weights).abs().max() < 1e-9


def test_one_class_tells_no_span_and_mixtures_of_two_none_between_images_of_one_class():
    pairs = mixing(8, 2, 300)
    labels = pairs @ one_hot(COLLIDING, 10).double()
    assert span_of_weights(products_span(pairs), labels[:, [0, 3]], 8) is None
    labels = pairs @ one_hot(torch.arange(8), 10).double()
    assert span_of_weights(products_span(pairs), labels[:, :8], 8) is not None
    weights = mixing(8, 4, 96)
    assert span_of_weights(products_span(weights), weights.sum(dim=1, keepdim=True), 8) is None


def test_neighbors_tell_the_signs_of_eight_photographs():
    values = images(8) - MEAN
    signs = random_signs(3, 32, 32)
    assert torch.equal(signs_by_neighbors(signs * values, MEAN), signs)


def test_a_value_that_would_leave_the_range_decides_against_all_its_neighbors():
    """Two plain images; the second is bright in a corner, which tells the signs around it."""
    mean = torch.full((1, 1, 1), 0.4, dtype=torch.float64)
    pair = torch.tensor([0.3, 0.6], dtype=torch.float64).view(2, 1, 1, 1).repeat(1, 1, 5, 5)
    pair[1, 0, 0, 0] = 0.95
    pair[:, 0, 2, 2] = torch.tensor([0.95, 0.25])  # as unlike its neighbors as can be
    signs = random_signs(1, 5, 5)
    assert torch.equal(signs_by_neighbors(signs * (pair - mean), mean), signs)
    pair[0, 0, 2, 2] = 0.5  # the same, and within the range either way: turned
    wrong = signs_by_neighbors(signs * (pair - mean), mean) != signs
    assert wrong.nonzero().tolist() == [[0, 2, 2]]


@pytest.mark.parametrize("labels", [COLLIDING, torch.arange(8)], ids=["colliding", "their own"])
def test_encodings_of_the_real_defense_give_the_images(labels: Tensor):
    held = images(8)
    found = solved(held, labels, 8)
    assert farthest(found, held.flatten(1)) < 1e-6
    assert found is not None
    assert found.residual < 1e-9


@pytest.mark.parametrize(
    ("labels", "rounds", "noise"),
    [
        pytest.param(torch.zeros(8, dtype=torch.int64), 8, 0.0, id="one class"),
        pytest.param(COLLIDING, 4, 0.0, id="fewer encodings than products"),
        pytest.param(COLLIDING, 8, 1e-2, id="noise"),
    ],
)
def test_what_is_not_certain_is_not_unmixed(labels: Tensor, rounds: int, noise: float):
    assert solved(images(8), labels, rounds, noise) is None


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 6, 8, 12])
def test_how_many_images_it_takes_to_vote_on_signs(count: int):
    right = {"tiles": 0, "cifar10": 0}
    for name, split in (("tiles", tiles()), ("cifar10", cifar10())):
        for seed in range(20):
            values = batch(split, count, seed, torch.float64)[0] - MEAN
            signs = random_signs(3, 32, 32)
            turned = signs_by_neighbors(signs * values, MEAN) * signs < 0
            right[name] += int((values[:, turned].abs() < 1e-2).all())
    print(f"{count} images: every value over 0.01 with its sign in {right} of 20 each")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, 6, 8, 12])
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_how_many_encodings_it_takes_and_that_none_is_unmixed_wrongly(rounds: int, classes: int):
    whole = 0
    for seed in range(10):
        held = images(8, seed)
        found = solved(held, torch.arange(8) % classes, rounds, 1e-7)
        if found is not None:
            whole += 1
            assert farthest(found, held.flatten(1)) < 1e-4
    print(f"{8 * rounds} encodings of 8 images of {classes} classes: {whole} of 10")


@pytest.mark.slow
def test_in_a_federation_it_beats_the_reader_alone(tmp_path: Path):
    psnr = {}
    for attack in ("linear-inversion", "unmixing(k=4, signs=True)"):
        changes = {
            "threat-model": "C",
            "attack": attack,
            "defenses": "instahide(k=4)",
            "data.dataset": "photo-tiles",
            "data.partition": "size(partition_sizes=[8])",
            "model.name": "mlp",
            "federation.clients": 1,
            "federation.rounds": 64,
            "federation.local": "fedsgd(batch_size=1, lr=0.01)",
        }
        report = run_inline(scenario(tmp_path, changes), "a test").parent / "report.json"
        psnr[attack] = json.loads(report.read_text())["leak"]["psnr"]["mean"]
    print(psnr)
    assert psnr["linear-inversion"] < 20
    assert psnr["unmixing(k=4, signs=True)"] > 100
