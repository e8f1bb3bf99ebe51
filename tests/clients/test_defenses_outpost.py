"""OUTPOST: how often, how much is pruned, and where the noise falls."""

import pytest
import torch

from clients.defenses.perturbation.outpost import Outpost
from tests.clients.a_step import a_step, few_images, small_model
from tests.clients.one_update import context


@pytest.mark.parametrize("step", [0, 8, 40])
def test_a_step_is_perturbed_with_the_probability_of_its_place(step: int) -> None:
    gradient, first = a_step(small_model(), few_images(1))
    defense, seen, tries = Outpost(), 0, 300
    for seed in range(tries):
        ctx = context(seed, step=step)
        ctx.trainee, ctx.batch = first.trainee, first.batch
        seen += (
            defense.transform_gradient({"fc.bias": gradient["fc.bias"]}, ctx)["fc.bias"]
            is not gradient["fc.bias"]
        )
    wanted = 1 / (1 + 0.125 * step)
    assert seen / tries == pytest.approx(wanted, abs=3.5 * (wanted * (1 - wanted) / tries) ** 0.5)


def test_it_is_not_a_no_op() -> None:
    """As the current reference is."""
    before, ctx = a_step(small_model(), few_images())
    after = Outpost().transform_gradient(before, ctx)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert ctx.effects["outpost"].figures["steps perturbed"] == 1


def test_that_share_is_pruned_and_noise_falls_on_the_largest_only() -> None:
    gradient = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    defense = Outpost(phi=10, prune=80)
    after = defense.perturbed(gradient, 0.5, torch.Generator().manual_seed(1))
    assert int((after != 0).sum()) == 80_000
    largest = gradient.abs().argsort(descending=True)
    noise = (after - gradient)[largest[:40_000]]
    # Of 40,000 draws a standard deviation is known to 0.35 %.
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(after[largest[40_000:80_000]], gradient[largest[40_000:80_000]])


def test_noise_also_stands_where_pruning_left_nothing() -> None:
    gradient = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    after = Outpost().perturbed(gradient, 0.5, torch.Generator().manual_seed(1))
    assert int((after != 0).sum()) == 400  # 200 kept, 400 noised


def test_the_noise_is_as_wide_as_the_layers_weights_vary() -> None:
    weights = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    assert Outpost().std(weights) == pytest.approx(0.8 * 0.25)
    assert Outpost(spread="root").std(weights) == pytest.approx((0.8 * 0.25) ** 0.5)
    assert Outpost().std(torch.nn.Parameter(100 * weights.detach())) == pytest.approx(0.8)
    assert Outpost().std(torch.nn.Parameter(torch.ones(1))) == 0


def test_a_clients_life_can_be_counted_through() -> None:
    defense, ctx = Outpost(count="run", beta=1), context()
    assert [defense.chance(ctx) for _ in range(3)] == [1, 1 / 2, 1 / 3]
    assert int(ctx.store["outpost.iterations"]) == 3
    assert Outpost(beta=1).chance(context(step=1)) == 1 / 2
