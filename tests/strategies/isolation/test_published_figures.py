"""The published shares on CIFAR-10, where its images are at hand.

``FEDSIM_TEST_DATA`` names a folder that holds ``cifar10/train_1.npz`` and ``cifar10/test_1.npz``
(arrays ``x`` ``[N, 3, 32, 32]`` uint8 and ``y`` ``[N]``).  A survey counts 60 of 64 images exact
with 1000 bins; a fitted CDF of other images costs one or two in a hundred.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.trainer import FedAvg, FedSGD
from fedsim.data import DataSet, DataSpec, Split
from fedsim.local import Local
from strategies.attacks.analytic.isolation.robbing_the_fed import RobbingTheFed
from tests.strategies.isolation.one_client import Range, best_psnr, pixels

FOLDER = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere")) / "cifar10"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "train_1.npz").exists(),
    reason="FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz",
)


@cache
def part(name: str) -> Split:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return Split(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long())


@cache
def cifar() -> DataSpec:
    return DataSet(part("train_1"), part("test_1"), tuple("0123456789")).spec


def share_back(attack: RobbingTheFed, local: Local, batches: int, decibel: float) -> float:
    range_ = Range(
        attack,
        local,
        body="convnet(width=8)",
        spec=cifar(),
        private=lambda: part("train_1"),
        surrogate=lambda: part("test_1"),
    )
    sent, back = range_.craft(), []
    for seed in range(batches):
        private = range_.batch(64, seed)
        view = range_.answer(sent, private, seed)
        found = range_.attack.reconstruct([view], range_.knowledge(64))
        back.append(best_psnr(pixels(private), found.examples) >= decibel)
    share = float(torch.cat(back).double().mean())
    print(f"{attack.units} bins, {attack.bins}: {share:.3f} above {decibel:g} dB")
    return share


@pytest.mark.parametrize(
    ("units", "low", "high", "batches"), [(256, 0.73, 0.83, 30), (1000, 0.92, 0.96, 15)]
)
def test_the_share_of_a_batch_of_64(units: int, low: float, high: float, batches: int) -> None:
    attack = RobbingTheFed(units=units)
    share = share_back(attack, FedSGD(batch_size=64), batches, decibel=30)
    assert low <= share <= high


@pytest.mark.parametrize(("units", "low", "high"), [(256, 0.62, 0.8), (1000, 0.84, 0.96)])
def test_without_data_of_its_own_the_share_is_less(units: int, low: float, high: float) -> None:
    attack = RobbingTheFed(units=units, functional="random", bins="normal")
    share = share_back(attack, FedSGD(batch_size=64), 15, decibel=30)
    assert low <= share <= high


def test_local_training_in_single_precision_loses_nothing() -> None:
    attack = RobbingTheFed(units=256, variant="sparse")
    share = share_back(attack, FedAvg(epochs=1, batch_size=8, lr=0.01), 30, decibel=30)
    assert 0.82 <= share <= 0.91
