"""Epsilon: the anchors of other accountants, and what composition may not change."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.accounting import (
    Release,
    epsilon,
    exceeds,
    gaussian_epsilon,
    gaussian_multiplier,
    merged,
    reconstruction_bound,
    renyi_epsilon,
    whole,
)

DELTA = 1e-5
# multiplier, rate, count; Renyi and privacy loss distributions at delta 1e-5
ANCHORS = [
    (1.1, 256 / 60_000, 14_062, 2.597, 2.382),
    (1.0, 0.1, 100, 7.904, 7.047),
    (10.0, 1.0, 100, 4.729, 4.377),
    (1.0, 1.0, 1, 4.729, 4.377),
    (0.8, 0.01, 1000, 3.696, 3.141),
]


@pytest.mark.parametrize(("multiplier", "rate", "count", "renyi", "pld"), ANCHORS)
def test_the_anchors(multiplier: float, rate: float, count: int, renyi: float, pld: float) -> None:
    releases = (Release(multiplier, rate, count),)
    assert renyi_epsilon(releases, DELTA) == pytest.approx(renyi, abs=2e-3)
    assert epsilon(releases, DELTA) == pytest.approx(pld, rel=2e-3)
    assert epsilon(releases, DELTA) >= pld - 1e-3  # never told too small


def test_layers_clipped_each_by_itself_cost_the_root_of_their_number() -> None:
    for layers, told in ((1, 0.60), (3, 1.12), (8, 2.01), (62, 11.4)):
        found = epsilon((Release(6 / math.sqrt(layers), 0.01, 10_000),), DELTA)
        assert found == pytest.approx(told, rel=0.01)


def test_another_accountant_agrees() -> None:
    """That of opacus, by privacy random variables: 7.057 and 2.392 where ours says 7.047, 2.382."""
    opacus = pytest.importorskip("opacus.accountants")
    for multiplier, rate, count in ((1.0, 0.1, 100), (0.8, 0.01, 1000)):
        theirs = opacus.PRVAccountant()
        theirs.history = [(multiplier, rate, count)]
        ours = epsilon((Release(multiplier, rate, count),), DELTA)
        assert ours == pytest.approx(theirs.get_epsilon(DELTA), abs=0.02)


def test_a_hundred_rounds_of_flowers_local_noise_are_not_what_they_are_called() -> None:
    textbook = math.sqrt(2 * math.log(1.25 / DELTA))
    assert epsilon((Release(textbook, 1.0, 100),), DELTA) == pytest.approx(10.4, abs=0.05)
    assert epsilon((Release(textbook / 2, 1.0, 100),), DELTA) == pytest.approx(25.4, abs=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 20), st.integers(1, 30)), min_size=1, max_size=5))
def test_unsampled_releases_are_one_mechanism(parts: list[tuple[float, int]]) -> None:
    releases = tuple(Release(z, 1.0, count) for z, count in parts)
    precision = sum(count / z**2 for z, count in parts)
    assert whole(releases) == pytest.approx(precision**-0.5)
    assert epsilon(releases, DELTA) == pytest.approx(gaussian_epsilon(precision**-0.5, DELTA))
    assert epsilon(releases[::-1] + releases[:0], DELTA) == pytest.approx(epsilon(releases, DELTA))


def test_noise_and_epsilon_are_each_others_inverse() -> None:
    for wanted in (0.1, 1.0, 8.0, 100.0):
        multiplier = gaussian_multiplier(wanted, DELTA)
        assert gaussian_epsilon(multiplier, DELTA) == pytest.approx(wanted, rel=1e-4)


def test_mixed_releases_cost_more_than_either_and_less_than_their_sum() -> None:
    drawn, every = (Release(1.0, 0.1, 20),), (Release(3.0, 1.0, 2),)
    both = epsilon(drawn + every, DELTA)
    assert max(epsilon(drawn, DELTA), epsilon(every, DELTA)) < both
    assert both < epsilon(drawn, DELTA) + epsilon(every, DELTA)


def test_nothing_released_costs_nothing_and_no_noise_everything() -> None:
    assert epsilon((), DELTA) == epsilon((Release(1.0, 0.0),), DELTA) == 0
    assert math.isinf(epsilon((Release(0.0),), DELTA))
    assert exceeds((Release(0.0),), DELTA, 1e9)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("multiplier", [1e-8, 1e-3, 3e-3, 1e300])
def test_next_to_no_noise_and_next_to_nothing_but_noise_have_an_epsilon(
    multiplier: float, rate: float
) -> None:
    releases = (Release(multiplier, rate, 100),)
    told = epsilon(releases, DELTA)
    assert 0 <= told <= renyi_epsilon(releases, DELTA) < math.inf
    assert exceeds(releases, DELTA, 8.0) == (multiplier < 1)
    if multiplier < 1e-3:  # at the least as many of the 100 as are drawn with probability delta
        assert told > 100 * rate / (2 * multiplier**2)


def test_noise_too_little_for_its_square_counts_as_none() -> None:
    for rate in (0.1, 1.0):
        assert math.isinf(epsilon((Release(1e-200, rate),), DELTA))


def test_what_needs_no_delta_adds_up_beside_the_rest() -> None:
    laplace, gaussian = Release(0.0, count=3, pure=2.0), Release(1.0, 0.1, 20)
    assert epsilon((laplace,), 0.0) == 6.0
    assert epsilon((laplace, gaussian), DELTA) == 6.0 + epsilon((gaussian,), DELTA)
    assert merged((laplace, laplace)) == (Release(0.0, 1.0, 6, 2.0),)
    assert exceeds((laplace,), DELTA, 5.9)
    assert not exceeds((laplace,), DELTA, 6.0)


def test_equal_releases_are_counted_together() -> None:
    one, other = Release(1.0, 0.5, 2), Release(2.0, 0.5, 1)
    assert merged((one, other, one)) == (Release(1.0, 0.5, 4), other)


@pytest.mark.parametrize("budget", [6.9, 7.0, 7.06, 7.5, 8.0])
def test_a_budget_is_held_against_the_tighter_bound(budget: float) -> None:
    releases = (Release(1.0, 0.1, 100),)
    assert exceeds(releases, DELTA, budget) == (epsilon(releases, DELTA) > budget)


@pytest.mark.parametrize(
    ("guess", "mu", "told"), [(0.1, 1, 0.389), (0.1, 0.1, 0.119), (0.1, 4, 0.997), (0.01, 1, 0.092)]
)
def test_the_anchors_of_reconstruction(guess: float, mu: float, told: float) -> None:
    assert reconstruction_bound((Release(1 / mu),), guess) == pytest.approx(told, abs=1e-3)
    four = (Release(2 / mu, count=4),)  # mu = sqrt(T) / multiplier
    assert reconstruction_bound(four, guess) == pytest.approx(told, abs=1e-3)


def test_sampling_everybody_almost_always_bounds_as_sampling_everybody() -> None:
    """The search over privacy loss distributions finds the closed form."""
    for mu in (0.1, 1.0, 4.0):
        sampled = reconstruction_bound((Release(1 / mu, rate=1 - 1e-9),), 0.1)
        assert sampled == pytest.approx(reconstruction_bound((Release(1 / mu),), 0.1), abs=1e-4)


def test_the_best_test_of_a_sampled_release_reaches_the_bound_and_does_not_pass_it() -> None:
    """Whether 1 was added to noise, half of the time: a threshold is the best test."""
    rate, multiplier, guess = 0.5, 1.0, 0.1
    bound = reconstruction_bound((Release(multiplier, rate),), guess)
    threshold = NormalDist(0, multiplier).inv_cdf(1 - guess)  # passed that often by noise alone
    passed = (1 - rate) * guess + rate * (1 - NormalDist(1, multiplier).cdf(threshold))
    assert passed <= bound <= passed + 2e-3


def test_what_a_guess_becomes_where_all_or_nothing_is_told() -> None:
    assert reconstruction_bound((), 0.1) == 0.1
    assert reconstruction_bound((Release(0.0),), 0.1) == 1.0
    assert reconstruction_bound((Release(1e-5, 0.1, 1000),), 0.1) == 1.0  # beyond what is composed
    twice = (Release(0.0, pure=math.log(2)),)
    assert reconstruction_bound(twice, 0.1) == pytest.approx(0.2)
    assert reconstruction_bound((*twice, Release(1.0)), 0.1) == pytest.approx(
        reconstruction_bound((Release(1.0),), 0.2)
    )
    assert reconstruction_bound((Release(0.0, pure=3.0),), 0.1) == 1.0
