"""Label rules: counts are exact where the algebra says so, and fall short where it does not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedsim import registry
from fedsim.data import load_dataset
from fedsim.errors import NotGranted
from fedsim.models import build_model
from strategies.attacks.labels import analytic
from strategies.attacks.labels.analytic import Analytic, largest_remainder
from strategies.attacks.labels.idlg import IDLG
from strategies.attacks.labels.oracle import Oracle
from tests.strategies.passive.honest import Honest, batch, spec, tiles


def agreement(found: torch.Tensor, truth: torch.Tensor, classes: int = 10) -> float:
    """Multiset agreement ``1 - sum |n_found - n| / 2B``."""
    counts = [torch.bincount(labels, minlength=classes).double() for labels in (found, truth)]
    return float(1 - (counts[0] - counts[1]).abs().sum() / (2 * len(truth)))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_idlg_names_one_label_whatever_the_activation(activation):
    client = Honest(f"lenet(activation={activation!r}, init='default')", spec())
    for seed in range(20):
        images, labels = batch(tiles(), 1, seed)
        view = client.gradient(images, labels)
        assert IDLG().labels(view, client.model(), 1, client.knowledge("A")).tolist() == [
            labels.item()
        ]


def test_idlg_refuses_a_batch():
    client = Honest("convnet", spec())
    view = client.gradient(*batch(tiles(), 2, 0))
    with pytest.raises(ValueError, match="labels='analytic'"):
        IDLG().labels(view, client.model(), 2, client.knowledge("B", 2))


@pytest.mark.ladder(3)
@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_counts_are_exact_with_the_true_mean_prediction(size, monkeypatch):
    client = Honest("convnet", spec())
    images, labels = batch(tiles(), size, size)
    with torch.no_grad():
        truth = client.model()(images).double().softmax(1).mean(0)
    monkeypatch.setattr(analytic, "mean_prediction", lambda *_: truth)
    view = client.gradient(images, labels)
    found = Analytic().labels(view, client.model(), size, client.knowledge("B"))
    assert found.tolist() == labels.sort().values.tolist()


@pytest.mark.parametrize("threat_model", ["B", "D"])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_counts_at_initialization_are_right_but_for_a_few(threat_model, size):
    client = Honest("convnet", spec())
    surrogate = load_dataset("photo-tiles").test
    scores = []
    for seed in range(10):
        images, labels = batch(tiles(), size, seed)
        knowledge = client.knowledge(threat_model, size, surrogate=surrogate)
        view = client.gradient(images, labels)
        found = Analytic().labels(view, client.model(), size, knowledge)
        scores.append(agreement(found, labels))
        assert ("surrogate" in {c.value for c in knowledge.used}) == (threat_model == "D")
    assert sum(scores) / len(scores) >= 0.97


@pytest.mark.parametrize("threat_model", ["B", "C"])
def test_counts_survive_local_training(threat_model):
    client = Honest("convnet", spec())
    images, labels = batch(tiles(), 16, 2)
    view = client.weights(images, labels, lr=0.01, batch_size=8)
    knowledge = client.knowledge(threat_model, 16, lr=0.01, batch_size=8)
    found = Analytic().labels(view, client.model(), 16, knowledge)
    assert agreement(found, labels) >= 0.85
    assert ("details" in {c.value for c in knowledge.used}) == (threat_model == "C")


def test_label_smoothing_shifts_the_gradient_as_the_algebra_says():
    client, smoothing = Honest("convnet", spec()), 0.2
    images, labels = batch(tiles(), 8, 1)
    model = client.model()
    logits = model(images)
    loss = cross_entropy(logits, labels, label_smoothing=smoothing)
    (bias,) = torch.autograd.grad(loss, [model.fc.bias])
    share = torch.bincount(labels, minlength=10) / 8
    expected = logits.softmax(1).mean(0) - (1 - smoothing) * share - smoothing / 10
    assert torch.allclose(bias, expected, atol=1e-6)


@settings(deadline=None)
@given(shares=st.lists(st.floats(-5, 50), min_size=1, max_size=20), total=st.integers(1, 200))
def test_rounding_keeps_the_total_and_never_goes_below_zero(shares, total):
    counts = largest_remainder(torch.tensor(shares), total)
    assert counts.sum() == total
    assert counts.min() >= 0


def test_rounding_leaves_whole_numbers_alone():
    assert largest_remainder(torch.tensor([3.0, 0.0, 5.0]), 8).tolist() == [3, 0, 5]


def test_a_last_layer_without_bias_is_refused_before_the_run():
    model = build_model("convnet", spec())
    model.fc = torch.nn.Linear(model.fc.in_features, 10, bias=False)
    with pytest.raises(ValueError, match="no bias"):
        Analytic().check(model)


def test_the_oracle_is_a_grant():
    client = Honest("convnet", spec())
    images, labels = batch(tiles(), 4, 0)
    view = client.gradient(images, labels)
    assert Oracle().oracles == {"labels"}
    with pytest.raises(NotGranted):
        Oracle().labels(view, client.model(), 4, client.knowledge("B", 4))
    knowledge = client.knowledge("B", 4, labels={view.label: labels})
    assert torch.equal(Oracle().labels(view, client.model(), 4, knowledge), labels)
    assert knowledge.oracles_used == {"labels"}


def test_the_rules_are_registered():
    assert set(registry.components("labels")) >= {"analytic", "idlg", "oracle"}
