"""Negative twins tell who is next to whom, and images that were not read follow from them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.defenses.learning.giande import Giande
from fedsim.engines.inline import run_inline
from strategies.attacks.analytic.closed_form.unrolling import Unrolling, confirmed, unrolled
from tests.clients.test_defenses_mixup import SPEC, client
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import batch, tiles

MEAN = torch.tensor(SPEC.mean, dtype=torch.float64).view(-1, 1, 1)
EACH = MEAN.expand(SPEC.shape).flatten()


def joined(count: int, seed: int = 0) -> Tensor:
    """Return images and their twins, as the real defense makes them, around the mean."""
    images, labels = batch(tiles(), count, seed, torch.float64)
    both = Giande().transform_batch((images, labels % 10), client(count))[0]
    return (both - MEAN).flatten(1)


def shuffled(rows: Tensor, seed: int = 3) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def exact(found: Tensor, originals: Tensor) -> int:
    """Return how many originals came back to 1e-6 in every value."""
    near = torch.cdist(originals, found, p=torch.inf).min(dim=1).values
    return int((near < 1e-6).sum())


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_candidates_are_told_apart_in_any_order(count: int):
    both = joined(count)
    ring = unrolled(shuffled(both), 0.2, EACH)
    assert exact(ring.solved(), both[:count]) == count
    assert (len(ring.originals), len(ring.twins), ring.unused) == (count, count, [])


def test_the_equation_says_who_is_a_twin_of_whom():
    assert confirmed(joined(4), 0.2) == {4: (0, 1), 5: (1, 2), 6: (2, 3), 7: (3, 0)}
    assert confirmed(joined(4), 0.3) == {}


def test_one_original_and_all_twins_give_everything():
    both = joined(8)
    ring = unrolled(shuffled(torch.cat([both[:1], both[8:]])), 0.2, EACH)
    assert exact(ring.solved(), both[:8]) == 8


def test_errors_grow_on_the_way_round_until_the_ring_is_closed():
    both = joined(8)
    noise = 1e-6 * torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    ring = unrolled(torch.cat([both[:1], both[8:]]) + noise[:9], 0.2, EACH)
    errors = torch.cdist(both[:8], ring.solved()).min(dim=1).values / both.shape[1] ** 0.5
    assert errors.min() < 2e-6
    assert errors.max() > 1e-3
    ring = unrolled(both + noise, 0.2, EACH)
    assert (ring.solved() - both[:8]).abs().mean() < 2e-6


def test_all_twins_in_their_order_are_one_well_conditioned_system():
    both = joined(8)
    ring = unrolled(both, 0.2, EACH)
    ring.taken.clear()  # of whom is next to whom, keep the twins' part
    assert exact(ring.solved(), both[:8]) == 8
    noisy = both + 1e-5 * torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    ring.read = noisy
    assert (ring.solved() - both[:8]).abs().mean() < 2e-5


@pytest.mark.parametrize("lost", [[2], [2, 4, 12], [2, 3, 6], [5, 6, 14]])
def test_images_that_were_not_read_follow_and_others_are_left(lost: list[int]):
    """Candidates 0 to 7 are images, 8 to 15 their twins; one more is a mixture of two of them."""
    both = joined(8)
    kept = both[[at for at in range(16) if at not in lost]]
    mixture = 1.7 * both[2] - 0.7 * both[13]
    ring = unrolled(torch.cat([mixture[None], kept]), 0.2, EACH)
    assert exact(ring.solved(), both[:8]) == 8
    assert ring.unused == [0]


def test_an_image_without_the_twin_that_it_is_mixed_into_does_not_come_back():
    both = joined(8)
    ring = unrolled(both[[at for at in range(16) if at not in (2, 9)]], 0.2, EACH)
    assert exact(ring.solved(), both[:8]) == len(ring.originals) == 7
    assert ring.unused == [8]  # the twin of image 2, of which nothing else is known


def test_without_twins_everything_is_left():
    ring = unrolled(joined(8)[:8], 0.2, EACH)
    assert (ring.originals, ring.unused) == ([], list(range(8)))


def test_passive_readers_and_local_training_are_refused():
    with pytest.raises(ValueError, match="linear-inversion is not one"):
        Unrolling(then="linear-inversion")
    with pytest.raises(ValueError, match="sybil-sa-dp is not one"):
        Unrolling(then="sybil-sa-dp")
    with pytest.raises(ValueError, match=r"write robbing-the-fed\(clip=False\)"):
        Unrolling(then="robbing-the-fed(units=64)")
    with pytest.raises(ValueError, match=r"use federation\.local = 'fedsgd"):
        Unrolling().check(torch.nn.Linear(1, 1), "weights")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_in_a_federation_it_beats_the_reader_alone(seed: int, tmp_path: Path):
    leaked = {}
    for attack in ("robbing-the-fed(units=64)", Unrolling.toy.scenario["attack"]):
        asked = scenario(tmp_path, {**Unrolling.toy.scenario, "attack": attack, "seed": seed})
        report = json.loads((run_inline(asked, "a test").parent / "report.json").read_text())
        leaked[attack] = report["leak"]["exact"]
    alone, ours = leaked.values()
    print(f"seed {seed}: {leaked}")
    assert ours > 1.3 * alone
