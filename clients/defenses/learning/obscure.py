"""Learning to obscure: train on synthetic images that only the network takes for the private ones.

Each group of up to ``per`` examples x is replaced by one synthetic image s.  Begun at uniform noise
it is moved by Adam, within ``[0, 1]``, to lessen

    |z(s) - mean z(x)|^2 / |mean z(x)|^2  +  beta * mean exp(-rms(s - x) / reach)

with z what enters the last linear layer (the predictive features) and the mean over the group; its
label is the group's mean label.  The gradient of s is what is trained on, and uploaded under
FedSGD.  Wan, Xu, Liu, Ren, Fan, Tang: "Defense Against Gradient Leakage Attacks via Learning to
Obscure Data", arXiv 2206.00769, 2022.

Only the abstract was read: samples "totally distinct from the original", which "maximally preserve
their predictive features".  The two terms above are that sentence, their form is ours.

What it promises: no private image is in the gradient, whatever reads it; an attack gets s.  What it
does not: the features are the private ones' by design, and who has public data learns the way from
there back to the image (``stand-in-inversion``).  The loss is of a network that is fooled: its
gradient may teach little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from clients.defenses.aside import entering, gradient_of, linear_layers, slopes
from clients.defenses.learning.stand_ins import descended, flat, similarity, told, uniform
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Rank, Tensors
from fedsim.registry import register


@register("defense", "obscure")
@dataclass(frozen=True, kw_only=True)
class Obscure(Defense):
    """One backward pass an iteration.

    Parameters
    ----------
    per : int
        How many examples of a batch one synthetic image stands for.
    iterations : int
        Of the search.
    lr : float
        Adam's at the start, in units of the range of a pixel.
    beta : float
        Weight of being unlike the private images, in pixels.
    reach : float
        The root mean square difference at which that has fallen to 1 / e.
    """

    paper: ClassVar[Paper] = Paper(
        title="Defense Against Gradient Leakage Attacks via Learning to Obscure Data",
        authors="Wan, Xu, Liu, Ren, Fan, Tang",
        venue="arXiv",
        year=2022,
        published="no figure was read",
        measured="fedsim run scenarios/obscure.toml (first linear layer, ratio attack): 8.5 dB "
        "where undefended is exact",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "obscure"},
        # The synthetic image is found exactly, and is not the private one.
        figure="leak.psnr.mean",
        low=4.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "obscure(beta=0.01)",
        "obscure(beta=0.1)",
        "obscure(beta=1.0)",
    )
    # It reads the stand-in and goes from there to the image, by what rehearsals taught it.
    adversary: ClassVar[str] = "stand-in-inversion(defense='obscure(beta=0.1)')"

    per: Annotated[int, Field(ge=1)] = 1
    iterations: Annotated[int, Field(ge=1)] = 50
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    beta: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    reach: Annotated[float, Field(gt=0)] = 0.3

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model without a linear layer, which has no features to preserve."""
        if not linear_layers(model):
            raise ValueError("there is no fully connected layer; use convnet, lenet or mlp")

    def gradients(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensors:
        """Return the gradient of synthetic examples."""
        images, labels = batch
        group = torch.arange(len(images), device=images.device) // self.per
        size = torch.bincount(group).to(images).unsqueeze(1)
        generator = ctx.secret(self.name, ctx.round, ctx.step)
        low = torch.zeros(len(size), *images.shape[1:]).to(images)
        synthetic, _ = descended(
            uniform(low, generator),
            self.objective(model, images, group),
            self.iterations,
            self.lr,
            box=(low, low + 1),
        )
        out = model(synthetic)
        soft = labels if labels.dim() == 2 else one_hot(labels, out.shape[1])
        mean = torch.zeros_like(out).index_add(0, group, soft.to(out)) / size
        # A group weighs as many examples as it holds, so that the batch's mean stays a mean.
        loss = (cross_entropy(out, mean, reduction="none") * size[:, 0]).sum() / len(images)
        made, true = slopes(loss, model), gradient_of(model, batch)
        told(
            self,
            ctx,
            cosine_to_the_true_gradient=float(cosine_similarity(flat(made), flat(true), dim=0)),
            ssim_to_the_private_image=float(similarity(synthetic[group], images).mean()),
            distance_of_features=self.features_apart(model, images, group, synthetic),
        )
        return made

    def objective(
        self, model: nn.Module, images: Tensor, group: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Return what is lessened, of the synthetic images; ``group`` says which is whose."""
        target = grouped(features(model, images).detach(), group)
        square = target.square().sum(dim=1).clamp_min(torch.finfo(target.dtype).tiny)

        def value(synthetic: Tensor) -> Tensor:
            apart = (features(model, synthetic) - target).square().sum(dim=1) / square
            pixels = (synthetic[group] - images).flatten(1)
            like = torch.exp(-pixels.norm(dim=1) / pixels.shape[1] ** 0.5 / self.reach)
            return apart.mean() + self.beta * like.mean()

        return value

    @staticmethod
    @torch.no_grad()
    def features_apart(model: nn.Module, images: Tensor, group: Tensor, synthetic: Tensor) -> float:
        """Return how far synthetic features are from the private ones', as a share of these."""
        target = grouped(features(model, images), group)
        return float(
            ((features(model, synthetic) - target).norm(dim=1) / target.norm(dim=1)).mean()
        )


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what enters the last linear layer, ``[B, m]``."""
    entered, _ = entering(model, list(linear_layers(model).values())[-1], images)
    return entered.flatten(1)


def grouped(rows: Tensor, group: Tensor) -> Tensor:
    """Return the mean row of each group, ``[G, m]``."""
    sums = rows.new_zeros(int(group[-1]) + 1, rows.shape[1]).index_add(0, group, rows)
    return sums / torch.bincount(group).to(rows).unsqueeze(1)
