"""Dropout: what is kept, what it is scaled by, where it stands, and what it does not hide."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clients.defenses.model.dropout import Dropout, thinned
from fedsim.errors import ScenarioError
from fedsim.models import build_model
from fedsim.parts import Parts, check
from strategies.attacks.optimization.beyond.dropout_inversion import masked
from tests.clients.model_side import images_of, sent, spec
from tests.fedsim.small import scenario

SMALL = "convnet(width=8)"


def dropouts(expression: str) -> list[str]:
    return [layer.name for layer in masked(build_model(expression, spec()))]


def test_it_stands_before_every_fully_connected_layer_but_the_one_that_reads_pixels():
    assert dropouts(Dropout().architecture("mlp(hidden=[8, 8])")) == ["3.0", "5.0"]
    assert dropouts(Dropout().architecture("mlp(hidden=[8], normalize=True)")) == ["3.0"]
    assert dropouts(Dropout().architecture(SMALL)) == ["fc.0"]
    assert [one.name for one in thinned(build_model("convnet(hidden=[4])", spec()))] == [
        "hidden.0",
        "fc",
    ]
    with pytest.raises(ValueError, match="to thin out"):
        build_model(Dropout().architecture("mlp(hidden=[])"), spec())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_so_many_are_kept_and_scaled(p: float):
    images, labels = images_of(64)
    seen = sent(Dropout(p=p), SMALL, images, labels, train=True)
    assert seen.ctx.effects["dropout"].figures["kept"] == pytest.approx(1 - p, abs=0.03)
    layer = seen.trained.get_submodule("fc.0")
    ones = torch.ones(1000)
    assert set(layer(ones).tolist()) == {0.0, (ones / (1 - p))[0].item()}


def test_the_upload_is_the_gradient_with_the_mask_that_the_secret_drew():
    images, labels = images_of(2)
    seen = sent(Dropout(), SMALL, images, labels, train=True, draw=5)
    other = sent(Dropout(), SMALL, images, labels, train=True, draw=6)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        gradients = torch.autograd.grad(
            cross_entropy(seen.shared(images), labels), list(seen.shared.parameters())
        )
    for mine, sent_one in zip(gradients, seen.upload.values(), strict=True):
        assert torch.equal(mine, sent_one)
    assert not torch.equal(seen.upload["fc.1.weight"], other.upload["fc.1.weight"])


def test_a_layer_that_reads_the_pixels_gives_them_away():
    images, labels = images_of(1)
    upload = sent(Dropout(), "mlp(hidden=[32])", images, labels, train=True).upload
    row = upload["1.bias"].abs().argmax()
    read = upload["1.weight"][row] / upload["1.bias"][row]
    assert (read - images.flatten()).abs().max() < 1e-9


def test_where_clients_train_in_eval_mode_it_is_refused(tmp_path):
    made = {"defenses": "dropout", "model.name": SMALL, "threat-model": "B"}
    with pytest.raises(ScenarioError, match="private"):
        check(Parts(scenario(tmp_path, made)))
    check(Parts(scenario(tmp_path, made | {"model.batchnorm": "private"})))


def test_layers_keep_their_weights():
    one, other = build_model(SMALL, spec()), build_model(Dropout().architecture(SMALL), spec())
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())
    assert isinstance(other.get_submodule("fc.1"), nn.Linear)
