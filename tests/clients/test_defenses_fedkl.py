"""FedKL: nothing of the lock is uploaded, the key matters, and what two numbers a channel hide."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from clients.defenses.model.fedkl import FedKL, Lock
from clients.defenses.model.network import replace
from clients.trainer import FedAvg
from fedsim.defense import TrainingPlan
from fedsim.errors import ScenarioError
from fedsim.local import LocalData
from fedsim.models import build_model, initial_model
from fedsim.parts import Parts, check
from tests.clients.model_side import (
    Sent,
    digits,
    given_the_secret,
    images_of,
    inverted,
    jointly,
    sent,
    spec,
)
from tests.clients.one_update import context
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import psnr

SMALL = "convnet(width=8)"


def test_no_array_of_the_lock_is_uploaded_and_the_lock_is_remembered():
    images, labels = images_of(2)
    seen = sent(FedKL(), SMALL, images, labels, train=True)
    assert not any("lock" in name for name in seen.upload)
    private = [p for name, p in seen.trained.named_parameters() if name not in seen.upload]
    assert sum(p.numel() for p in private) == 2 * (1024 + 1) * 8
    assert seen.ctx.store["fedkl.key"].shape == (1024,)
    later = context(7, round=2)  # another secret altogether, and the same store
    later.store |= {name: t.clone() for name, t in seen.ctx.store.items()}
    again = sent(FedKL(), SMALL, images, labels, train=True, ctx=later)
    assert all(torch.equal(again.upload[name], t) for name, t in seen.upload.items())


def test_the_lock_by_hand():
    lock = Lock(3, 5, "relu").double()
    gamma = (lock.scale.weight @ lock.key + lock.scale.bias).relu()
    beta = (lock.shift.weight @ lock.key + lock.shift.bias).relu()
    features = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = gamma.view(3, 1, 1) * features + beta.view(3, 1, 1)
    assert torch.allclose(lock(features), expected, atol=1e-12)
    lock.activation = "sigmoid"
    assert all(0 < value < 1 for part in lock.opened() for value in part.tolist())


def test_what_the_lock_is_given_is_normalized_over_the_batch():
    images, labels = images_of(3)
    seen = sent(FedKL(), SMALL, images, labels, train=True)
    first, norm, lock = seen.trained.get_submodule("body.0")
    assert not list(norm.parameters())
    features = first(seen.trained.normalize(images))
    given = seen.trained.get_submodule("body.0")[:2](seen.trained.normalize(images))
    mean, var = features.mean((0, 2, 3), keepdim=True), features.var((0, 2, 3), False, keepdim=True)
    assert torch.allclose(given, (features - mean) / (var + 1e-5).sqrt(), atol=1e-9)
    assert float((features - given).abs().max()) > 0.1
    assert isinstance(lock, Lock)


def test_where_clients_train_in_eval_mode_it_is_refused(tmp_path):
    made = {"defenses": "fedkl", "model.name": SMALL, "threat-model": "B"}
    with pytest.raises(ScenarioError, match="normalizes nothing; write 'private'"):
        check(Parts(scenario(tmp_path, made)))
    check(Parts(scenario(tmp_path, made | {"model.batchnorm": "private"})))


def test_another_lock_opens_little_and_another_key_opens_all():
    """One client alone, six epochs over 640 digits.

    With its key, another key, another client's lock, the authors' zeros, and no lock at all, each
    with the statistics of what it classifies: clients keep theirs to themselves.
    """
    data = LocalData(digits().subset(torch.arange(640)), torch.device("cpu"), torch.float32)
    rule = FedAvg(epochs=6, batch_size=16, lr=0.03)
    model = initial_model(FedKL().architecture(SMALL), spec(), 1)
    shared = copy.deepcopy(model)
    ctx = context(1)
    ctx.plan = TrainingPlan("weights", 0.03, 16, 640, 160, 1)
    trained = FedKL().wrap_model(model, ctx)
    ctx.shared = frozenset(name for name, _ in shared.named_parameters())
    after = rule.train(trained, data, (FedKL(),), ctx).upload
    shared.load_state_dict({**shared.state_dict(), **after})
    images, labels = digits().batch(torch.arange(640, 1000))
    another = FedKL().wrap_model(copy.deepcopy(shared), context(5))
    wrong, zeros = copy.deepcopy(trained), copy.deepcopy(trained)
    wrong.get_submodule("body.0.lock").key.copy_(  # type: ignore[union-attr,operator]
        another.get_buffer("body.0.lock.key")
    )
    for parameter in zeros.get_submodule("body.0.lock").parameters():
        parameter.data.zero_()

    def accuracy(network: torch.nn.Module) -> float:
        with torch.no_grad():
            return (network.train()(images).argmax(1) == labels).float().mean().item()

    made = {"key": trained, "wrong key": wrong, "another lock": another, "zeros": zeros}
    found = {name: accuracy(network) for name, network in {**made, "no lock": shared}.items()}
    print(found)
    assert found["key"] > 0.8
    assert max(found["another lock"], found["zeros"]) < found["key"] - 0.4
    assert found["wrong key"] > found["key"] - 0.1


def test_without_convolution_it_is_refused():
    with pytest.raises(ValueError, match="no convolution"):
        build_model(FedKL().architecture("mlp"), spec())


def test_the_classifier_gives_the_locked_features_away():
    images, labels = images_of(1)
    seen = sent(FedKL(), SMALL, images, labels, train=True)
    loss = cross_entropy(seen.trained(images), labels)
    names, parameters = zip(*seen.trained.named_parameters(), strict=True)
    own = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert all(torch.equal(own[name], t) for name, t in seen.upload.items())
    features = seen.trained.body(seen.trained.normalize(images)).flatten()  # type: ignore[operator]
    row = seen.upload["fc.bias"].abs().argmax()
    read = seen.upload["fc.weight"][row] / seen.upload["fc.bias"][row]
    assert torch.allclose(read, features, atol=1e-9)


@pytest.mark.slow
def test_gamma_and_beta_are_searched_with_the_image():
    truth = [images_of(1, seed) for seed in range(4)]
    seen = [sent(FedKL(), SMALL, *pair, train=True, ctx=context(i)) for i, pair in enumerate(truth)]
    pairs = [(one, labels) for one, (_, labels) in zip(seen, truth, strict=True)]
    images = torch.cat([x for x, _ in truth])
    made = {
        "without key": [inverted(s, y, tv=1e-5) for s, y in pairs],
        "lock searched": [jointly(s, unlocked(s), y, iterations=800, tv=1e-5) for s, y in pairs],
        "lock known": [given_the_secret(s, y, tv=1e-5) for s, y in pairs],
    }
    found = {name: psnr(images, torch.cat(each)).mean().item() for name, each in made.items()}
    print(found)
    assert found["lock known"] > found["without key"] + 5
    assert found["lock searched"] > found["without key"] + 5


class ScaleAndShift(torch.nn.Module):
    """All that a lock does, for an attacker to search: gamma and beta."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.full((channels, 1, 1), 0.5, dtype=torch.float64))
        self.beta = torch.nn.Parameter(torch.full((channels, 1, 1), 0.5, dtype=torch.float64))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.gamma * features + self.beta


def unlocked(seen: Sent) -> torch.nn.Module:
    model = copy.deepcopy(seen.shared)
    replace(model, "body.0.lock", ScaleAndShift(8))
    return model
