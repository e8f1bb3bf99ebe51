"""Rates, intervals, label accuracy and the floor are what they claim to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedsim.attack import Reconstruction
from fedsim.audit.criterion import parse_criterion
from fedsim.audit.floor import floor
from fedsim.audit.leak import label_accuracy, score, wilson
from fedsim.audit.matching import private_set
from fedsim.audit.vault import VaultRecord
from fedsim.data import load_dataset, split_test

CRITERION = parse_criterion("psnr>=20")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts):
    reference = binomtest(*counts).proportion_ci(0.95, "wilson")
    assert wilson(*counts) == pytest.approx((reference.low, reference.high), abs=1e-12)


def digits(rows, client=0):
    images, labels = load_dataset("digits").train.batch(torch.tensor(rows))
    return VaultRecord(client, 1, images, labels, torch.tensor(rows))


def test_unmatched_images_count_as_not_leaked():
    private = private_set([[digits([0, 1, 2, 3])]])
    scores = score(private.images[:1], torch.tensor([0]), private, CRITERION)
    assert scores.leaked.tolist() == [True, False, False, False]
    assert scores.matched.tolist() == [True, False, False, False]
    assert scores.rate_at(0) == 0.25


@pytest.mark.parametrize(
    ("found", "accuracy"),
    [
        ([0, 1, 2, 3], 1.0),
        ([3, 2, 1, 0], 1.0),
        ([0, 0, 0, 0], 0.25),
        ([9, 9, 9, 9], 0.0),
        ([0, 1, 2, 9], 0.75),
        ([0, 1, 2, 3] * 4, 0.0),
    ],
)
def test_label_accuracy_compares_counts_not_order(found, accuracy):
    """``1 - sum |n_found - n_true| / 2B``, never below zero however many are guessed."""
    truth = VaultRecord(0, 1, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    count = len(found)
    guess = Reconstruction(
        torch.rand(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64), torch.tensor(found)
    )
    assert label_accuracy(guess, private_set([[truth]])) == (accuracy, None)


def test_no_labels_give_no_label_accuracy_and_a_reason():
    guess = Reconstruction(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    value, reason = label_accuracy(guess, private_set([[digits([0, 1])]]))
    assert value is None
    assert "no labels" in reason


def digits_floor(criterion=CRITERION, seed=7):
    private = private_set([[digits([5, 50, 500, 700], 0)], [digits([7, 70, 71, 72], 1)]])
    surrogate = split_test(load_dataset("digits").test, seed)[0]
    images, _ = surrogate.batch(torch.arange(len(surrogate)))
    views = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    return floor(images, views, private, criterion, seed)


def test_the_floor_has_three_guesses_best_first_and_repeats_by_seed():
    guesses = digits_floor()
    assert {g.name for g in guesses} == {
        "mean surrogate image",
        "random surrogate images",
        "uniform noise",
    }
    rank = [(g.scores.leaked_count, g.scores.mean_psnr) for g in guesses]
    assert rank == sorted(rank, reverse=True)
    assert [g.scores.mean_psnr for g in digits_floor()] == [g.scores.mean_psnr for g in guesses]


def test_noise_is_never_the_best_guess_about_digits():
    guesses = digits_floor()
    assert guesses[-1].name == "uniform noise"
    assert 5 < guesses[-1].scores.mean_psnr < guesses[0].scores.mean_psnr < 20


def test_a_criterion_that_any_guess_meets_shows_in_the_floor():
    guesses = digits_floor(parse_criterion("psnr>=1"))
    assert all(g.scores.leaked_count == 8 for g in guesses)
