"""DPFL: noise of its own for every entry, scaled by layer; an epsilon only where there is one."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from clients.defenses.perturbation.dpfl import DPFL, laplace, positive_shares
from fedsim import seeds
from fedsim.defense import ClientContext, Tensors, TrainingPlan
from tests.clients.one_update import context

FEDSGD = TrainingPlan("gradient", 0.1, 1, 1, 1, 3)
FEDAVG = TrainingPlan("weights", 0.1, 1, 5, 5, 3)


def trained(seed: int = 0) -> tuple[ClientContext, Tensors]:
    """A client that has a model, a batch and zeros as an update."""
    with seeds.seeded_globals(seed):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU())
        model.append(nn.Linear(64, 10))
        images = torch.rand(8, 3, 8, 8)
    ctx = context()
    ctx.trainee, ctx.batch = model, (images, torch.arange(8))
    return ctx, {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def test_shares_sum_to_one_and_scales_are_the_papers() -> None:
    ctx, update = trained()
    defense = DPFL()
    scales = defense.scales(update, 1.0, ctx)
    assert ctx.trainee is not None
    assert ctx.batch is not None
    active = positive_shares(ctx.trainee, ctx.batch[0])
    for name, scale in scales.items():
        share = active[name.rpartition(".")[0]] / sum(active.values())
        assert scale == pytest.approx(2 * 1.0 / (10.0 * share))
    # the budgets 2 / scale_l of the three layers sum to epsilon
    assert sum(2 / scales[f"{layer}.weight"] for layer in (1, 2, 4)) == pytest.approx(10.0)


def test_noise_is_independent_between_entries_and_biases_get_it_too() -> None:
    """Differences of neighbors have standard deviation ``sqrt 2 sqrt 2 scale``, not zero."""
    ctx, update = trained()
    after = DPFL().transform_update(update, ctx)
    scales = DPFL().scales(update, 1.0, ctx)
    flat = after["1.weight"].flatten().double()
    differences = flat[1::2] - flat[::2]
    assert float(differences.std()) == pytest.approx(2 * scales["1.weight"], rel=0.05)
    assert float(flat.std()) == pytest.approx(math.sqrt(2) * scales["1.weight"], rel=0.05)
    for name, tensor in after.items():
        assert len(set(tensor.flatten().tolist())) == tensor.numel(), name


def test_laplace_has_its_moments() -> None:
    noise = laplace(torch.zeros(200_000), torch.Generator().manual_seed(3)).double()
    assert abs(float(noise.mean())) < 4 * math.sqrt(2 / 200_000)
    assert float(noise.var()) == pytest.approx(2, rel=0.02)
    assert float(noise.abs().mean()) == pytest.approx(1, rel=0.02)


def test_entries_are_clamped_first() -> None:
    ctx, update = trained()
    wild = {name: tensor + 1e6 for name, tensor in update.items()}
    assert all(
        torch.equal(DPFL().transform_update(wild, ctx)[name], 1.0 + tensor)
        for name, tensor in DPFL().transform_update(update, ctx).items()
    )
    assert ctx.effects["dpfl"].figures["share_clamped"] in (0.0, 1.0)
    assert [DPFL().limit(plan) for plan in (FEDSGD, FEDAVG)] == pytest.approx([1.0, 0.5])


def test_what_is_not_finite_is_within_the_clamp_too() -> None:
    ctx, update = trained()
    wild = {name: tensor.clone() for name, tensor in update.items()}
    wild["1.bias"][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    defense = DPFL(sensitivity="vector", activity="public")
    noise = defense.transform_update(update, ctx)
    sent = defense.transform_update(wild, ctx)
    assert torch.allclose(sent["1.bias"][:3], noise["1.bias"][:3] + torch.tensor([0.0, 1.0, -1.0]))
    assert all(torch.equal(sent[n][3:], noise[n][3:]) for n in sent)


def test_the_noise_follows_the_secret_key(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, update = trained()
    first = DPFL().transform_update(update, ctx)["1.weight"]
    assert torch.equal(first, DPFL().transform_update(update, ctx)["1.weight"])
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "ff" * 32)
    assert not torch.equal(first, DPFL().transform_update(update, ctx)["1.weight"])


def test_looking_at_activity_moves_no_statistics() -> None:
    ctx, update = trained()
    assert ctx.trainee is not None
    before = {name: tensor.clone() for name, tensor in ctx.trainee.state_dict().items()}
    DPFL().transform_update(update, ctx)
    after = ctx.trainee.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ctx.trainee.training


def test_public_activity_knows_nothing_of_the_images() -> None:
    defense = DPFL(activity="public")
    scales = []
    for batch in (torch.rand(8, 3, 8, 8), torch.zeros(1, 3, 8, 8)):
        ctx, update = trained()
        ctx.batch = (batch, torch.zeros(len(batch), dtype=torch.int64))
        scales.append(defense.scales(update, 1.0, ctx))
    assert scales[0] == scales[1]


def test_a_model_with_statistics_of_its_own_is_not_public() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    for batchnorm in ("shared", "private"):
        setting: Any = SimpleNamespace(model=model, batchnorm=batchnorm)
        DPFL().check_setting(setting)
        with pytest.raises(ValueError, match="frozen"):
            DPFL(activity="public").check_setting(setting)
    DPFL(activity="public").check_setting(
        cast(Any, SimpleNamespace(model=model, batchnorm="frozen"))
    )


def test_an_epsilon_is_told_only_where_the_sensitivity_is_enforced() -> None:
    assert DPFL().privacy(FEDSGD, {}) is None
    assert DPFL(sensitivity="vector").privacy(FEDSGD, {}) is None
    assert DPFL(activity="public").privacy(FEDSGD, {}) is None
    whole = DPFL(sensitivity="vector", activity="public")
    assert whole.privacy(FEDAVG, {}) is None  # its model has seen private images
    told = whole.privacy(FEDSGD, {})
    assert told is not None
    assert (told.epsilon, told.delta, told.unit) == (30.0, 0.0, "client")


def test_for_whole_vectors_the_losses_of_all_entries_add_up_to_epsilon() -> None:
    ctx, update = trained()
    scales = DPFL(sensitivity="vector").scales(update, 1.0, ctx)
    assert sum(2 * t.numel() / scales[name] for name, t in update.items()) == pytest.approx(10.0)
    published = DPFL().scales(update, 1.0, ctx)
    spent = sum(2 * t.numel() / published[name] for name, t in update.items())
    assert spent > 10.0 * 64  # as published it is a guarantee of that epsilon, not of 10
