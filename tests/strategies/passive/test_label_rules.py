"""Rules that read labels off the last layer: where they are exact, where they fall short."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedsim import registry
from fedsim.models import build_model
from strategies.attacks.labels import fedavg_counts
from strategies.attacks.labels.analytic import largest_remainder
from strategies.attacks.labels.bias_negative import BiasNegative
from strategies.attacks.labels.fedavg_counts import FedAvgCounts, way
from strategies.attacks.labels.gradinversion import GradInversion
from strategies.attacks.labels.hf_gradinv import HFGradInv
from strategies.attacks.labels.ilrg import ILRG, solve_counts
from strategies.attacks.labels.llg import LLG, negative_share, peel
from strategies.attacks.labels.probing import Probe
from strategies.attacks.labels.rlg import RLG
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from tests.strategies.passive.honest import Honest, batch, spec, tiles

NETWORK = "convnet(stride=2, hidden=[256])"
BIAS = ("analytic", "bias-negative", "ilrg", "fedavg-counts")
WEIGHTS = ("gradinversion", "llg", "rlg", "hf-gradinv", "fedavg-counts(read='weight')")
#: What any rescaling of the whole update leaves alone.
RESCALED = ("gradinversion", "llg", "bias-negative", "rlg", "hf-gradinv", "idlg")


def agreement(found, truth, classes):
    """Multiset agreement ``1 - sum |n_found - n| / 2B``."""
    one, other = (torch.bincount(labels, minlength=classes) for labels in (found, truth))
    return 1 - float((one - other).abs().sum()) / (2 * len(truth))


def drawn(classes, size, seed, occurring=None, distinct=False):
    """Random tiles with random labels: of so many classes, or each another."""
    images, _ = batch(tiles(), size, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(classes, generator=generator)
    if distinct:
        return images, chosen[:size]
    among = chosen[: occurring or classes]
    return images, among[torch.randint(len(among), (size,), generator=generator)]


def client_of(classes, seed=0, network=NETWORK):
    return Honest(network, replace(spec(), num_classes=classes), seed)


def read(rule, client, images, labels, threat_model="B"):
    rule = registry.build("labels", rule, "labels") if isinstance(rule, str) else rule
    view = client.gradient(images, labels)
    known = client.knowledge(threat_model, len(labels))
    return rule.labels(view, client.model(), len(labels), known)


def mean_agreement(rule, classes, size, trials=8, network=NETWORK, **how):
    scores = []
    for seed in range(trials):
        images, labels = drawn(classes, size, seed, **how)
        found = read(rule, client_of(classes, seed, network), images, labels)
        scores.append(agreement(found, labels, classes))
    return sum(scores) / len(scores)


# -- instance accuracy, untrained ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "low"), [("analytic", 0.995), ("bias-negative", 0.995), ("ilrg", 0.995), ("llg", 0.95)]
)
def test_24_images_of_100_classes(rule, low):
    assert mean_agreement(rule, 100, 24) >= low


@pytest.mark.parametrize(
    ("rule", "low"), [("analytic", 0.995), ("bias-negative", 0.995), ("ilrg", 0.995), ("llg", 0.9)]
)
def test_outputs_that_no_example_has_are_never_in_the_way(rule, low):
    assert mean_agreement(rule, 100, 24, occurring=10) >= low


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ("analytic", 0.98, 1),
        ("ilrg", 0.93, 1),
        ("llg(impact='model')", 0.85, 1),
        ("llg", 0.42, 0.6),
        ("bias-negative", 0.42, 0.6),
    ],
)
def test_where_every_class_occurs_the_negative_mass_cancels(rule, low, high):
    assert low <= mean_agreement(rule, 10, 64) <= high


# -- gradinversion ---------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("size", [8, 48])
def test_gradinversion_is_exact_for_labels_that_differ(activation, size):
    network = f"lenet(activation={activation!r}, init='default')"
    found = mean_agreement("gradinversion", 100, size, 4, network, distinct=True)
    # 48 of 100 classes on small features of both signs: 0.92 in ten trials.
    assert found >= 0.85 if (activation, size) == ("tanh", 48) else found == 1


def test_row_sums_fail_where_features_have_both_signs():
    network = "lenet(activation='tanh', init='default')"
    assert mean_agreement("llg", 100, 48, 4, network, distinct=True) < 0.75


def test_gradinversion_names_no_class_twice():
    images, labels = batch(tiles(), 6, 0)
    found = read("gradinversion", client_of(10), images, torch.full_like(labels, 3))
    assert len(set(found.tolist())) == 6
    assert 3 in found
    with pytest.raises(ValueError, match="labels='analytic'"):
        read("gradinversion", client_of(10), *drawn(10, 11, 0))


# -- llg and bias-negative -------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["llg", "bias-negative"])
def test_a_batch_of_one_class_is_counted_exactly(rule):
    for seed in range(5):
        images, _ = batch(tiles(), 12, seed)
        labels = torch.full((12,), seed)
        assert torch.equal(read(rule, client_of(10, seed), images, labels), labels)


def test_the_impact_from_surrogate_images_is_better_than_from_the_gradient():
    client = client_of(10)
    scores = {"gradient": [], "model": []}
    for seed in range(6):
        images, labels = batch(tiles(), 64, seed)
        view = client.gradient(images, labels)
        for impact, got in scores.items():
            known = client.knowledge("D", 64, surrogate=tiles())
            found = LLG(impact=impact).labels(view, client.model(), 64, known)
            got.append(agreement(found, labels, 10))
            assert ("surrogate" in {c.value for c in known.used}) == (impact == "model")
    assert sum(scores["model"]) / 6 > 0.85 > sum(scores["gradient"]) / 6


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    size=st.integers(1, 40),
    impact=st.floats(-3, -1e-3),
)
def test_peeling_names_as_many_as_there_are_and_every_class_that_occurs(values, size, impact):
    row = torch.tensor(values, dtype=torch.float64)
    occurs = (row < 0).nonzero().flatten()
    found = peel(row, occurs, impact, size)
    assert len(found) == size
    assert torch.equal(found, found.sort().values)
    missing = set(occurs.tolist()) - set(found.tolist())
    assert len(missing) == max(0, len(occurs) - size)


def test_a_gradient_of_zeros_says_nothing():
    client = client_of(10)
    images, labels = batch(tiles(), 4, 0)
    view = client.gradient(images, labels)
    for tensor in view.received.values():
        tensor.zero_()
    with pytest.raises(ValueError, match="nowhere negative"):
        negative_share(view, view.received["fc.bias"], 4)
    for rule in (LLG(), BiasNegative(), RLG(), HFGradInv()):
        with pytest.raises(ValueError, match="nowhere negative"):
            rule.labels(view, client.model(), 4, client.knowledge("B", 4))


# -- ilrg ------------------------------------------------------------------------------------------
def test_ilrg_equations_are_exact_with_the_true_prediction_of_each_class():
    client, size = client_of(10), 32
    images, labels = batch(tiles(), size, 4)
    with torch.no_grad():
        p = client.model()(images).double().softmax(1)
    predictions = torch.full((10, 10), 0.1, dtype=torch.float64)
    for label in labels.unique():
        predictions[label] = p[labels == label].mean(0)
    share = torch.bincount(labels, minlength=10) / size
    counts = solve_counts(predictions, p.mean(0) - share, size)
    assert torch.allclose(counts, size * share.double(), atol=1e-6)


def test_ilrg_takes_a_class_without_a_bias_gradient():
    client = client_of(10)
    images, labels = batch(tiles(), 4, 0)
    view = client.gradient(images, labels)
    view.received["fc.bias"][7] = 0
    found = ILRG().labels(view, client.model(), 4, client.knowledge("B", 4))
    assert len(found) == 4


# -- rlg -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_rlg_finds_exactly_the_classes_that_occur(activation):
    network = f"lenet(activation={activation!r}, init='default')"
    for seed in range(2):
        images, labels = drawn(50, 12, seed)
        found = read("rlg", client_of(50, seed, network), images, labels)
        assert set(found.tolist()) == set(labels.tolist())


def test_rlg_needs_fewer_examples_than_classes():
    with pytest.raises(ValueError, match="fewer than classes"):
        read("rlg", client_of(10), *drawn(10, 10, 0))


# -- counts under FedAvg ---------------------------------------------------------------------------
def true_probe(client, images):
    """What the model says of the private images themselves."""

    def probe(model, view, knowledge):
        seen = []
        hook = model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            p = model(images).double().softmax(1)
        hook.remove()
        return Probe(p, seen[0].double(), None)

    return probe


@pytest.mark.parametrize("kind", ["gradient", "weights"])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_one_step_is_exact_with_the_true_prediction(kind, size, monkeypatch):
    client = client_of(10)
    images, labels = batch(tiles(), size, size)
    monkeypatch.setattr(fedavg_counts, "probe", true_probe(client, images))
    view = client.gradient(images, labels)
    if kind == "weights":
        view = client.weights(images, labels, lr=0.1)
    known = client.knowledge("C", size, lr=0.1, batch_size=size)
    found = FedAvgCounts().labels(view, client.model(), size, known)
    assert torch.equal(found, labels.sort().values)
    if size == 1:  # the features of one example are the mean features
        assert FedAvgCounts(read="weight").labels(view, client.model(), 1, known) == labels


def test_predictions_are_followed_from_the_first_step_to_the_last_but_one():
    client = client_of(10)
    images, labels = batch(tiles(), 20, 0)
    view = client.weights(images, labels, lr=0.1, batch_size=5)
    known = client.knowledge("C", 20, lr=0.1, batch_size=5)
    assert way(view, 20, known).tolist() == [0, 0.25, 0.5, 0.75]
    assert way(view, 5, known).tolist() == [0]
    assert way(view, 20, client.knowledge("B", 20)).tolist() == [0.5]


@pytest.mark.parametrize("threat_model", ["B", "C"])
@pytest.mark.parametrize("part", ["bias", "weight"])
def test_counts_survive_local_steps(threat_model, part):
    scores = []
    for seed in range(4):
        client = client_of(10, seed)
        images, labels = batch(tiles(), 50, seed)
        view = client.weights(images, labels, lr=0.004, batch_size=10)
        known = client.knowledge(threat_model, 50, lr=0.004, batch_size=10)
        found = FedAvgCounts(read=part).labels(view, client.model(), 50, known)
        scores.append(agreement(found, labels, 10))
    assert sum(scores) / 4 >= (0.9 if threat_model == "C" else 0.7)


def test_counts_survive_epochs():
    """Total variation of the counts by epochs of five steps; at one step it is 0 (above)."""
    client = client_of(10)
    images, labels = batch(tiles(), 50, 0)
    for epochs in (1, 5, 10):
        training = {"lr": 0.01, "batch_size": 10, "epochs": epochs}
        view, known = (
            client.weights(images, labels, **training),
            client.knowledge("C", 50, **training),
        )
        found = FedAvgCounts().labels(view, client.model(), 50, known)
        assert 1 - agreement(found, labels, 10) < 0.05


def test_running_statistics_that_stay_at_home_are_no_hindrance():
    client = client_of(10, network="convnet(norm='batch')")
    images, labels = batch(tiles(), 8, 0)
    view = client.weights(images, labels, lr=0.01, batch_size=4)
    received = {name: t for name, t in view.received.items() if "running" not in name}
    known = client.knowledge("C", 8, lr=0.01, batch_size=4)
    found = FedAvgCounts().labels(replace(view, received=received), client.model(), 8, known)
    assert agreement(found, labels, 10) >= 0.7


# -- edge cases of them all ------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RESCALED)
@pytest.mark.parametrize("factor", [1e-3, 8, 500.0])
def test_a_sum_a_clip_or_any_rescaling_changes_nothing(rule, factor):
    client = client_of(20)
    images, labels = drawn(20, 1 if rule == "idlg" else 8, 3)
    view = client.gradient(images, labels)
    scaled = replace(view, received={name: t * factor for name, t in view.received.items()})
    rule = registry.build("labels", rule, "labels")
    known = client.knowledge("B", len(labels))
    one, other = (rule.labels(v, client.model(), len(labels), known) for v in (view, scaled))
    assert torch.equal(one, other)


@pytest.mark.parametrize("rule", BIAS)
def test_a_missing_bias_is_refused_before_the_run(rule):
    model = build_model(NETWORK, spec())
    model.fc = torch.nn.Linear(model.fc.in_features, 10, bias=False)
    with pytest.raises(ValueError, match=r"no bias.*'llg'"):
        registry.build("labels", rule, "labels").check(model)


@pytest.mark.parametrize("rule", WEIGHTS)
def test_rules_that_read_weights_need_no_bias(rule):
    client = client_of(20)
    images, labels = drawn(20, 8, 5, distinct=True)
    view = client.gradient(images, labels)
    received = {name: t for name, t in view.received.items() if name != "fc.bias"}
    model = client.model()
    model.fc.bias = None
    rule = registry.build("labels", rule, "labels")
    rule.check(model)
    known = client.knowledge("B", 8)
    found = rule.labels(replace(view, received=received), model, 8, known)
    assert agreement(found, labels, 20) >= 0.85


@pytest.mark.parametrize("rule", [*BIAS, *WEIGHTS])
def test_an_update_that_is_not_finite_is_refused(rule):
    client = client_of(20)
    images, labels = drawn(20, 8, 5)
    view = client.gradient(images, labels)
    view.received["fc.bias"][0] = view.received["fc.weight"][0, 0] = torch.nan
    rule = registry.build("labels", rule, "labels")
    with pytest.raises(ValueError, match="no finite gradient"):
        rule.labels(view, client.model(), 8, client.knowledge("B", 8))


def uploaded(client, images, labels, **loss):
    """A gradient of another cross-entropy."""
    view = client.gradient(images, labels)
    model = client.model()
    value = cross_entropy(model(images), labels, **loss)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return replace(view, received=dict(zip(view.received, gradients, strict=True)))


def test_label_smoothing_is_within_the_rounding():
    # The counts read are (1 - s) n_c + s B / K: for s = 0.1 and eight of ten, within 0.5 of n_c.
    client = client_of(10)
    images, labels = batch(tiles(), 8, 1)
    view = uploaded(client, images, labels, label_smoothing=0.1)
    with torch.no_grad():
        p = client.model()(images).double().softmax(1).mean(0)
    shares = 8 * (p - view.received["fc.bias"].double())
    counts = torch.bincount(labels, minlength=10)
    assert torch.allclose(shares, 0.9 * counts.double() + 0.08, atol=1e-5)
    assert torch.equal(largest_remainder(shares, 8), counts)


@pytest.mark.parametrize("rule", ["gradinversion", "llg", "bias-negative", "rlg"])
def test_weighted_classes_that_differ_are_still_named(rule):
    client = client_of(50)
    images, labels = drawn(50, 8, 2, distinct=True)
    weight = torch.linspace(0.7, 1.4, 50)
    view = uploaded(client, images, labels, weight=weight)
    rule = registry.build("labels", rule, "labels")
    found = rule.labels(view, client.model(), 8, client.knowledge("B", 8))
    assert torch.equal(found, labels.sort().values)


@pytest.mark.parametrize("rule", [*BIAS, *WEIGHTS])
def test_an_attack_takes_any_of_them(rule):
    client = client_of(10)
    images, labels = drawn(10, 2, 0, distinct=True)
    attack = InvertingGradients(labels=rule, iterations=2)
    attack.check(client.model(), "gradient")
    view = client.gradient(images, labels)
    found = attack.reconstruct([view], client.knowledge("B", 2))
    assert found.labels.sort().values.tolist() == labels.sort().values.tolist()


def test_the_rules_are_registered():
    names = {"gradinversion", "llg", "bias-negative", "ilrg", "rlg", "fedavg-counts"}
    assert set(registry.components("labels")) >= names
    assert isinstance(registry.build("labels", "gradinversion", "labels"), GradInversion)
