"""Mjölnir: the chain, the step that fits, and what denoising gradients is worth."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fedsim.attack import Setting
from fedsim.data import load_dataset, split_test
from fedsim.errors import NotGranted, ScenarioError
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.augmented.gradient_diffusion import (
    BETAS,
    KEPT,
    STEPS,
    GradientDiffusion,
    UNet,
    matching_step,
    normal_v,
)
from strategies.attacks.optimization.augmented.mjolnir import Mjolnir, with_gradient
from strategies.attacks.optimization.surrogate_gradients import by_model
from tests.strategies.passive.honest import Honest, batch, floor_psnr, psnr, spec

INVERT = "inverting-gradients(iterations=200, tv=1e-2)"


def setup(data="digits", network="convnet(width=8)"):
    """Return private and surrogate examples, and a client."""
    dataset = load_dataset(data)
    return dataset.train, split_test(dataset.test, 7)[0], Honest(network, dataset.spec, seed=7)


def flat(view):
    return torch.cat([tensor.flatten() for tensor in view.received.values()])


def captured(client, split, count, share):
    """Return images, views of clean gradients, noised ones, and the noise: ``share`` of the rms."""
    pairs = [batch(split, 1, seed) for seed in range(count)]
    clean = [client.gradient(*pair, client=number) for number, pair in enumerate(pairs)]
    std = share * float(torch.stack([flat(view) for view in clean]).square().mean().sqrt())
    generator = torch.Generator().manual_seed(3)
    noised = [
        dataclasses.replace(
            view,
            received={
                name: tensor + std * torch.randn(tensor.shape, generator=generator)
                for name, tensor in view.received.items()
            },
        )
        for view in clean
    ]
    return torch.cat([images for images, _ in pairs]), clean, noised, std


def knows(client, views, surrogate):
    return client.knowledge("D", {view.label: 1 for view in views}, surrogate=surrogate)


def cosine(gradients, views):
    """Return the mean cosine to the gradients of some views."""
    return float(cosine_similarity(gradients, torch.stack([flat(v) for v in views])).mean())


def small(places=8, width=4):
    """Return a diffusion model of a few random gradients of 50 numbers."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(50, generator=generator)
    examples = 3 * (common + 0.1 * torch.randn(20, 50, generator=generator))
    return GradientDiffusion(
        examples, size=1, width=width, generator=generator, device=torch.device("cpu")
    )


@pytest.mark.parametrize("noise", [0.02, 0.1, 1.0, 10.0])
def test_the_step_is_the_first_with_as_much_noise(noise):
    step = matching_step(noise)
    there = float(1 / KEPT[step - 1] - 1) ** 0.5
    before = float(1 / KEPT[step - 2] - 1) ** 0.5
    assert before < noise <= there * (1 + 1e-9)
    assert matching_step(1e9) == STEPS


def test_gradients_fill_a_square_and_are_of_variance_one():
    diffusion = small()
    assert diffusion.side == 8
    assert diffusion.clean(500).square().mean() == pytest.approx(1, rel=0.1)
    squares = diffusion.squares(torch.ones(2, 50))
    assert squares.shape == (2, 8, 8)
    assert squares.sum() == 100


def test_the_clean_gradient_and_the_noise_add_up_to_what_is_seen():
    diffusion = small()
    noised = torch.randn(3, 8, 8)
    for step in (1, 300, 1000):
        clean, noise = diffusion.told(noised, step)
        kept = float(KEPT[step - 1])
        assert torch.allclose(kept**0.5 * clean + (1 - kept) ** 0.5 * noise, noised, atol=1e-5)


def test_with_a_perfect_network_the_chain_ends_at_the_clean_gradient(monkeypatch):
    diffusion = small()
    clean = diffusion.squares(diffusion.clean(2))

    def perfect(squares, steps):
        kept = KEPT[steps - 1].float().view(-1, 1, 1)
        noise = (squares - kept.sqrt() * clean) / (1 - kept).sqrt()
        return kept.sqrt() * noise - (1 - kept).sqrt() * clean

    monkeypatch.setattr(diffusion, "network", perfect)
    kept = float(KEPT[199])
    squares = kept**0.5 * clean + (1 - kept) ** 0.5 * torch.randn(clean.shape)
    assert torch.allclose(diffusion.told(squares, 200)[0], clean, atol=1e-4)
    for step in range(200, 0, -1):
        squares = diffusion.reverse(squares, step)
    assert torch.allclose(squares, clean, atol=1e-4)


def test_what_the_released_code_does_takes_off_a_hundredth_of_the_noise(monkeypatch):
    diffusion = small()
    noised, noise = torch.randn(2, 2, 8, 8)
    monkeypatch.setattr(diffusion, "told", lambda *_: (noised, noise))
    taken = noised - diffusion.reverse(noised, 1) * float(1 - BETAS[0]) ** 0.5
    assert torch.allclose(taken, 0.01 * noise, atol=1e-5)


def test_the_network_tells_squares_of_any_side_apart_by_step_and_place():
    torch.manual_seed(0)
    network = UNet(torch.randn(2, 12, 12), 4)
    squares = torch.randn(1, 12, 12).expand(2, -1, -1)
    found = network(squares, torch.tensor([1, 900]))
    assert found.shape == (2, 12, 12)
    assert not torch.allclose(found[0], found[1])


def test_untrained_it_is_the_best_guess_for_independent_normal_numbers():
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 4, 4, generator=generator).abs()
    clean = mean + std * torch.randn(20_000, 4, 4, generator=generator)
    noised = 0.5**0.5 * (clean + torch.randn(clean.shape, generator=generator))
    step = matching_step(1.0)
    v = normal_v(noised, torch.full((20_000,), step), mean, std)
    kept = float(KEPT[step - 1])
    found = kept**0.5 * noised - (1 - kept) ** 0.5 * v
    left = (found - clean).square().mean(dim=0)
    assert torch.allclose(left, std**2 / (std**2 + 1), rtol=0.1, atol=0.02)


def test_training_learns_what_places_have_to_do_with_each_other():
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(200, 1, generator=generator).expand(-1, 64)
    diffusion = GradientDiffusion(
        alike, size=1, width=4, generator=generator, device=torch.device("cpu")
    )
    clean, step = diffusion.squares(diffusion.clean(50)), matching_step(1.0)
    noise = torch.randn(clean.shape, generator=generator)
    noised = float(KEPT[step - 1]) ** 0.5 * (clean + noise)
    before = (diffusion.told(noised, step)[0] - clean).square().mean()
    diffusion.train(80, batch=16, lr=1e-2, upto=step)
    after = (diffusion.told(noised, step)[0] - clean).square().mean()
    assert before == pytest.approx(0.5, rel=0.15)  # as if places were independent
    assert after < 0.8 * before


def test_what_gradients_have_in_common_stays():
    diffusion = small()
    clean = diffusion.clean(4)
    step = matching_step(3.0)
    noised = clean + 3.0 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    squares = float(KEPT[step - 1]) ** 0.5 * diffusion.squares(noised)
    found = diffusion.told(squares, step)[0].flatten(1)[:, :50]
    assert cosine_similarity(found, clean).mean() > cosine_similarity(noised, clean).mean() + 0.3


def test_noise_of_three_times_the_gradient_goes_down():
    private, surrogate, client = setup()
    _, clean, noised, std = captured(client, private, 2, 3.0)
    knowledge = knows(client, noised, surrogate)
    (same,) = by_model(noised, knowledge, [])
    attack = Mjolnir(noise=std, then=INVERT, chain="mean", steps=5, width=4)
    found, told = attack.denoised(same, 1, knowledge)
    assert found.shape == (2, 4218)
    before = cosine(torch.stack([flat(view) for view in noised]), clean)
    assert cosine(found, clean) > before + 0.2
    assert "5 steps on gradients of 177 surrogate examples" in told


def test_views_are_denoised_and_handed_on_in_their_order():
    private, surrogate, client = setup()
    _, _, noised, std = captured(client, private, 3, 0.1)
    stranger = Honest(client.expression, client.spec, seed=8)
    noised[1] = stranger.gradient(*batch(private, 1, 1), client=1)
    attack = Mjolnir(
        noise=std, then="inverting-gradients(iterations=2)", chain="released", steps=1, width=4
    )
    knowledge = knows(client, noised, surrogate)
    found = attack.reconstruct(noised, knowledge)
    assert found.views.tolist() == [0, 1, 2]
    assert sum("of the same weights" in line for line in found.receipts) == 2
    assert {grant.value for grant in knowledge.used} == {"updates", "basics", "surrogate"}
    assert found.cost.gradient_evaluations == 2 * len(surrogate) + 3 * 3
    with pytest.raises(NotGranted):
        attack.reconstruct(noised, client.knowledge("B", {v.label: 1 for v in noised}))


def test_it_refuses_what_it_and_its_inverter_cannot_work_on():
    attack = Mjolnir(noise=0.1)
    with pytest.raises(ValueError, match="fedsgd"):
        attack.check(Honest("lenet", spec()).model(), "weights")
    model = Honest("resnet20", spec()).model()
    details = TrainingDetails("gradient", 0.1, 1, 1, 0.0, 0.0)
    with pytest.raises(ValueError, match="frozen"):
        attack.check_setting(Setting(model, 1, 1, (1,), details, "private", None))
    with pytest.raises(ValueError, match="passive"):
        Mjolnir(noise=0.1, then="robbing-the-fed")
    with pytest.raises(ScenarioError, match="inverting-gradients"):
        Mjolnir(noise=0.1, then="inverting-gradient")
    oracle = Mjolnir(noise=0.1, then="inverting-gradients(labels='oracle')")
    assert oracle.oracles == {"labels"}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("data", "share"), [("digits", 0.1), ("digits", 1.0), ("digits", 10.0), ("photo-tiles", 1.0)]
)
def test_gradients_come_nearer_and_images_under_much_noise_stay_below_a_guess(data, share):
    private, surrogate, client = setup(data)
    truth, clean, noised, std = captured(client, private, 4, share)
    knowledge = knows(client, noised, surrogate)
    attack = Mjolnir(noise=std, then=INVERT, steps=200)
    seen = torch.stack([flat(view) for view in noised])
    (same,) = by_model(noised, knowledge, [])
    rows = {"clean": torch.stack([flat(view) for view in clean]), "as it is": seen}
    for chain in ("mean", "reverse", "released"):
        denoiser = dataclasses.replace(attack, chain=chain)
        rows[chain] = denoiser.denoised(same, 1, knowledge)[0]
    floor, nearness, images = floor_psnr(truth, surrogate).mean().item(), {}, {}
    print(f"{data}, noise {share} of the rms, floor {floor:.1f} dB")
    for what, gradients in rows.items():
        views = [
            with_gradient(view, same.names, gradient)
            for view, gradient in zip(noised, gradients, strict=True)
        ]
        images[what] = psnr(truth, attack.inner.reconstruct(views, knowledge).examples).mean()
        nearness[what] = cosine(gradients, clean)
        print(f"  {what}: cosine {nearness[what]:.3f}, {images[what]:.1f} dB")
    assert abs(nearness["released"] - nearness["as it is"]) < 0.03  # one step takes nothing off
    if share < 1:
        assert nearness["mean"] > nearness["as it is"]
        assert images["mean"] > floor + 5
        assert abs(images["mean"] - images["as it is"]) < 1
    else:
        assert nearness["mean"] > nearness["as it is"] + 0.15
        assert images["mean"] < floor
