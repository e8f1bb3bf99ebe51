"""What Fishing promises, in closed form, measured on views of real federations."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import registry
from fedsim.data import DataSet, load_dataset
from fedsim.errors import ScenarioError
from fedsim.threat import least_model
from strategies.attacks.analytic.sparsification.fishing import Fishing
from strategies.attacks.analytic.sparsification.fishing_heads import (
    Mark,
    holds_one,
    isolated,
    marks,
    next_threshold,
)
from tests.fedsim.small import federated, plug_in
from tests.strategies.sparsification.fished import (
    answers,
    cosine,
    features,
    found,
    on_its_model,
    truth,
    without_head,
)

BATCH = 16
MIXED = {
    "model.name": "convnet(width=4)",
    "federation.local": f"fedsgd(batch_size={BATCH}, lr=0.1)",
    "data.partition": f"size(partition_sizes=[{BATCH}, {BATCH}, {BATCH}])",
    "federation.clients": 3,
}
ONE_CLASS = {
    **MIXED,
    "data.dataset": "three-kinds",
    "data.partition": "pathological(num_classes_per_partition=1, "
    "class_assignment_mode='deterministic')",
}
LINEAR = "then='linear-inversion'"
HASTY = "then='inverting-gradients(iterations=1)'"  # what it makes of them is not looked at


@pytest.fixture(autouse=True)
def _three_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes of as many digits as fit one batch."""

    def load() -> DataSet:
        digits = load_dataset("digits")
        chosen = [(digits.train.labels == label).nonzero().flatten()[:BATCH] for label in range(3)]
        return DataSet(digits.train.subset(torch.cat(chosen)), digits.test, ("0", "1", "2"))

    plug_in(monkeypatch, "dataset", "three-kinds", load)


# -- one class of a mixed batch ------------------------------------------------------------------
def test_the_batch_s_gradient_is_that_of_the_class_alone(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**MIXED, "attack": f"fishing({HASTY}, target=1)"})
    assert any((truth(ran, view).labels == 1).any() for view in ran.views)
    for answer in answers(ran):
        batch = truth(ran, answer.view)
        mine = (batch.labels == 1).nonzero().flatten()
        if not len(mine):
            silent = without_head(answer.view.received, answer.head.name)
            assert not any(gradient.any() for gradient in silent.values())
            continue
        assert len(mine) < BATCH
        assert float(answer.answered[1]) == pytest.approx(len(mine), abs=1e-5)
        alone = on_its_model(ran, answer.view, batch.subset(mine))
        name = answer.head.name
        assert cosine(
            without_head(answer.view.received, name), without_head(alone, name)
        ) == pytest.approx(1.0, abs=1e-6)
        mean = features(ran, answer.view, batch)[mine].mean(dim=0)
        torch.testing.assert_close(answer.mean_features(1), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("most", [1, 3])
def test_what_is_handed_over_is_the_very_gradient_of_those_images(
    most: int, tmp_path: Path
) -> None:
    attack = f"fishing({HASTY}, most={most})"
    ran = federated(tmp_path, {**MIXED, "attack": attack, "federation.rounds": 4})
    checked = 0
    for answer in answers(ran):
        if (label := answer.head.label) is None:
            continue
        batch = truth(ran, answer.view)
        mine = (batch.labels == label).nonzero().flatten()
        assert 1 <= len(mine) <= most
        view = isolated(None, answer, len(mine), bias=1000.0).view
        alone = on_its_model(ran, view, batch.subset(mine))
        assert view.received.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(
                view.received[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
            )
        checked += 1
    assert checked >= 6


def test_the_roll_call_counts_every_label(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**MIXED, "attack": f"fishing({HASTY})"})
    for answer in answers(ran):
        assert answer.head.label is None
        assert not any(
            g.any() for g in without_head(answer.view.received, answer.head.name).values()
        )
        labels = truth(ran, answer.view).labels
        assert torch.equal(answer.counts, labels.bincount(minlength=10))


def test_every_round_sends_the_first_round_s_backbone(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**MIXED, "attack": f"fishing({HASTY})", "federation.rounds": 3})
    first = ran.views[0]
    for view in ran.views:
        assert all(torch.equal(t, first.sent[n]) for n, t in view.sent.items() if "body" in n)


def test_behind_secure_aggregation_the_sum_is_one_batch(tmp_path: Path) -> None:
    changes = {
        "model.name": "mlp(hidden=[32])",
        "data.partition": "size(partition_sizes=[4, 4])",
        "federation.clients": 2,
        "federation.rounds": 3,
        "federation.local": "fedsgd(batch_size=4, lr=0.1)",
        "channel": "secagg(max_weight=4)",
        "attack": f"fishing({LINEAR})",
    }
    ran = federated(tmp_path, changes)
    records = [ran.vault.record(client, 1) for client in (0, 1)]
    labels = torch.cat([record.labels for record in records if record])
    images = torch.cat([record.examples for record in records if record])
    singles = labels.bincount(minlength=10) == 1
    caught = found(ran)
    assert len(caught.examples) == min(2, int(singles.sum())) > 0
    for image in caught.examples:
        nearest = (images - image).square().mean(dim=(1, 2, 3)).argmin()
        assert singles[labels[nearest]]
        # SecAgg+ rounds each client's gradient to steps of 3.8e-6.
        assert float((images[nearest] - image).abs().max()) < 1e-3


# -- one image of a batch of one class -----------------------------------------------------------
def test_single_images_answer_alone_one_after_another(tmp_path: Path) -> None:
    attack = f"fishing({HASTY}, by='feature')"
    ran = federated(tmp_path, {**ONE_CLASS, "attack": attack, "federation.rounds": 7})
    for client in range(3):
        mine = [answer for answer in answers(ran) if answer.view.senders == (client,)]
        label = mine[0].only_class()
        assert label is not None
        ladder = marks(mine, label, mine[0].loudest_feature(label))
        batch = truth(ran, mine[1].view)
        seen = []
        for low, high in pairwise(ladder):
            if high.answer is None or not holds_one(low, high, beta=1e6):
                continue
            view = isolated(low.answer, high.answer, 1, bias=1000.0).view
            alike = [
                cosine(view.received, on_its_model(ran, view, batch.subset(torch.tensor([at]))))
                for at in range(len(batch))
            ]
            assert max(alike) == pytest.approx(1.0, abs=1e-5)
            seen.append(alike.index(max(alike)))
        assert len(seen) >= 2
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("beta", [300.0, 3000.0, 1e6])
def test_images_answer_as_the_sigmoid_says_so_that_the_gap_decides(
    beta: float, tmp_path: Path
) -> None:
    attack = f"fishing({HASTY}, by='feature', beta={beta})"
    ran = federated(tmp_path, {**ONE_CLASS, "attack": attack, "federation.rounds": 4})
    asked = [answer for answer in answers(ran) if answer.head.feature is not None]
    assert len(asked) == 9
    for answer in asked:
        label, feature = answer.head.label, answer.head.feature
        assert label is not None
        values = features(ran, answer.view, truth(ran, answer.view))[:, feature]
        weights = torch.sigmoid(-beta * (values - answer.head.threshold))
        slack = 0.02 + beta * 1e-7 * float(values.max())
        assert float(answer.answered[label]) == pytest.approx(float(weights.sum()), abs=slack)


def test_of_mixed_labels_feature_fishing_isolates_nothing_and_says_so(tmp_path: Path) -> None:
    attack = f"fishing({HASTY}, by='feature')"
    ran = federated(tmp_path, {**MIXED, "attack": attack, "federation.rounds": 2})
    assert len(found(ran).examples) == 0
    assert "client 0: its batch is not of one class" in found(ran).receipts[1]


def test_batches_that_change_from_round_to_round_are_noticed(tmp_path: Path) -> None:
    changes = {
        **ONE_CLASS,
        "federation.local": f"fedsgd(batch_size={BATCH // 2}, lr=0.1)",
        "federation.rounds": 6,
        "attack": f"fishing({HASTY}, by='feature')",
    }
    told = found(federated(tmp_path, changes)).receipts
    assert sum("changed from round to round" in receipt for receipt in told) >= 2


def ladder_of(values: list[float], asked: list[float]) -> list[Mark]:
    """What an ideal batch says to these thresholds; the answers are there, their content is not."""
    answered: Any = object()
    below = [(t, [v for v in values if v < t]) for t in sorted(asked)]
    ladder = [Mark(-math.inf, 0, 0), *(Mark(t, len(b), sum(b), answered) for t, b in below)]
    if math.inf not in asked:
        ladder.append(Mark(math.inf, len(values), sum(values)))
    return ladder


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_one_image_soon_and_all_of_them_in_the_end(seed: int) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(seed)).double().tolist()
    asked: list[float] = []
    first = None
    while (threshold := next_threshold(ladder_of(values, asked))) is not None:
        asked.append(threshold)
        ladder = ladder_of(values, asked)
        gaps = [b.count - a.count for a, b in pairwise(ladder)]
        if first is None and 1 in gaps:
            first = len(asked)
        assert len(asked) <= 50
    assert first is not None
    assert first <= 2 + math.log2(50) * 1.5
    assert gaps == [1] * 50


def test_images_that_are_all_alike_end_the_search() -> None:
    asked: list[float] = []
    while (threshold := next_threshold(ladder_of([0.5] * 7, asked))) is not None:
        asked.append(threshold)
        assert len(asked) < 5


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("fishing(then='fishing')", "passive"),
        ("fishing(then='robbing-the-fed')", "passive"),
        ("fishing(then='temporal-robust')", "single uploads"),
        ("fishing(then='bayes(rounds=True)')", "single uploads"),
        ("fishing(then=\"inverting-gradients(labels='oracle')\")", "leave it out"),
        ("fishing(then='no-such')", "no attack has this name"),
        ("fishing(by='feature', target=3)", "class fishing's"),
        ("fishing(by='feature', most=2)", "class fishing's"),
        ("fishing(most=0)", "at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        registry.build("attack", expression, "attack")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation.local": "fedavg(batch_size=8)"}, "fedsgd"),
        ({"attack": "fishing(target=10)"}, "no class 10"),
        ({"attack": "fishing(bias=50.0)"}, "let bias be at least"),
        ({"attack": f"fishing({LINEAR})"}, "reads this model's"),
        ({"threat-model": "E"}, "manipulation"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_trains(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"attack": "fishing", "data.dataset": "photo-tiles", "model.name": "lenet"}
    with pytest.raises(ScenarioError, match=message):
        federated(tmp_path, {**settings, **changes})


def test_statistics_of_the_batch_are_refused(tmp_path: Path) -> None:
    changes = {"model.name": "resnet20(width=8)", "model.batchnorm": "private"}
    with pytest.raises(ScenarioError, match="GroupNorm"):
        federated(tmp_path, {**changes, "attack": "fishing"})


def test_it_needs_what_its_inner_attack_needs_and_no_more() -> None:
    make: Callable[..., Fishing] = Fishing
    assert least_model(make().required) == "F"
    assert make(then="linear-inversion").required == Fishing.needs
    assert make(then="inverting-gradients").unit == "iterations"
    assert least_model(make(then="gradattack(bn=0.1, statistics='proxy')").required) == "G"
