"""Matching is one to one, by error, over everything behind a view; an image counts once."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.audit.matching import best_matches, errors, match, private_set
from fedsim.audit.metrics import mse, psnr
from fedsim.audit.vault import VaultRecord


def pictures(count, seed=0, side=6):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def record(client, server_round, indices):
    images = torch.stack([pictures(1, seed=1000 * client + i)[0] for i in indices])
    labels = torch.tensor([i % 3 for i in indices])
    return VaultRecord(client, server_round, images, labels, torch.tensor(indices))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_no_other_one_to_one_matching_has_a_better_mean_psnr(candidates, truths, seed):
    a, b = pictures(candidates, seed), pictures(truths, seed + 1)
    rows, columns, error = match(a, b)
    small, large = sorted((candidates, truths))
    assert len(rows) == len(set(rows.tolist())) == len(set(columns.tolist())) == small
    likeness = torch.stack([psnr(a[i].expand_as(b), b) for i in range(candidates)])
    if candidates > truths:
        likeness = likeness.T
    best = max(
        sum(float(likeness[i, j]) for i, j in enumerate(order))
        for order in itertools.permutations(range(large), small)
    )
    assert float(-10 * error.log10().sum()) == pytest.approx(best, abs=1e-6)


def test_a_leak_is_not_given_away_to_spare_a_hopeless_pair():
    """Least total squared error would match the dark candidate to the bright image."""
    dark, bright = torch.full((1, 1, 8, 8), 0.2), torch.full((1, 1, 8, 8), 0.9)
    candidates = torch.cat([torch.zeros(1, 1, 8, 8), dark])
    rows, columns, error = match(candidates, torch.cat([dark, bright]))
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}
    assert float(error.sum()) > float(mse(dark, bright) + mse(candidates[:1], dark))


def test_errors_in_blocks_are_the_plain_mean_squared_errors():
    a, b = pictures(1030, 1, side=3), pictures(7, 2, side=3)
    slow = torch.stack([mse(a, image.expand_as(a)) for image in b], dim=1)
    assert torch.allclose(errors(a, b), slow, atol=1e-12)


def test_a_shuffled_set_finds_its_way_home():
    truths = pictures(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    rows, columns, _ = match(truths[order], truths)
    assert torch.equal(order[rows], columns)


def test_one_picture_returned_many_times_counts_for_one_image_only():
    truths = pictures(4)
    _, columns, error = match(truths[:1].expand(4, -1, -1, -1), truths)
    assert sorted(columns.tolist()) == [0, 1, 2, 3]
    assert int((error < 1e-12).sum()) == 1


def test_an_image_seen_in_two_rounds_is_one_image_with_its_best_match():
    behind = [[record(0, 1, [5, 6])], [record(0, 2, [6, 7])]]
    private = private_set(behind)
    assert private.indices.tolist() == [5, 6, 7]
    truth = private.images
    candidates = torch.stack([truth[0], 1 - truth[1], truth[1], 1 - truth[2]])
    chosen, source = best_matches(candidates, torch.tensor([0, 0, 1, 1]), private)
    assert chosen.tolist() == [0, 2, 3]
    assert source.tolist() == [0, 1, 1]


def test_an_aggregate_is_matched_against_all_its_senders():
    private = private_set([[record(0, 1, [0, 1]), record(1, 1, [0, 1])]])
    assert [(c, i) for c, i in zip(private.clients.tolist(), private.indices.tolist(), strict=True)]
    assert len(private) == 4
    chosen, _ = best_matches(private.images.flip(0), torch.zeros(4, dtype=torch.int64), private)
    assert chosen.tolist() == [3, 2, 1, 0]


def test_a_candidate_is_never_matched_to_another_views_images():
    private = private_set([[record(0, 1, [0])], [record(1, 1, [0])]])
    chosen, source = best_matches(private.images[1:], torch.tensor([0]), private)
    assert chosen.tolist() == [0, -1]
    assert source.tolist() == [0, -1]


def test_an_example_drawn_twice_in_a_batch_is_one_image():
    private = private_set([[record(0, 1, [4, 4, 2])]])
    assert private.indices.tolist() == [4, 2]
    assert [rows.tolist() for rows in private.behind] == [[0, 1]]


def test_without_candidates_or_images_nothing_is_matched():
    nothing = pictures(3)[:0]
    for a, b in ((nothing, pictures(2)), (pictures(2), nothing)):
        assert [len(x) for x in match(a, b)] == [0, 0, 0]
    with pytest.raises(ValueError, match="no private images"):
        private_set([[], []])


@pytest.mark.slow
def test_a_thousand_against_a_thousand_takes_seconds():
    truths = torch.rand(1000, 3, 64, 64)
    noisy = truths + 0.3 * torch.randn(truths.shape)
    order = torch.randperm(1000)
    started = time.perf_counter()
    rows, columns, _ = match(noisy[order], truths)
    assert torch.equal(order[rows], columns)
    assert time.perf_counter() - started < 60
