"""CENSOR: orthogonal to the gradient, of its length, and the best of its trials."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from clients.defenses.aside import logits
from clients.defenses.perturbation.censor import Censor, orthogonal
from tests.clients.a_step import a_step, few_images, small_model
from tests.clients.one_update import context, eavesdrop, gradient, smooth_image


@pytest.mark.parametrize("size", [1e-3, 1.0, 424.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_component_along_the_gradient_whatever_its_length(
    size: float, dtype: torch.dtype
) -> None:
    """The released code's cosine is -0.81 at a length of 424."""
    g = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    g = g * size / g.norm()
    u = orthogonal(g, torch.Generator().manual_seed(2))
    assert abs(float(u.double().flatten() @ g.double().flatten())) < 1e-6 * size**2
    assert float(u.norm()) == pytest.approx(size, rel=1e-6)
    assert u.dtype == dtype


def test_every_layer_of_an_upload_is_orthogonal_and_of_the_gradients_length() -> None:
    model, batch = small_model(), few_images()
    before, ctx = a_step(model, batch)
    after = Censor(trials=3).transform_gradient(before, ctx)
    for name, g in before.items():
        u = after[name].double()
        norm = g.double().norm()
        assert abs(float((u * g).sum() / norm**2)) < 1e-6, name
        assert float(u.norm()) == pytest.approx(float(norm), rel=1e-6)


def test_it_is_the_best_of_its_trials_and_learns_nothing_at_first_order() -> None:
    model, batch = small_model(), few_images()
    before, ctx = a_step(model, batch)
    twenty = Censor(trial_lr=0.1)

    def loss(direction: dict[str, torch.Tensor]) -> float:
        moved = {n: p.detach() - 0.1 * direction[n] for n, p in model.named_parameters()}
        return float(cross_entropy(logits(model, batch[0], moved), batch[1]))

    generator = ctx.secret("censor", ctx.round, ctx.step)
    trials = [{n: orthogonal(g, generator) for n, g in before.items()} for _ in range(20)]
    losses = [loss(trial) for trial in trials]
    best = loss(twenty.transform_gradient(before, ctx))
    assert best == min(losses) < losses[0]
    assert loss(Censor(trial_lr=0.1, trials=1).transform_gradient(before, ctx)) == losses[0]
    figures = ctx.effects["censor"].figures
    assert figures["loss"] == pytest.approx(float(cross_entropy(model(batch[0]), batch[1])))
    plain = loss(before) - figures["loss"]
    assert plain < 0
    assert abs(best - figures["loss"]) < 0.1 * abs(plain)


@pytest.mark.parametrize("trials", [1, 20])
def test_a_step_costs_one_forward_pass_more_than_it_has_trials(trials: int) -> None:
    model, batch = small_model(), few_images()
    before, ctx = a_step(model, batch)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    Censor(trials=trials).transform_gradient(before, ctx)
    assert len(passes) == trials + 1


def test_one_entry_has_no_orthogonal_direction_and_zero_stays_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert orthogonal(torch.tensor([3.0]), generator) == 0
    assert torch.equal(orthogonal(torch.zeros(5), generator), torch.zeros(5))


def test_running_statistics_do_not_move() -> None:
    model, batch = small_model("convnet(width=8, stride=2, norm='batch')"), few_images()
    gradient, ctx = a_step(model, batch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Censor(trials=2).transform_gradient(gradient, ctx)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_the_ratio_attack_reads_noise() -> None:
    image = smooth_image()
    clean = gradient(image)
    generator = context().secret("censor")
    seen = eavesdrop({name: orthogonal(g, generator) for name, g in clean.items()}, clean, image)
    assert seen.best_row == pytest.approx(6.6, abs=1.0)
    assert seen.least_squares == pytest.approx(5.4, abs=1.0)
    assert abs(seen.cosine) < 1e-6


def test_without_a_step_it_says_so() -> None:
    with pytest.raises(ValueError, match="no step under way"):
        Censor().transform_gradient({}, context())
