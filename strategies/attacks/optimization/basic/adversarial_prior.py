"""Adversarial priors: the image should look, to the victim's own first layers, like its class.

``min_x 1 - cos(F(x, y), g) + tv * TV(x) + feature * sum_l |phi_l(x) - phi_l(a)|^2 / n_l
+ style * sum_l |Gram_l(x) - Gram_l(a)|^2 / C_l^2`` where ``a`` is made of images that the adversary
holds, ``phi_l`` is what goes into the network's second and third convolution (what the first two
made of the image), and ``Gram_l = phi phi^T / positions``, ``[C_l, C_l]``, the style of Gatys et
al. 2016.  Signed Adam, box and rate of Inverting Gradients.
Usynin, Rueckert and Kaissis, "Beyond Gradients: Exploiting Adversarial Priors in Model Inversion
Attacks", ACM TOPS 2023 (arXiv 2203.00481).

Here ``a`` is the mean of a few surrogate images of the class that the label rule read.  The paper
leaves weights and layers open; these are ours.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import Paper, Reconstruction, ToyCase
from fedsim.data import Split
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.optimization.activations import ActivationPrior
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.groups import Group
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import ig_steps


@register("attack", "adversarial-prior")
@dataclass(frozen=True, kw_only=True)
class AdversarialPrior(TakesLabels):
    """Threat model D.  Cost: ``iterations * restarts`` gradient evaluations for each view.

    Parameters
    ----------
    iterations : int
        Of each restart.
    restarts : int
        The one with the lowest cosine distance wins.
    tv : float
        Weight of the total variation.
    feature : float
        Weight of the mean squared distance of features.
    style : float
        Weight of the mean squared distance of Gram matrices.
    images : int
        Surrogate images of a class whose mean is the guide; where there are fewer, those.
    lr : float
        Adam's rate at the start.
    labels : str
        Label rule expression.
    """

    paper = Paper(
        title="Beyond Gradients: Exploiting Adversarial Priors in Model Inversion Attacks",
        authors="Dmitrii Usynin, Daniel Rueckert, Georgios Kaissis",
        venue="ACM Transactions on Privacy and Security",
        year=2023,
        published="no table was read (abstract only)",
        measured="convnet(stride=2), CIFAR-10, 8 images, 300 iterations, tv 1e-2, weights 1e-3 / "
        "1e-2: guide of the class 30.0 / 28.4 dB, of a wrong class 29.8 / 28.0, the image itself "
        "29.8 / 30.3, no guide 29.6: no gain over inverting-gradients (FEDSIM_TEST_DATA=... python "
        "-m pytest -m slow -s tests/strategies/passive/test_adversarial_prior.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS, Capability.SURROGATE})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "D",
            "attack": "adversarial-prior(iterations=300, tv=1e-2)",
            "model.name": "convnet(stride=2)",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=20.0,
        high=50.0,
    )

    iterations: Annotated[int, Field(ge=1)] = 4000
    restarts: Annotated[int, Field(ge=1)] = 1
    tv: Annotated[float, Field(ge=0)] = 1e-2
    feature: Annotated[float, Field(ge=0)] = 1e-3
    style: Annotated[float, Field(ge=0)] = 1e-3
    images: Annotated[int, Field(ge=1)] = 5
    lr: Annotated[float, Field(gt=0)] = 0.1
    labels: str = "analytic"

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model that the label rule cannot read, or with fewer than three convolutions."""
        super().check(model, kind)
        early(model)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""
        recipe = Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            parametrization=lambda group: NormalizedPixels(
                group.spec, group.known_labels, group.observed.dtype, boxed=True
            ),
            objective=lambda group: Cosine(group.observed),
            priors=lambda group: [TotalVariation(self.tv, group.spec.std)] if self.tv else [],
            activations=lambda group: self._resemblance(group, knowledge),
            optimizer=lambda _: Adam(self.lr, signed=True, schedule=ig_steps),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        return invert(views, knowledge, recipe)

    def _resemblance(self, group: Group, knowledge: Knowledge) -> list["Resemblance"]:
        """Return the penalty of a group, or none where both weights are 0."""
        if not self.feature and not self.style:
            return []
        labels = group.known_labels
        means = class_means(knowledge.surrogate, labels, self.images, knowledge)
        layers = early(group.model)
        features = seen(group.model, means.to(group.observed), layers)
        return [Resemblance(layers, features, self.feature, self.style)]


def class_means(split: Split, labels: Tensor, count: int, knowledge: Knowledge) -> Tensor:
    """Return the mean of some images of each label's class, ``[V, B, C, H, W]`` for ``[V, B]``.

    A class of which there is no surrogate image (a misread label, say) gets the mean of all.
    """
    guides = {}
    for label in set(labels.flatten().tolist()):
        own = (split.labels == label).nonzero().flatten()
        chosen = torch.arange(len(split))
        if len(own):
            order = torch.randperm(len(own), generator=knowledge.generator("guide", label))
            chosen = own[order[:count]]
        images, _ = split.batch(chosen)
        guides[label] = images.mean(dim=0)
    return torch.stack([torch.stack([guides[y] for y in row]) for row in labels.tolist()])


def early(model: nn.Module) -> list[str]:
    """Return the second and third convolution, whose inputs are what the first two made.

    Raises
    ------
    ValueError
        If there are fewer than three.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    if len(names) < 3:
        raise ValueError(
            f"adversarial-prior compares what two convolutions feed a third, and the model has "
            f"{len(names)}; use convnet, lenet or resnet20, or inverting-gradients"
        )
    return names[1:3]


def seen(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Return what each layer gets to see of images ``[V, B, C, H, W]``: ``[V, B, C_l, h, w]``."""
    model, found = copy.deepcopy(model), {name: list[Tensor]() for name in layers}
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, kept=found[name]: kept.append(inputs[0])
        )
    with torch.no_grad():
        for batch in images:  # one by one: BatchNorm in train mode must not mix them
            model(batch)
    return [torch.stack(kept) for kept in found.values()]


def gram(features: Tensor) -> Tensor:
    """Return channels' inner products over positions, ``[..., C, C]`` of ``[..., C, h, w]``."""
    columns = features.flatten(-2)
    return columns @ columns.transpose(-1, -2) / columns.shape[-1]


class Resemblance(ActivationPrior):
    """``sum_l feature * mean (phi_l - a_l)^2 + style * mean (Gram(phi_l) - Gram(a_l))^2``.

    Parameters
    ----------
    layers : sequence of str
    wanted : sequence of Tensor
        For each layer ``[T, B, C_l, h, w]``: what it sees of the guides.
    feature, style : float
    """

    def __init__(
        self, layers: Sequence[str], wanted: Sequence[Tensor], feature: float, style: float
    ) -> None:
        self.layers, self.wanted = tuple(layers), list(wanted)
        self.feature, self.style = feature, style

    def __call__(self, inputs: Sequence[Tensor], progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """Return the penalty ``[T]``."""
        total = inputs[0].new_zeros(len(inputs[0]))
        for found, wanted in zip(inputs, self.wanted, strict=True):
            apart = (found - wanted).square().flatten(1).mean(dim=1)
            unlike = (gram(found) - gram(wanted)).square().flatten(1).mean(dim=1)
            total = total + self.feature * apart + self.style * unlike
        return total

    def take(self, rows: Tensor) -> Self:
        """Return the penalty of some of the targets."""
        kept = [wanted[rows] for wanted in self.wanted]
        return type(self)(self.layers, kept, self.feature, self.style)
