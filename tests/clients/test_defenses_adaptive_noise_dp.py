"""Adaptive noise: the norm follows the client, noised; the ledger adds up what each round cost."""

import math

import pytest
import torch

from clients.defenses.formal.adaptive_noise_dp import AdaptiveNoiseDP
from clients.defenses.perturbation.clip import global_norm
from clients.ledger import released
from fedsim.accounting import gaussian_epsilon, whole
from fedsim.defense import TrainingPlan, guarantees
from tests.clients.one_update import context

SIZE = 100_000


def test_the_ledger_is_the_sum_of_what_each_round_released() -> None:
    defense, ctx = AdaptiveNoiseDP(sigma=3.0, decay=0.8, least=1.0, norm_sigma=7.0), context()
    sizes = []
    for server_round in range(1, 9):
        ctx.round = server_round
        bound = defense.bound(ctx)
        noise = defense.transform_update({"a": torch.zeros(SIZE)}, ctx)["a"]
        sizes.append(float(noise.std()) / (2 * bound))
    schedule = [max(3.0 * 0.8**t, 1.0) for t in range(8)]
    assert sizes == pytest.approx(schedule, rel=0.02)
    mu = sum(1 / z**2 for z in schedule) + 8 / 7.0**2
    assert whole(released(ctx, defense.name)) ** -2 == pytest.approx(mu)
    said = guarantees((defense,), TrainingPlan("gradient", 0.1, 8, 64, 1, 8))[defense.name]
    assert said.epsilon == pytest.approx(gaussian_epsilon(mu**-0.5, 1e-5))


def test_the_clipping_norm_follows_the_updates() -> None:
    for start in (0.5, 20.0):
        defense, ctx = AdaptiveNoiseDP(norm=start, norm_sigma=1e-3, sigma=50.0), context()
        for server_round in range(1, 60):
            ctx.round = server_round
            defense.transform_update({"a": torch.full((100,), 0.1)}, ctx)
        assert defense.bound(ctx) == pytest.approx(1.25, rel=0.01)


def test_it_moves_by_no_more_than_a_factor_of_two_whatever_the_noise() -> None:
    defense, ctx = AdaptiveNoiseDP(norm_sigma=100.0), context()
    for server_round in range(1, 20):
        ctx.round = server_round
        before = defense.bound(ctx)
        defense.transform_update({"a": torch.ones(10)}, ctx)
        assert before / 2.001 <= defense.bound(ctx) <= 2.001 * before


def next_norm(defense: AdaptiveNoiseDP, update: torch.Tensor, seed: int = 0) -> float:
    ctx = context(seed)
    defense.transform_update({"a": update}, ctx)
    return defense.bound(ctx)


def test_the_norm_that_the_client_remembers_is_noised() -> None:
    """Over 2,000 secrets, at steps far below the factor of two that ends them."""
    defense = AdaptiveNoiseDP(norm=3.0, rate=0.02, headroom=1.5, norm_sigma=2.0)
    moved = [math.log(next_norm(defense, torch.zeros(4), seed) / 3.0) for seed in range(2000)]
    spread = 0.02 * 1.5 * 2.0
    assert float(torch.tensor(moved).std()) == pytest.approx(spread, rel=0.07)  # 4 std. errors
    assert sum(moved) / 2000 == pytest.approx(-0.02, abs=4 * spread / 2000**0.5)


def test_the_norm_that_it_remembers_is_of_the_clipped_update() -> None:
    """Its sensitivity is C: an update of a million times that moves it as one of C does."""
    defense = AdaptiveNoiseDP(norm=3.0, rate=0.01)
    one = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert next_norm(defense, 1e6 * one) == pytest.approx(next_norm(defense, one), rel=1e-6)
    assert next_norm(defense, one) != pytest.approx(next_norm(defense, one / 2), rel=1e-6)


def test_no_upload_is_longer_than_its_norm_before_the_noise() -> None:
    update = {"a": torch.full((100,), 5.0)}
    sent = AdaptiveNoiseDP(norm=2.0, sigma=1e-6, least=1e-9).transform_update(update, context())
    assert global_norm(sent) == pytest.approx(2.0, rel=1e-3)


def test_the_schedule_is_of_the_clients_own_count_and_not_the_servers() -> None:
    defense, ctx = AdaptiveNoiseDP(decay=0.5, least=0.1, sigma=1.0), context(round=1)
    for _ in range(3):  # a server that always says it is round 1
        defense.transform_update({"a": torch.ones(4)}, ctx)
    first, second, third = sorted(
        (r.multiplier for r in released(ctx, defense.name) if r.multiplier <= 1), reverse=True
    )
    assert (first, second, third) == (1.0, 0.5, 0.25)
    assert math.isclose(defense._multiplier(50), 0.1)
