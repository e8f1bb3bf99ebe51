"""AGIC and TGIAs-RO: several rounds of one batch, and what they are for a single one."""

import dataclasses

import pytest
import torch

from fedsim.attack import Setting
from fedsim.data import load_dataset
from fedsim.threat import TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.basic.temporal_robust import TemporalRobust
from strategies.attacks.optimization.beyond.agic import (
    ApproximateGradientInversion,
    layer_weights,
)
from tests.strategies.passive.honest import Honest, batch, psnr

DIGITS = load_dataset("digits")
CLIENT = Honest("convnet(stride=2)", DIGITS.spec)


def rounds(images, labels, count: int) -> list[ServerView]:
    """One client's gradients of one batch, the server taking a step after each."""
    views, sent = [], CLIENT.sent()
    for number in range(1, count + 1):
        view = CLIENT.gradient(images, labels, sent=sent)
        views.append(dataclasses.replace(view, round=number))
        sent = {name: t - 0.1 * view.received.get(name, 0) for name, t in sent.items()}
    return views


def found(attack, views, size):
    return attack.reconstruct(views, CLIENT.knowledge("B", {view.label: size for view in views}))


@pytest.mark.parametrize(
    "attack",
    [
        ApproximateGradientInversion(iterations=20, tv=1e-3, last=1.0, labels="analytic"),
        TemporalRobust(iterations=20, tv=1e-3),
    ],
)
def test_one_round_and_flat_weights_are_inverting_gradients(attack):
    images, labels = batch(DIGITS.train, 3, 0)
    views = rounds(images, labels, 1)
    plain = found(InvertingGradients(iterations=20, tv=1e-3), views, 3)
    other = found(attack, views, 3)
    assert torch.allclose(other.examples, plain.examples, atol=1e-4)
    assert torch.allclose(other.scores, plain.scores, atol=1e-5)


def test_layers_weigh_more_towards_the_output():
    names = ["a.weight", "a.bias", "b.weight", "c.weight", "c.bias"]
    assert layer_weights(names, 2.0) == [1, 1, 1.5, 2, 2]
    assert layer_weights(names[:2], 2.0) == [1, 1]


def test_of_ten_rounds_one_corrupted_wrecks_the_mean_and_hardly_moves_the_median():
    images, labels = batch(DIGITS.train, 1, 1)
    honest = rounds(images, labels, 10)
    generator = torch.Generator().manual_seed(5)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in honest[4].received.items()}
    bad = [*honest[:4], dataclasses.replace(honest[4], received=noise), *honest[5:]]
    same = {"iterations": 80, "distance": "squared", "labels": "idlg"}

    def reached(combine, views):
        result = found(TemporalRobust(**same, combine=combine), views, 1)
        assert result.cost.gradient_evaluations == 10 * 81
        return psnr(images, result.examples).item()

    (median, median_bad), (mean, mean_bad) = (
        [reached(combine, views) for views in (honest, bad)] for combine in ("median", "mean")
    )
    print(f"median {median:.1f} -> {median_bad:.1f} dB, mean {mean:.1f} -> {mean_bad:.1f} dB")
    assert median_bad > median - 2
    assert mean_bad < mean - 5


def test_each_client_has_one_answer_from_all_its_rounds():
    first, second = (batch(DIGITS.train, 2, seed) for seed in (0, 1))
    views = rounds(*first, 2) + [dataclasses.replace(v, senders=(1,)) for v in rounds(*second, 3)]
    result = found(ApproximateGradientInversion(iterations=5, labels="analytic"), views, 2)
    assert result.views.tolist() == [0, 0, 2, 2]
    assert result.cost.gradient_evaluations == 6 * 5
    assert "and 2 more" in result.receipts[1]


@pytest.mark.parametrize("attack", [ApproximateGradientInversion(), TemporalRobust()])
def test_another_batch_every_round_is_refused(attack):
    training = TrainingDetails("gradient", 0.1, 4, 1, 0.0, 0.0)
    setting = Setting(CLIENT.model(), 2, 2, (8, 8), training, "frozen", channel=None)
    with pytest.raises(ValueError, match="batch_size be what a client holds, 8"):
        attack.check_setting(setting)
    for fitting in ({"batch_size": 8}, {"kind": "weights"}):
        attack.check_setting(
            dataclasses.replace(setting, training=dataclasses.replace(training, **fitting))
        )
    attack.check(CLIENT.model(), "weights")


def test_the_scale_of_weights_is_not_that_of_a_gradient():
    attack = TemporalRobust(distance="squared")
    attack.check(CLIENT.model(), "gradient")
    with pytest.raises(ValueError, match="cosine"):
        attack.check(CLIENT.model(), "weights")
