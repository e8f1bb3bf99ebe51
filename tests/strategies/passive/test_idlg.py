"""iDLG: the sign names the label always, and knowing it makes more starts succeed."""

import dataclasses

import pytest
import torch
from torch import nn

from fedsim import registry
from fedsim.attack import Setting
from fedsim.data import DataSpec, load_dataset
from fedsim.models import build_model
from fedsim.threat import TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.labels.idlg import negative_class
from strategies.attacks.optimization.basic.dlg import DLG
from strategies.attacks.optimization.basic.idlg import ImprovedDLG
from tests.strategies.passive.honest import Honest, batch, cifar10, psnr, spec, tiles


@pytest.mark.ladder(1)
@pytest.mark.parametrize("expression", ["lenet", "lenet(activation='relu', init='default')"])
@pytest.mark.parametrize("part", ["bias", "weight"])
def test_the_sign_rule_is_right_for_every_random_image(expression, part):
    model = build_model(expression, DataSpec((3, 32, 32), 100, (0.5,) * 3, (0.25,) * 3)).eval()
    layer = model.fc
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 3, 32, 32, generator=generator)
    labels = torch.randint(100, (300,), generator=generator)
    with torch.no_grad():
        features = model.body(images).flatten(1)
        residual = layer(features).softmax(dim=1) - nn.functional.one_hot(labels, 100)
    view = ServerView(1, (0,), expression, {}, {}, "gradient")
    for index, label in enumerate(labels.tolist()):
        bias, weight = residual[index], torch.outer(residual[index], features[index])
        received = {"fc.bias": bias} if part == "bias" else {"fc.weight": weight}
        assert negative_class(dataclasses.replace(view, received=received), model) == label


def test_a_digit_comes_back_from_the_update_alone():
    client = Honest("lenet", load_dataset("digits").spec)
    images, labels = batch(load_dataset("digits").train, 1, 0)
    knowledge = client.knowledge("A")
    attack = ImprovedDLG(iterations=1500)
    found = attack.reconstruct([client.gradient(images, labels)], knowledge)
    assert psnr(images, found.examples).item() > 30
    assert found.labels.tolist() == labels.tolist()
    assert {capability.value for capability in knowledge.used} == {"updates"}


def test_what_it_cannot_read_is_refused_with_a_remedy():
    model = Honest("lenet", spec()).model()
    with pytest.raises(ValueError, match="inverting-gradients"):
        ImprovedDLG().check(model, "weights")
    plain, summed = (
        registry.build("channel", name, "channel") for name in ("plain", "trusted-sum")
    )
    training = TrainingDetails("gradient", 0.1, 4, 1, 0.0, 0.0)
    setting = Setting(model, 2, 2, (8, 8), training, "frozen", channel=plain)
    with pytest.raises(ValueError, match="batch_size=1"):
        ImprovedDLG().check_setting(setting)
    one = dataclasses.replace(setting, training=dataclasses.replace(training, batch_size=1))
    ImprovedDLG().check_setting(one)
    with pytest.raises(ValueError, match="gradients of up to 2"):
        ImprovedDLG().check_setting(dataclasses.replace(one, channel=summed))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", ["photo-tiles", "cifar10"])
def test_knowing_the_label_makes_more_single_starts_succeed(source):
    split = tiles() if source == "photo-tiles" else cifar10()
    client = Honest("lenet", DataSpec((3, 32, 32), 100, spec().mean, spec().std))
    truth = [batch(split, 1, seed) for seed in range(16)]
    views = [client.gradient(*pair, client=i) for i, pair in enumerate(truth)]
    solved = {}
    for attack in (DLG(restarts=1, iterations=2500), ImprovedDLG(restarts=1, iterations=2500)):
        found = attack.reconstruct(views, client.knowledge("A"))
        where = {view: at for at, view in enumerate(found.views.tolist())}
        reached = torch.tensor(
            [
                psnr(images, found.examples[where[i]][None]).item() if i in where else 0.0
                for i, (images, _) in enumerate(truth)
            ]
        )
        right = sum(
            found.labels[where[i]].item() == label.item()
            for i, (_, label) in enumerate(truth)
            if i in where
        )
        solved[attack.name] = int((reached > 30).sum())
        print(
            f"{source}, {attack.name}, one start: {solved[attack.name]} of 16 above 30 dB, "
            f"median {reached.median():.1f} dB, labels {right} of 16, "
            f"{found.cost.gradient_evaluations} gradient evaluations"
        )
    assert right == 16
    assert solved["idlg"] > solved["dlg"]
