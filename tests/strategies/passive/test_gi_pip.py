"""GI-PIP: noise is an anomaly, images are not, and without the score it is Inverting Gradients."""

import pytest
import torch

from fedsim.data import Split
from strategies.attacks.optimization.augmented import gi_pip
from strategies.attacks.optimization.augmented.gi_pip import GIPIP, Anomaly, AutoEncoder, trained
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from tests.strategies.passive.honest import (
    Honest,
    batch,
    cifar10,
    floor_psnr,
    psnr,
    spec,
    tiles,
)


def test_without_the_score_it_is_inverting_gradients():
    client = Honest("convnet(stride=2, width=8)", spec())
    view = client.gradient(*batch(tiles(), 2, 0))
    found = [
        attack.reconstruct([view], client.knowledge("D", 2, surrogate=tiles()))
        for attack in (
            GIPIP(iterations=20, tv=1e-3, anomaly=0.0),
            InvertingGradients(iterations=20, tv=1e-3),
        )
    ]
    assert torch.equal(found[0].examples, found[1].examples)


def test_noise_scores_far_above_what_is_usual():
    knowledge = Honest("lenet", spec()).knowledge("D", surrogate=tiles())
    opinion = trained(tiles(), 8, knowledge, [])
    assert opinion.of_noise > 5 * opinion.usual
    images, _ = batch(tiles(), 6, 0)
    noise = torch.rand(6, *spec().shape, generator=torch.Generator().manual_seed(0))
    prior = Anomaly(opinion, 2.0)
    of_images, of_noise = (prior(some.view(2, 3, *spec().shape)) for some in (images, noise))
    assert (of_noise[0] > 5 * of_images[0]).all()
    errors = opinion.errors(noise).view(2, 3)
    assert torch.allclose(of_noise[0], 2 * (errors - opinion.usual).abs().mean(dim=1))
    downhill = noise.view(2, 3, *spec().shape) - 5.0 * of_noise[1]
    assert (prior(downhill)[0] < of_noise[0]).all()


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 32, 32), (2, 1, 28, 25)])
def test_any_side_passes_through(shape):
    assert AutoEncoder(shape[1])(torch.rand(shape)).shape == shape


# (weight of the score, weight of total variation); at 0 it is Inverting Gradients
WEIGHTS = ((0, 1e-3), (1e-4, 1e-3), (1e-2, 1e-3), (0.1, 1e-3), (0, 1e-2), (0.1, 1e-2), (0, 3e-2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "count"), [(1, 8), (4, 2)])
def test_the_score_stands_in_for_total_variation_and_does_not_beat_it_weighed(
    size, count, monkeypatch
):
    """Prints the page's figures; one auto-encoder for all weights."""
    client, data = Honest("convnet(stride=2)", spec()), cifar10()
    private, other = (
        Split(data.images[part], data.labels[part]) for part in (slice(20), slice(1000, 3000))
    )
    pairs = [private.batch(torch.arange(at * size, (at + 1) * size)) for at in range(count)]
    views = [client.gradient(*pair, client=place) for place, pair in enumerate(pairs)]
    counts = {view.label: size for view in views}
    truth = torch.cat([images for images, _ in pairs]).float()
    labels = {v.label: pair[1] for v, pair in zip(views, pairs, strict=True)}
    opinion = trained(other, 20, client.knowledge("D", surrogate=other), [])
    monkeypatch.setattr(gi_pip, "trained", lambda *_: opinion)
    reached = {}
    for anomaly, tv in WEIGHTS:
        attack = GIPIP(iterations=300, tv=tv, anomaly=float(anomaly))
        knowledge = client.knowledge("D", counts, surrogate=other, labels=labels)
        found = attack.reconstruct(views, knowledge)
        reached[anomaly, tv] = matched(truth, found.examples, size).mean().item()
        print(f"batches of {size}, score {anomaly:g}, tv {tv:g}: {reached[anomaly, tv]:.1f} dB; "
              f"{found.receipts[0]}", flush=True)  # fmt: skip
    floor = floor_psnr(truth, other).mean().item()
    print(f"floor {floor:.1f} dB")
    scored = max(dB for (anomaly, _), dB in reached.items() if anomaly)
    plain = max(dB for (anomaly, _), dB in reached.items() if not anomaly)
    assert reached[0.1, 1e-3] > reached[0, 1e-3] + 0.8  # where total variation is wanting
    assert reached[0, 1e-2] > reached[0.1, 1e-3] + 1  # and that is worth more
    assert abs(reached[0.1, 1e-2] - reached[0, 1e-2]) < 0.6  # with it the score adds nothing
    assert scored < plain + 0.3
    assert plain > floor + (13 if size == 1 else 4)


def matched(truth, found, size):
    from tests.strategies.passive.honest import matched_psnr

    parts = zip(truth.split(size), found.split(size), strict=True)
    return torch.cat([matched_psnr(*part) for part in parts]) if size > 1 else psnr(truth, found)
