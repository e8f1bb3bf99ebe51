"""Soteria: prune the representation that tells most of the input.

Of the defended fully connected layer with input r (m units) each unit is scored

    score_i = |r_i| / |d r_i / d X|_2  (the published approximation of |r_i (d r_i / d X)^-1|)

and the ``share`` of the units with the largest score is set to 0 in r', so that their columns of
``dL/dW`` (out x m) are 0.  Over a batch the inverse ratios are summed, as in the released code.
Sun, Li, Wang, Yuan, Wang, Chen: "Soteria: Provable Defense against Privacy Leakage in Federated
Learning from Representation Perspective", CVPR 2021.

What was wrong in the reference implementations, and is not here: without an epsilon a ReLU unit
that is off gives 0 / 0, its percentile is NaN, the mask all ones: nothing is ever pruned.  With the
demo's 0.1 units that are off score least and are "pruned" first, though their columns are 0
already.  And r_i is taken with its sign.  Here: ``|r_i| + 1e-10``, only units that are on for some
example are ranked, and the columns really changed are told.

What it promises: the defended layer's gradient no longer shows those features.  What it does not:
every other layer's gradient is the true one, bit for bit.  An attack that gives the defended layer
no weight, or ignores what came back as 0, does not meet the defense (Balunovic et al., ICLR 2022).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import one_hot

from clients.defenses.aside import entering, linear_layers, the_step
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Rank, Tensors
from fedsim.registry import register

#: Units whose derivatives are held at once.
AT_ONCE = 32


@register("defense", "soteria")
@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Set columns of one linear layer's gradient to zero; as many backward passes as units are on.

    Under FedAvg each step's gradient is pruned, and the client trains on it.

    Parameters
    ----------
    share : float
        Of the units that are on, how many are pruned: the authors' 60 % against Inverting
        Gradients, 1 % against DLG.
    layer : str
        Name of the defended ``nn.Linear``; "last" for the classifier, whose input is the
        representation.
    """

    paper: ClassVar[Paper] = Paper(
        title="Soteria: Provable Defense against Privacy Leakage in Federated Learning from "
        "Representation Perspective",
        authors="Sun, Li, Wang, Yuan, Wang, Chen",
        venue="CVPR",
        year=2021,
        published="abstract: reconstruction MSE up to 160 times the undefended at no loss of "
        "accuracy, MNIST and CIFAR-10, DLG and Inverting Gradients",
        measured="fedsim run scenarios/soteria.toml (convnet(stride=2), inverting-gradients): "
        "15.6 dB, 30.9 undefended, 15.3 a guess; the same views by "
        "bayes(defense='prune'), which ignores what came back as 0: 31.1 dB",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "A",
            "attack": "linear-inversion",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
            "defenses": "soteria",
        },
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "soteria(share=0.3)",
        "soteria(share=0.6)",
        "soteria(share=0.9)",
    )
    # Absolute distance, where an entry came back.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='laplace(scale=0.005) | prune')"
    )

    share: Annotated[float, Field(gt=0, le=1)] = 0.6
    layer: str = "last"

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model without such a layer."""
        self.defended(model)

    def defended(self, model: nn.Module) -> str:
        """Return the name of the defended layer."""
        layers = linear_layers(model)
        name = next(reversed(layers), "") if self.layer == "last" else self.layer
        if name not in layers:
            there = ", ".join(layers) or "none: use convnet, lenet or mlp"
            raise ValueError(f"no fully connected layer {self.layer!r}; there is: {there}")
        return name

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        """Return the gradient with the columns of the most telling units set to zero."""
        model, (images, _) = the_step(ctx.trainee, ctx.batch)
        layer = self.defended(model)
        name = f"{layer}.weight"
        score, live = scores(model, linear_layers(model)[layer], images)
        ranked = torch.where(live, score, -torch.inf).argsort(descending=True, stable=True)
        pruned = ranked[: round(self.share * int(live.sum()))]
        weight = gradient[name].clone()
        changed = int((weight[:, pruned] != 0).any(dim=0).sum())
        weight[:, pruned] = 0
        figures = ctx.effect(self).figures
        figures |= {"columns": len(live), "live": int(live.sum()), "columns changed": changed}
        return {**gradient, name: weight}

    def norm_bound(self, at: Place, entering: float | None) -> float | None:  # noqa: ARG002
        """Return the bound that was there: setting columns to zero lengthens nothing."""
        return entering


def scores(model: nn.Module, layer: nn.Linear, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score ``[m]`` of each unit that enters a layer, and whether it is ever on.

    One over the sum over examples of ``|d r_i / d X| / (|r_i| + 1e-10)``: large where a value is
    large and hardly moves with the image.  A ReLU unit that is off does not move, and adds nothing.
    """
    images = images.detach().requires_grad_()
    entered, _ = entering(model, layer, images)
    held = entered.reshape(len(images), -1, entered.shape[-1])
    features, size = held.sum(dim=1), held.detach().abs().sum(dim=1)
    on = size > 0
    # Each image's units that are on come first, and only as many passes are made as one has.
    order = on.int().argsort(dim=1, descending=True, stable=True)
    lengths = torch.zeros_like(size)
    most = int(on.sum(dim=1).max())
    for units in torch.split(order[:, :most], AT_ONCE, dim=1):
        chosen = one_hot(units.T, size.shape[1]).to(size)
        (slopes,) = torch.autograd.grad(
            features, images, chosen, retain_graph=True, is_grads_batched=True
        )
        lengths.scatter_(1, units, slopes.flatten(2).norm(dim=2).T)
    return 1 / (lengths / (size + 1e-10)).sum(dim=0), on.any(dim=0)
