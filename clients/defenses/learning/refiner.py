"""Refiner: upload the gradient of robust data, not of the private ones.

For a batch x with labels y and gradient g, robust images x* are begun at
``(1 - mix) x + mix noise`` and moved by Adam, within ``radius`` of x and ``[0, 1]``, to lessen

    sum_j w_j (grad(x*, y)_j - g_j)^2 / sum_j w_j g_j^2  +  beta * SSIM(x*, x)

with weights on key parameters: ``w_j = |theta_j g_j|`` over its mean in the layer, times a factor
that falls from the first layer (2) to the last (1).  The gradient at x* is what is trained on, and
uploaded under FedSGD.  Fan, Chen, Wang, Li, Zhou: "Refiner: Data Refining against Gradient
Leakage Attacks in Federated Learning", USENIX Security 2025 (arXiv 2212.02042).

No official code was found and the paper's body was not read: the weights are a reading of its
description.  Its privacy term is the score of a network trained to judge how alike two images are;
a client here has no such network, and structural similarity stands in for it.

What it promises: no private image is in the gradient, whatever reads it; an attack gets x*.  What
it does not: how much of x is in x*.  SSIM says little of what an image means, and an attacker with
public data learns to go from x* to x (``stand-in-inversion``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from clients.defenses.aside import gradient_of, slopes
from clients.defenses.learning.stand_ins import descended, flat, similarity, told, uniform
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Rank, Tensors
from fedsim.registry import register

#: The share of all parameters, those of the largest weights, that the report calls key.
KEY = 0.1


@register("defense", "refiner")
@dataclass(frozen=True, kw_only=True)
class Refiner(Defense):
    """One double backward pass an iteration.

    Parameters
    ----------
    iterations : int
        Of the search.
    lr : float
        Adam's at the start, in units of the range of a pixel.
    mix : float
        How much noise the start has.
    beta : float
        Weight of similarity beside the distance of gradients.
    radius : float
        How far a pixel may be moved; 1 is anywhere.
    """

    paper: ClassVar[Paper] = Paper(
        title="Refiner: Data Refining against Gradient Leakage Attacks in Federated Learning",
        authors="Fan, Chen, Wang, Li, Zhou",
        venue="USENIX Security",
        year=2025,
        published="no figure was read",
        measured="fedsim run scenarios/refiner.toml (first linear layer, ratio attack): 12.5 "
        "dB where undefended is exact",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "refiner(iterations=3)"},
        # The robust image is found exactly, and is not the private one.
        figure="leak.psnr.mean",
        low=6.0,
        high=20.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "refiner(beta=0.1)",
        "refiner(beta=1.0)",
        "refiner(beta=10.0)",
    )
    # It reads the robust image and goes from there to the private one, as rehearsals taught it.
    adversary: ClassVar[str] = "stand-in-inversion(defense='refiner(beta=1.0)')"

    iterations: Annotated[int, Field(ge=1)] = 20
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    mix: Annotated[float, Field(gt=0, le=1)] = 0.5
    beta: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    radius: Annotated[float, Field(gt=0, le=1)] = 1.0

    def gradients(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensors:
        """Return the gradient of robust examples."""
        images, labels = batch
        true = gradient_of(model, batch)
        weights = key_weights(model, true)
        robust = self.robust(images, self.objective(model, batch, true, weights), ctx)
        found = slopes(cross_entropy(model(robust), labels), model)
        made, g = flat(found), flat(true)
        key = weights.topk(max(1, round(KEY * len(g)))).indices
        told(
            self,
            ctx,
            cosine_to_the_true_gradient=float(cosine_similarity(made, g, dim=0)),
            cosine_of_key_parameters=float(cosine_similarity(made[key], g[key], dim=0)),
            ssim_to_the_private_image=float(similarity(robust, images).mean()),
        )
        return found

    def robust(
        self, images: Tensor, objective: Callable[[Tensor], Tensor], ctx: ClientContext
    ) -> Tensor:
        """Return x*, of the shape of images ``[B, C, H, W]``."""
        noise = uniform(images, ctx.secret(self.name, ctx.round, ctx.step))
        box = (images - self.radius).clamp_min(0), (images + self.radius).clamp_max(1)
        start = ((1 - self.mix) * images + self.mix * noise).clamp(*box)
        found, _ = descended(start, objective, self.iterations, self.lr, box=box)
        return found

    def objective(
        self, model: nn.Module, batch: Batch, true: Tensors, weights: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Return what is lessened, of the robust images."""
        images, labels = batch
        target = flat(true)
        scale = (weights * target.square()).sum().clamp_min(torch.finfo(target.dtype).tiny)

        def value(robust: Tensor) -> Tensor:
            made = flat(gradient_of(model, (robust, labels), create_graph=True))
            apart = (weights * (made - target).square()).sum() / scale
            return apart + self.beta * similarity(robust, images).mean()

        return value


def key_weights(model: nn.Module, gradient: Tensors) -> Tensor:
    """Return a weight for each parameter, ``[P]`` in the gradient's order, at least 0."""
    parts = []
    for place, (name, g) in enumerate(gradient.items()):
        size = (model.get_parameter(name).detach() * g).abs().flatten()
        depth = 2 - place / max(1, len(gradient) - 1)
        parts.append(depth * size / size.mean().clamp_min(torch.finfo(size.dtype).tiny))
    return torch.cat(parts)
