"""Honest clients' uploads and what a server may know, without a federation around them."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.data import DataSpec, Split, load_dataset
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.threat import Knowledge, TrainingDetails
from fedsim.view import ServerView


@cache
def tiles() -> Split:
    return load_dataset("photo-tiles").train


@cache
def spec() -> DataSpec:
    return load_dataset("photo-tiles").spec


@cache
def cifar10() -> Split:
    """The first file of real CIFAR-10 pictures, where somebody has put it."""
    folder = os.environ.get("FEDSIM_TEST_DATA")
    path = Path(folder or ".") / "cifar10" / "train_1.npz"
    if folder is None or not path.exists():
        pytest.skip("FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz")
    with np.load(path) as stored:
        return Split(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long())


def batch(split: Split, size: int, seed: int, dtype: torch.dtype = torch.float32):
    """Return random images ``[size, C, H, W]`` in ``[0, 1]`` and their labels."""
    generator = torch.Generator().manual_seed(seed)
    return split.batch(torch.randperm(len(split), generator=generator)[:size], dtype)


@dataclass(frozen=True)
class Honest:
    """A model that a server sends, and clients that answer it honestly."""

    expression: str
    spec: DataSpec
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        return initial_model(self.expression, self.spec, self.seed).to(self.dtype).eval()

    def sent(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in travelling(self.model()).items()}

    def gradient(
        self, images: Tensor, labels: Tensor, client: int = 0, sent: dict[str, Tensor] | None = None
    ) -> ServerView:
        """One step: the upload is the gradient of the mean cross-entropy."""
        sent = sent or self.sent()
        model = build_model(self.expression, self.spec).to(self.dtype).eval()
        load_arrays(model, sent)
        loss = cross_entropy(model(images.to(self.dtype)), labels)
        names = [name for name, _ in model.named_parameters()]
        upload = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        return ServerView(1, (client,), self.expression, sent, upload, "gradient")

    def weights(
        self,
        images: Tensor,
        labels: Tensor,
        lr: float,
        client: int = 0,
        batch_size: int = 0,
        epochs: int = 1,
        shuffled: bool = False,
    ) -> ServerView:
        """Epochs of SGD, each in an order of its own if shuffled: the upload is the weights."""
        model = self.model()
        sent = self.sent()
        size = batch_size or len(labels)
        generator = torch.Generator().manual_seed(client)
        for chosen in self._batches(len(labels), size, epochs, generator if shuffled else None):
            loss = cross_entropy(model(images[chosen].to(self.dtype)), labels[chosen])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.sub_(lr * gradient)
        after = {name: t.clone() for name, t in travelling(model).items()}
        return ServerView(1, (client,), self.expression, sent, after, "weights")

    @staticmethod
    def _batches(examples: int, size: int, epochs: int, generator: torch.Generator | None):
        for _ in range(epochs):
            shuffled = generator and torch.randperm(examples, generator=generator)
            yield from (torch.arange(examples) if shuffled is None else shuffled).split(size)

    def knowledge(
        self,
        threat_model: str = "B",
        examples: dict[str, int] | int = 1,
        lr: float = 0.1,
        batch_size: int = 8,
        surrogate: Split | None = None,
        labels: dict[str, Tensor] | None = None,
        batchnorm: str = "frozen",
        epochs: int | None = None,
    ) -> Knowledge:
        """What the server knows; ``examples`` counts what is behind client 0's view, or each.

        Clients upload a gradient, or weights after so many ``epochs``.
        """
        counts = {"round-1-client-0": examples} if isinstance(examples, int) else examples
        oracles = {"labels": lambda view: labels[view.label]} if labels else {}
        return Knowledge(
            threat_model,
            data=self.spec,
            training=TrainingDetails(
                "weights" if epochs else "gradient", lr, batch_size, epochs or 1, 0.0, 0.0
            ),
            seed=11,
            device=torch.device("cpu"),
            batchnorm=batchnorm,
            surrogate=(lambda: surrogate) if surrogate else None,
            oracles=oracles,
            num_examples=counts,
        )


def psnr(truth: Tensor, found: Tensor) -> Tensor:
    """PSNR in dB of each image ``[B, C, H, W]``, capped at 200."""
    mse = (truth.double() - found.double()).square().flatten(1).mean(dim=1)
    return -10 * mse.clamp_min(1e-20).log10()


def matched_psnr(truth: Tensor, found: Tensor) -> Tensor:
    """PSNR of each true image under the best one-to-one matching on MSE."""
    from scipy.optimize import linear_sum_assignment

    mse = torch.cdist(truth.double().flatten(1), found.double().flatten(1)) ** 2
    rows, columns = linear_sum_assignment(mse.numpy())
    return psnr(truth[rows], found[columns])


def floor_psnr(truth: Tensor, split: Split) -> Tensor:
    """PSNR of the mean image, which takes no update to guess."""
    images, _ = split.batch(torch.arange(len(split)))
    return psnr(truth, images.mean(dim=0).expand_as(truth))
