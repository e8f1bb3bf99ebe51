"""The card's bars on CIFAR-10, batches of 64, where its images are at hand.

``FEDSIM_TEST_DATA`` names a folder that holds ``cifar10/train_1.npz`` (arrays ``x``
``[N, 3, 32, 32]`` uint8 and ``y`` ``[N]``).
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import DataSet, Split
from strategies.attacks.analytic.sparsification.fishing_heads import holds_one, isolated, marks
from tests.fedsim.small import federated, plug_in
from tests.strategies.sparsification.fished import (
    answers,
    cosine,
    features,
    on_its_model,
    truth,
    without_head,
)

FILE = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere")) / "cifar10" / "train_1.npz"
pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason="FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz"
)
BATCH = 64
HASTY = "then='inverting-gradients(iterations=1)'"  # what it makes of them is not looked at
SETTINGS = {
    "model.name": "convnet(width=8)",
    "federation.clients": 1,
    "federation.local": f"fedsgd(batch_size={BATCH}, lr=0.1)",
}


def holding(monkeypatch: pytest.MonkeyPatch, label: int | None) -> dict[str, Any]:
    """Let one client hold 64 images, of one class or of all; return the scenario's settings."""
    with np.load(FILE) as stored:
        images, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long()
    mine = torch.arange(BATCH) if label is None else (labels == label).nonzero().flatten()[:BATCH]
    pool = Split(images, labels)
    dataset = DataSet(pool.subset(mine), pool.subset(torch.arange(1000, 1100)), tuple("0123456789"))
    name = f"cifar-{label}"  # data sets are loaded once a process, by name
    plug_in(monkeypatch, "dataset", name, lambda: dataset)
    return {**SETTINGS, "data.dataset": name}


def test_class_fishing_leaves_the_class_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = holding(monkeypatch, None)
    ran = federated(tmp_path, {**settings, "attack": f"fishing({HASTY}, target=3)"})
    (answer,) = answers(ran)
    batch = truth(ran, answer.view)
    mine = (batch.labels == 3).nonzero().flatten()
    alone = on_its_model(ran, answer.view, batch.subset(mine))
    gradients = (without_head(g, answer.head.name) for g in (answer.view.received, alone))
    alike = cosine(*gradients)
    mean = features(ran, answer.view, batch)[mine].mean(dim=0)
    error = float((answer.mean_features(3) - mean).abs().max())
    print(f"{len(mine)} of {BATCH} images: cosine {alike:.8f}, feature mean off by {error:.1e}")
    assert alike == pytest.approx(1.0, abs=1e-6)
    assert error < 1e-6


def test_feature_fishing_takes_a_batch_of_one_class_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = holding(monkeypatch, 5)
    attack = f"fishing({HASTY}, by='feature')"
    ran = federated(tmp_path, {**settings, "attack": attack, "federation.rounds": 16})
    asked = answers(ran)
    feature, batch = asked[0].loudest_feature(5), truth(ran, asked[1].view)
    first, alike = None, []
    for low, high in pairwise(marks(asked, 5, feature)):
        if high.answer is not None and holds_one(low, high, beta=1e6):
            view = isolated(low.answer, high.answer, 1, bias=1000.0).view
            each = [
                cosine(view.received, on_its_model(ran, view, batch.subset(torch.tensor([at]))))
                for at in range(BATCH)
            ]
            alike.append(max(each))
            first = min(first or view.round, view.round)
    print(f"{len(alike)} images in 16 rounds, the first in round {first}, cosine {min(alike):.6f}")
    assert first is not None
    assert first <= 9
    assert len(alike) >= 5
    assert min(alike) > 1 - 1e-5
