"""GI-PIP: gradient inversion under an auto-encoder's opinion of what is an image.

``min_x 1 - cos(F(x, y), g) + tv TV(x) + anomaly mean_b |MSE(x_b, AE(x_b)) - c|``: an auto-encoder
that learned to pass surrogate images through a narrow middle passes noise badly, and c is the error
that it makes on images it has not seen.  Signed Adam, a box, the schedule of Inverting Gradients.
Sun, Xiong, Yao, Ma and Cui, "GI-PIP: Do We Require Impractical Auxiliary Dataset for Gradient
Inversion Attacks?", ICASSP 2024, Sec. 3, and the authors' code.

The auto-encoder is theirs: convolutions of 12, 24 and 48 channels with stride 2, and back.
Decided here: c is measured on a tenth of the surrogate images, held out of training (the authors
set it by hand: 0.001 for CIFAR-10); the optimizer's sign is a parameter.

What breaks it: surrogate images of another kind, whose errors say nothing; a network and batch for
which the gradient alone decides every pixel.  The score stands in for total variation where that is
wanting, and adds nothing to one that is weighed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad

from fedsim.attack import Paper, Reconstruction, ToyCase
from fedsim.data import Split
from fedsim.registry import register
from fedsim.seeds import seeded_globals
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.groups import Group
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import Differentiated, Prior, TotalVariation
from strategies.attacks.optimization.schedules import ig_steps
from strategies.attacks.optimization.training import training_steps

BATCH, RATE, HELD_OUT = 64, 1e-3, 10


@register("attack", "gi-pip")
@dataclass(frozen=True, kw_only=True)
class GIPIP(TakesLabels):
    """Threat model D.  Cost: ``iterations * restarts`` evaluations a view, and the auto-encoder.

    Parameters
    ----------
    iterations : int
        Of each restart; the authors make 10,000 on CIFAR-10.
    restarts : int
        The one with the lowest cosine distance wins, the priors left out.
    anomaly : float
        Weight of the anomaly score; the authors' 1e-6, 1e-4 and 5e-4 for 1, 4 and 8 images.
    tv : float
        Weight of the total variation; theirs 1e-6, 1e-5 and 5e-4.
    epochs : int
        Of the auto-encoder, over the surrogate images.
    lr : float
        Adam's rate at the start.
    signed : bool
        Whether Adam sees the sign of the gradient only.
    labels : str
        Label rule expression; the authors take labels as known: ``oracle``, a grant.
    """

    paper = Paper(
        title="GI-PIP: Do We Require Impractical Auxiliary Dataset for Gradient Inversion Attacks?",
        authors="Yu Sun, Gaojian Xiong, Xianxun Yao, Kailang Ma, Jian Cui",
        venue="ICASSP",
        year=2024,
        published="16.12 dB on ImageNet with 3.8 % of its images as surrogate (abstract); the "
        "tables were not read",
        measured="CIFAR-10, convnet(stride=2), 300 iterations, 8 images one by one / two batches "
        "of four: anomaly 0.1 25.0 / 14.9 dB at tv 1e-3, 27.4 / 16.4 at 1e-2; without, "
        "23.7 / 13.0 at 1e-3, 27.7 / 16.3 at 1e-2, 25.0 / 17.5 at 3e-2 (FEDSIM_TEST_DATA=... "
        "python -m pytest -m slow -s tests/strategies/passive/test_gi_pip.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS, Capability.SURROGATE})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "D",
            "attack": "gi-pip(iterations=250, tv=1e-3, epochs=5)",
            "model.name": "convnet(stride=2)",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=16.0,
        high=50.0,
    )

    iterations: Annotated[int, Field(ge=1)] = 4000
    restarts: Annotated[int, Field(ge=1)] = 1
    anomaly: Annotated[float, Field(ge=0)] = 1e-1
    tv: Annotated[float, Field(ge=0)] = 1e-4
    epochs: Annotated[int, Field(ge=1)] = 50
    lr: Annotated[float, Field(gt=0)] = 0.1
    signed: bool = True
    labels: str = "analytic"

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""
        opinion, receipts = None, list[str]()
        receipt = "the anomaly score has no weight; no auto-encoder was trained"
        if self.anomaly:
            opinion = trained(knowledge.surrogate, self.epochs, knowledge, receipts)
            receipt = (
                f"auto-encoder of {len(knowledge.surrogate)} surrogate images: mean squared error "
                f"{opinion.usual:.2g} on those held out, {opinion.of_noise:.2g} on noise"
            )

        def priors(group: Group) -> list[Prior]:
            smooth = [TotalVariation(self.tv, group.spec.std)] if self.tv else []
            return [*smooth, *([Anomaly(opinion, self.anomaly)] if opinion else [])]

        recipe = Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            parametrization=lambda group: NormalizedPixels(
                group.spec, group.known_labels, group.observed.dtype, boxed=True
            ),
            objective=lambda group: Cosine(group.observed),
            priors=priors,
            optimizer=lambda _: Adam(self.lr, signed=self.signed, schedule=ig_steps),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        found = invert(views, knowledge, recipe)
        return replace(found, receipts=(receipt, *receipts, *found.receipts))


class AutoEncoder(nn.Module):
    """Three convolutions of stride 2 to 12, 24 and 48 channels, and three back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, 12, 24, 48]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        for before, after in pairwise(widths[::-1]):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to the same shape, sides padded to multiples of 8."""
        height, width = images.shape[-2:]
        padded = pad(images, (0, 8 * ceil(width / 8) - width, 0, 8 * ceil(height / 8) - height))
        passed: Tensor = self.layers(padded)
        return passed[..., :height, :width]


@dataclass(frozen=True)
class Opinion:
    """A trained auto-encoder, and what it does to images and to noise.

    ``usual`` is its mean squared error on images it has not seen, c; ``of_noise`` on uniform noise.
    """

    encoder: AutoEncoder
    usual: float
    of_noise: float

    def errors(self, images: Tensor) -> Tensor:
        """Return the mean squared error ``[N]`` of images ``[N, C, H, W]``, differentiably."""
        encoder = self.encoder.to(images)
        errors: Tensor = (images - encoder(images)).square().flatten(1).mean(dim=1)
        return errors


def trained(split: Split, epochs: int, knowledge: Knowledge, receipts: list[str]) -> Opinion:
    """Train the auto-encoder on nine tenths of the surrogate images, and measure it on the rest.

    ``receipts`` gets a line where that was ended by hand.
    """
    generator = knowledge.generator("gi-pip")
    order = torch.randperm(len(split), generator=generator)
    images, _ = split.batch(order, torch.float32)
    images = images.to(knowledge.device)
    count = max(1, len(images) // HELD_OUT)
    held, learned = images[:count], images[count:]
    with seeded_globals(int(torch.randint(2**31, (), generator=generator))):
        encoder = AutoEncoder(images.shape[1]).to(knowledge.device)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=RATE)
    batches = (
        chosen
        for _ in range(epochs)
        for chosen in torch.split(torch.randperm(len(learned), generator=generator), BATCH)
    )
    steps = training_steps(epochs * ceil(len(learned) / BATCH), "auto-encoder", knowledge, receipts)
    for _, chosen in zip(steps, batches, strict=False):
        some = learned[chosen.to(learned.device)]
        optimizer.zero_grad()
        torch.autograd.backward(mse_loss(encoder(some), some))
        optimizer.step()
    opinion = Opinion(encoder.requires_grad_(requires_grad=False), 0.0, 0.0)
    noise = torch.rand(held.shape, generator=generator).to(held)
    with torch.no_grad():
        usual, of_noise = (float(opinion.errors(some).mean()) for some in (held, noise))
    return replace(opinion, usual=usual, of_noise=of_noise)


class Anomaly(Differentiated):
    """``weight mean_b |MSE(x_b, AE(x_b)) - c|`` (the paper's Eq. 5)."""

    def __init__(self, opinion: Opinion, weight: float) -> None:
        self.opinion, self.weight = opinion, weight

    def value(self, images: Tensor) -> Tensor:
        """Return the score ``[T]`` of batches ``[T, B, C, H, W]``."""
        errors = self.opinion.errors(images.flatten(0, 1)).view(images.shape[:2])
        return self.weight * (errors - self.opinion.usual).abs().mean(dim=1)
