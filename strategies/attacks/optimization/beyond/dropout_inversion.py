"""Dropout Inversion: search the masks that dropout drew together with the image.

A client that trains with dropout sends the gradient of a thinned network, which no image explains
in the whole one.  So the attacker's network has dropout off and an explicit mask ``m_l`` after each
dropout layer's input, and searches

    min_{x, m} 1 - cos(F(x, y; m), g) + tv * TV(x) + rate * sum_l |1 - mean(m_l) - p_l|

with masks begun at Bernoulli(1 - p), held to ``[0, 1]`` and scaled by 1 / (1 - p) as the client's
are.  Signed Adam on x, plain Adam on masks; the rate falls as in Inverting Gradients.
Scheliga, Maeder and Seeland, "Dropout is NOT All You Need to Prevent Gradient Leakage", AAAI 2023,
Sec. 4 and the authors' code.

There is a mask for each example and each place of each dropout layer: they are as many unknowns
more.  p stands in the model that the server itself sends.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import grad, vmap

from fedsim.attack import Paper, Reconstruction, Setting, ToyCase
from fedsim.data import DataSpec
from fedsim.penalized import penalized_loss
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.optimization.activations import ActivationPrior
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.gradients import Operator, freeze
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import Candidate, NormalizedPixels, Signed
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import ig_steps


@register("attack", "dropout-inversion")
@dataclass(frozen=True, kw_only=True)
class DropoutInversion(TakesLabels):
    """Threat model B.  Cost: ``iterations * restarts`` gradient evaluations for each view.

    Parameters
    ----------
    iterations : int
        Of each restart; the authors' code makes up to 20,000.
    restarts : int
        The one with the lowest cosine distance wins.
    tv : float
        Weight of the total variation.
    rate : float
        Weight of each mask's distance from its layer's dropout rate.
    lr : float
        Adam's rate at the start.
    labels : str
        Label rule expression.
    """

    paper = Paper(
        title="Dropout is NOT All You Need to Prevent Gradient Leakage",
        authors="Daniel Scheliga, Patrick Maeder, Marco Seeland",
        venue="AAAI",
        year=2023,
        published="the authors' notebook, CIFAR-10, ViT, p = 0.5, one image, MSE of standardized "
        "images: dropout ignored 3.42-3.75, DIA 0.0096-0.0144, true masks known 0.0030-0.0067",
        measured="convnet(stride=2, dropout=0.5), CIFAR-10, 6 images, 600 iterations, tv 1e-2: "
        "dropout ignored / masks searched / true masks known 13.5 / 30.6 / 29.4 dB "
        "(FEDSIM_TEST_DATA=... python -m pytest -m slow -s "
        "tests/strategies/passive/test_dropout_inversion.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "dropout-inversion(iterations=300, tv=1e-2)",
            "model.name": "convnet(stride=2, dropout=0.5)",
            "model.batchnorm": "private",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=20.0,
        high=45.0,
    )

    iterations: Annotated[int, Field(ge=1)] = 4000
    restarts: Annotated[int, Field(ge=1)] = 1
    tv: Annotated[float, Field(ge=0)] = 1e-5
    rate: Annotated[float, Field(ge=0)] = 1e-4
    lr: Annotated[float, Field(gt=0)] = 0.1
    labels: str = "analytic"

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model without dropout, and one that the label rule cannot read."""
        super().check(model, kind)
        if not masked(model):
            raise ValueError(
                "the model has no dropout whose masks could be searched; use inverting-gradients, "
                "or a model with it: convnet(dropout=0.5), vgg16"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse clients that train with dropout off."""
        super().check_setting(setting)
        if setting.batchnorm == "frozen":
            raise ValueError(
                "clients train in eval mode, with dropout off: set model.batchnorm = 'private', "
                "or use inverting-gradients"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""
        recipe = Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            parametrization=lambda group: PixelsAndMasks(
                group.spec, group.known_labels, group.observed.dtype, masked(group.model)
            ),
            operator=lambda group, _: MaskedGradients(group.model, group.names),
            objective=lambda group: Cosine(group.observed),
            priors=lambda group: [TotalVariation(self.tv, group.spec.std)] if self.tv else [],
            activations=lambda group: [
                DropoutRate(self.rate, layer) for layer in masked(group.model)
            ],
            optimizer=lambda _: Adam(self.lr, signed=False, schedule=ig_steps),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        return invert(views, knowledge, recipe)


@dataclass(frozen=True)
class Masked:
    """A dropout layer: its name, its rate p, and the shape of one example's mask."""

    name: str
    p: float
    shape: tuple[int, ...]


def masked(model: nn.Module) -> list[Masked]:
    """Return the dropout layers of a model, in the order in which they compute."""
    found: list[Masked] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name, p=layer.p: found.append(
                Masked(name, p, tuple(inputs[0].shape[1:]))
            )
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Dropout) and layer.p > 0
    ]
    parameter, training = next(model.parameters()), model.training
    spec: DataSpec = model.spec  # type: ignore[assignment]
    with torch.no_grad():  # in eval mode: BatchNorm's running statistics stay as they are
        model.eval()(parameter.new_zeros(1, *spec.shape))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return found


class PixelsAndMasks(NormalizedPixels):
    """Standardized pixels, of whose slope the search sees the sign, and beside them masks.

    Parameters
    ----------
    spec : DataSpec
    labels : Tensor
        ``[T, B]`` int64.
    dtype : torch.dtype
    layers : sequence of Masked
        Whose masks ``beside`` holds, flattened, for one example after the other.
    """

    def __init__(
        self, spec: DataSpec, labels: Tensor, dtype: torch.dtype, layers: Sequence[Masked]
    ) -> None:
        super().__init__(spec, labels, dtype, boxed=True)
        self.layers = layers
        self.pixels = labels.shape[1] * prod(spec.shape)

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal pixels and Bernoulli(1 - p) masks."""
        keep = [torch.full((prod(layer.shape),), 1 - layer.p) for layer in self.layers]
        one = torch.cat([torch.empty(0), *keep]).repeat(self.labels.shape[1])
        pixels = super().start(generator)
        return torch.cat([pixels, torch.bernoulli(one, generator=generator)])

    def decode(self, variables: Tensor) -> Candidate:
        """Return images, labels and masks."""
        images, labels, _ = super().decode(variables[:, : self.pixels])
        return Candidate(Signed.apply(images), labels, variables[:, self.pixels :])

    def box(self, variables: Tensor) -> None:
        """Bring pixels and masks back into ``[0, 1]``."""
        super().box(variables[:, : self.pixels])
        variables[:, self.pixels :].clamp_(0, 1)

    def take(self, rows: Tensor) -> Self:
        """Return the parametrization of some of the targets."""
        return type(self)(self.spec, self.labels[rows], self.mean.dtype, self.layers)


class MaskedGradients(Operator):
    """Gradients of mean cross-entropy through dropout layers with the candidates' masks.

    What is read on the way is the mask of each dropout layer, ``[T, B, *shape]``.

    Parameters
    ----------
    model : nn.Module
        Copied: masks are hooks on its dropout layers.
    names : sequence of str
        Parameters to differentiate.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.layers = masked(model)
        self.model = model = copy.deepcopy(model)
        freeze(model, names)
        everything = dict(model.named_parameters())
        self._constants = {name: everything[name].detach() for name in names}
        self._masks: dict[str, Tensor] = {}
        for layer in self.layers:
            dropout = model.get_submodule(layer.name).eval()
            dropout.register_forward_hook(self._thinned(layer))
        self._each = vmap(grad(self._loss), in_dims=(None, 0, 0, 0))

    def __call__(self, candidate: Candidate) -> tuple[list[Tensor], list[Tensor]]:
        """Return one gradient for each name, and the masks."""
        masks = self._unpacked(candidate)
        found = self._each(self._constants, candidate.images, candidate.labels, masks)
        return list(found.values()), masks

    def _unpacked(self, candidate: Candidate) -> list[Tensor]:
        """Cut what stands beside the images into one mask for each layer."""
        if not self.layers or candidate.beside is None:
            return []
        rows = candidate.beside.reshape(*candidate.images.shape[:2], -1)
        pieces = torch.split(rows, [prod(layer.shape) for layer in self.layers], dim=2)
        return [
            piece.reshape(*piece.shape[:2], *layer.shape)
            for piece, layer in zip(pieces, self.layers, strict=True)
        ]

    def _thinned(self, layer: Masked):  # type: ignore[no-untyped-def]
        def thin(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
            return inputs[0] * self._masks[layer.name] / (1 - layer.p)

        return thin

    def _loss(
        self,
        parameters: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        masks: Sequence[Tensor],
    ) -> Tensor:
        self._masks = {layer.name: mask for layer, mask in zip(self.layers, masks, strict=True)}
        return penalized_loss(self.model, (images, labels), parameters)


class DropoutRate(ActivationPrior):
    """``weight |1 - mean(m) - p|``: a layer drops its share.  Reads the mask.

    Parameters
    ----------
    weight : float
    layer : Masked
    """

    def __init__(self, weight: float, layer: Masked) -> None:
        self.layers, self.weight, self.p = (layer.name,), weight, layer.p

    def __call__(self, inputs: Sequence[Tensor], progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """Return the penalty ``[T]`` of masks ``[T, B, *shape]``."""
        (mask,) = inputs
        return self.weight * (1 - mask.flatten(1).mean(dim=1) - self.p).abs()
