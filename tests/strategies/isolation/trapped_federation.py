"""Rounds of a real federation under trap weights, and what the paper counts in them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import adversary, reconstructions
from fedsim.data import DataSet, Split
from fedsim.models import build_model, load_arrays
from strategies.attacks.analytic.isolation.passage import find_passage
from tests.fedsim.small import Ran, federated, plug_in
from tests.strategies.isolation.one_client import best_psnr

FOLDER = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere")) / "cifar10"
needs_cifar = pytest.mark.skipif(
    not (FOLDER / "train_1.npz").exists(),
    reason="FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz",
)
# An image counts as perfectly recovered at this PSNR: an error of 0.03 of 255 gray levels.
PERFECT = 80.0


@cache
def cifar() -> DataSet:
    parts = []
    for name in ("train_1", "test_1"):
        with np.load(FOLDER / f"{name}.npz") as stored:
            parts.append(Split(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long()))
    return DataSet(*parts, tuple("0123456789"))


def plug_in_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients draw from one batch file of the train split, the attacker from one of the test."""
    plug_in(monkeypatch, "dataset", "cifar", cifar)
    test = cifar().test
    half = torch.arange(len(test))
    monkeypatch.setattr(
        adversary,
        "split_test",
        lambda *_: (test.subset(half[: len(half) // 2]), test.subset(half[len(half) // 2 :])),
    )


@dataclass(frozen=True)
class Caught:
    """One view: how many images fired each row ``[N]``, how often each, and what came back.

    Attributes
    ----------
    fired : Tensor
        ``[B, N]`` bool.
    psnr : Tensor
        ``[B]`` dB: of the candidate nearest to each image.
    norms : Tensor
        ``[B]``: ``||x||^2``.
    """

    fired: Tensor
    psnr: Tensor
    norms: Tensor

    @property
    def active(self) -> float:
        """A: the share of rows that fired."""
        return float(self.fired.any(dim=0).double().mean())

    @property
    def single(self) -> float:
        """P: the share of them that fired for one image."""
        heard = self.fired.sum(dim=0)
        return float((heard == 1).sum() / (heard > 0).sum())

    @property
    def alone(self) -> Tensor:
        """``[B]`` bool: images that some row heard alone."""
        return self.fired[:, self.fired.sum(dim=0) == 1].any(dim=1)

    @property
    def recall(self) -> float:
        """R: the share of images that came back."""
        return float((self.psnr >= PERFECT).double().mean())


def caught(ran: Ran) -> Iterator[Caught]:
    """Look into every view with the auditor's eyes."""
    assert ran.failures == []
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    for index, view in enumerate(ran.views):
        records = [ran.vault.record(client, view.round) for client in view.senders]
        truth = torch.cat([record.examples.double() for record in records if record])
        truth = truth / 255 if truth.max() > 1 else truth
        model = build_model(view.model, ran.parts.spec)
        load_arrays(model, view.sent)
        heard: list[Tensor] = []
        layer = model.get_submodule(find_passage(model).layer)
        layer.register_forward_hook(lambda *said, heard=heard: heard.append(said[2] > 0))
        with torch.no_grad():
            model.eval()(truth.float())
        candidates = found.examples[found.views == index]
        norms = truth.flatten(1).square().sum(dim=1)
        yield Caught(heard[0], best_psnr(truth, candidates), norms)


def rounds(folder: Path, attack: str, **changes: object) -> list[Caught]:
    """Federate, reconstruct, and look."""
    settings = {"threat-model": "G", "attack": attack}
    return list(caught(federated(folder, {**settings, **changes})))
