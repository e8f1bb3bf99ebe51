"""Hatamizadeh et al.: the statistics that come back, what is searched, and what is refused."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsim import registry
from fedsim.attack import Setting
from fedsim.errors import NotGranted, ScenarioError
from fedsim.models import travelling
from fedsim.threat import TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.bn_fedavg_inversion import (
    BatchNormFedAvgInversion,
    FourWayVariation,
    FromMeanImage,
)
from strategies.attacks.optimization.basic.e2egi import E2EGI
from strategies.attacks.optimization.groups import grouped
from tests.strategies.passive.honest import Honest, batch, spec, tiles
from tests.strategies.passive.test_engine import SMALL

NETWORK = "convnet(width=8, stride=2, norm='batch')"
LR = 0.05


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_step(client: Honest, images, labels) -> ServerView:
    """What a client sends that shares BatchNorm's statistics and takes one step."""
    sent = client.sent()
    model = client.model().train()
    loss = cross_entropy(model(images.to(client.dtype)), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(LR * gradient)
    after = {name: t.clone() for name, t in travelling(model).items()}
    return ServerView(1, (0,), client.expression, sent, after, "weights")


def granted(client: Honest, letter: str = "D", **more):
    known = {"surrogate": tiles(), "batchnorm": "shared", "epochs": 1, "lr": LR, "batch_size": 3}
    return client.knowledge(letter, 3, **{**known, **more})


def test_at_the_truth_gradient_and_statistics_are_both_matched():
    client = Honest(NETWORK, spec(), dtype=torch.float64)
    images, labels = batch(tiles(), 3, 0, torch.float64)
    order = labels.argsort()
    images, labels = images[order], labels[order]
    view = one_step(client, images, labels)

    class AtTheTruth(FromMeanImage):
        def start(self, generator):
            return ((images - self.mean) / self.std).flatten()

    attack = BatchNormFedAvgInversion(iterations=1, labels="oracle", tv=0, norm=0, noise=0)
    held = pytest.MonkeyPatch()
    held.setattr(
        "strategies.attacks.optimization.basic.bn_fedavg_inversion.FromMeanImage", AtTheTruth
    )
    try:
        found = attack.reconstruct([view], granted(client, labels={view.label: labels}))
    finally:
        held.undo()
    assert found.scores.abs().max() < 1e-10
    assert (found.examples - images).abs().max() < 1e-9


def test_candidates_start_as_the_mean_image_and_labels_anywhere():
    image, labels = rand(*SMALL.shape), torch.zeros(2, 3, dtype=torch.int64)
    searched = FromMeanImage(SMALL, labels, torch.float64, image, searched=True)
    start = searched.start(torch.Generator().manual_seed(0)).double()
    assert len(start) == 3 * 72 + 3 * 4
    images, soft, _ = searched.decode(start.expand(2, -1))
    assert (images - image).abs().max() < 1e-6
    assert torch.allclose(soft.sum(dim=-1), torch.ones(2, 3).double())
    assert (soft[0, 0] - soft[0, 1]).abs().max() > 1e-3
    variables = torch.full((2, len(start)), 9.0, dtype=torch.float64)
    searched.box(variables)
    pictures, named = searched.take(torch.tensor([0])).finish(variables[:1])
    assert pictures.max() == 1
    assert named.shape == (1, 3)
    assert variables[0, -1] == 9
    known = FromMeanImage(SMALL, labels, torch.float64, image, searched=False)
    assert len(known.start(torch.Generator())) == 3 * 72


def test_variation_in_four_directions_returns_its_derivative():
    prior, step = FourWayVariation(0.3, SMALL), 1e-6
    images, along = rand(2, 3, *SMALL.shape), rand(2, 3, *SMALL.shape, seed=1)
    penalty, pull = prior(images)
    ahead, behind = prior(images + step * along)[0], prior(images - step * along)[0]
    assert penalty.shape == (2,)
    assert torch.allclose(
        (pull * along).flatten(1).sum(dim=1), (ahead - behind) / (2 * step), rtol=1e-5
    )
    assert prior(torch.full((1, 1, *SMALL.shape), 0.4))[0].abs().max() < 1e-6


def test_it_runs_on_what_model_d_grants():
    client = Honest(NETWORK, spec())
    view = one_step(client, *batch(tiles(), 3, 0))
    attack, knowledge = BatchNormFedAvgInversion(iterations=3), granted(client)
    found = attack.reconstruct([view], knowledge)
    assert found.examples.shape == (3, 3, 32, 32)
    used = {capability.value for capability in knowledge.used}
    assert used == {"updates", "basics", "details", "surrogate"}
    with pytest.raises(NotGranted, match="surrogate"):
        attack.reconstruct([view], granted(client, "C"))


def test_a_view_alone_gives_what_it_gives_among_others():
    client = Honest(NETWORK, spec(), dtype=torch.float64)
    views = [
        dataclasses.replace(one_step(client, *batch(tiles(), 1, seed)), senders=(seed,))
        for seed in range(2)
    ]
    attack = BatchNormFedAvgInversion(iterations=20, restarts=2, noise=1.0)
    knowledge = granted(client).about({view.label: 1 for view in views})
    together = attack.reconstruct(views, knowledge)
    alone = attack.reconstruct(views[1:], knowledge)
    assert torch.allclose(alone.examples, together.examples[1:], atol=1e-6)


def test_what_says_nothing_is_refused_with_a_remedy():
    attack = BatchNormFedAvgInversion()
    with pytest.raises(ValueError, match="BatchNorm"):
        attack.check(Honest("lenet", spec()).model(), "weights")
    model = Honest(NETWORK, spec()).model()
    attack.check(model, "weights")
    training = TrainingDetails("weights", 0.1, 4, 1, 0.0, 0.0)
    setting = Setting(model, 2, 2, (4, 4), training, "shared", channel=None)
    attack.check_setting(setting)
    more = dataclasses.replace(training, epochs=2)
    for wrong, remedy in (
        (dataclasses.replace(setting, batchnorm="private"), "proxy"),
        (dataclasses.replace(setting, training=more), "2 local steps"),
    ):
        with pytest.raises(ValueError, match=remedy):
            attack.check_setting(wrong)
    BatchNormFedAvgInversion(batchnorm=0).check(Honest("lenet", spec()).model(), "weights")
    for wrong in ({"labels": "search"}, {"statistics": "recover"}):
        with pytest.raises(ScenarioError):
            BatchNormFedAvgInversion(**wrong)
    assert BatchNormFedAvgInversion(statistics="oracle").oracles == {"batchnorm"}
    assert not BatchNormFedAvgInversion(statistics="oracle", batchnorm=0).oracles


@pytest.mark.parametrize(
    "attack", [BatchNormFedAvgInversion(labels="idlg"), E2EGI(labels="idlg", batchnorm=0)]
)
def test_a_label_rule_for_less_is_refused(attack):
    channel = registry.build("channel", "plain", "channel")
    training = TrainingDetails("weights", 0.1, 4, 1, 0.0, 0.0)
    setting = Setting(Honest(NETWORK, spec()).model(), 2, 2, (4, 4), training, "shared", channel)
    with pytest.raises(ValueError, match="the idlg rule is for one"):
        attack.check_setting(setting)


def test_an_aggregate_of_one_step_each_is_one_step():
    client = Honest(NETWORK, spec())
    sums = dataclasses.replace(one_step(client, *batch(tiles(), 3, 0)), senders=(0, 1))
    knowledge = client.knowledge("D", {sums.label: 8}, batch_size=4, epochs=1, surrogate=tiles())
    attack, found = BatchNormFedAvgInversion(batchnorm=0, labels="analytic"), []
    (group,) = grouped([sums], knowledge, knowledge.num_examples, attack.rule, found)
    assert torch.equal(attack._distance(group, knowledge).observed, group.observed / 0.1)
