"""GIAnDe: every image is joined by its negative, mixed with the next image of the batch.

Ye, Luo, Zhou, Liu, Wang, Wang, "Gradient Inversion Attacks: Impact Factors Analyses and Privacy
Enhancement", IEEE TPAMI 2024, as in the authors' code: in standardized values, with labels
repeated,

    [x_i] becomes [x_1 .. x_n ; t_1 .. t_n],  t_i = -(1 - a) x_i + a x_{i+1 mod n},  a = 0.2

or ``t_i = -x_i``.  Optionally a second loss on features whose channel means and deviations are
moved towards those of the twin's, ``mu = (1 - l) mu_x + l mu_t`` with ``l ~ Beta(10 U, 10)``, U
uniform, weight 1e-3.  The code can draw the neighbor at random and never does: it is the next one.

Promises that a gradient to be matched is of images that pull apart.  Does not hide x, which is in
the batch unchanged: an imprint that isolates one input isolates x.  A batch of one mixes with
itself: its twin is ``-(1 - 2a) x``, and the first layer's ratio is x up to a factor around the
mean.  All twins together are x again: the circulant system ``t = M x`` is solvable.  A server that
knows of the twins tells them from images by their own equation, and gets what shared a bin from
those that did not (``adversary``): as much as it gets from undefended clients.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.aside import logits
from clients.defenses.model.network import Called, met
from fedsim.attack import Paper, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, Defense, Rank, Refusal
from fedsim.registry import register


@register("defense", "giande")
@dataclass(frozen=True, kw_only=True)
class Giande(Defense):
    """Join every image by a negative twin, with its label.

    Parameters
    ----------
    twin : {"mix", "reverse"}
        Negative with a share of the next image, or the negative alone.
    alpha : float
        That share.
    features : str
        Name of the module whose output is restyled for the second loss (the third stage, in the
        paper's ResNet-18); empty for none.
    feature_weight : float
        Weight of the second loss.
    """

    paper: ClassVar[Paper] = Paper(
        title="Gradient Inversion Attacks: Impact Factors Analyses and Privacy Enhancement",
        authors="Ye, Luo, Zhou, Liu, Wang, Wang",
        venue="IEEE Transactions on Pattern Analysis and Machine Intelligence",
        year=2024,
        published="no figure read; evaluated with ResNet-18 on EMNIST, CIFAR and Tiny ImageNet, 30 "
        "to 100 clients",
        measured="fedsim run scenarios/giande.toml (robbing-the-fed, 4 x 16 photo tiles): 26 of "
        "64 exact, 28 at 20 dB, from one candidate for each image that the client counts; "
        "undefended 58 exact; un-rolled 60 (scenarios/unrolling.toml).  8 images, 200 bins, all "
        "bins read: 8 of 8 at 120 dB with the mean functional, 5 to 8 with four random ones "
        "(pytest tests/clients/test_defenses_giande.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "G",
            "attack": "robbing-the-fed(units=200)",
            "defenses": "giande",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        # Originals and twins share the bins; of what is read one candidate an image is kept.
        figure="leak.exact",
        low=5.0,
        high=27.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = (
        "giande(twin='reverse')",
        "giande(alpha=0.2)",
        "giande(alpha=0.4)",
    )
    adversary: ClassVar[str] = "unrolling"

    twin: Literal["mix", "reverse"] = "mix"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.2
    features: str = ""
    feature_weight: Annotated[float, Field(gt=0, le=1e6)] = 1e-3

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse ``features`` that name no module whose output can be restyled."""
        chosen, known = stage(model, self.features), met(model)
        if self.features and not any(m.layer is chosen and fits(model, m) for m in known):
            names = [module.name for module in known if fits(model, module)]
            raise ValueError(
                f"{self.features!r} is no module of this model that makes maps of more than one "
                "place, without a shortcut around it; features= is one of "
                + (", ".join(names) or "nothing in this model: leave it out")
            )

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Return originals, then their twins, labels repeated."""
        images, labels = batch
        assert ctx.spec is not None
        mean = images.new_tensor(ctx.spec.mean).view(-1, 1, 1)
        centered = images - mean
        alpha = self.alpha if self.twin == "mix" else 0.0
        twins = mean - (1 - alpha) * centered + alpha * centered.roll(-1, 0)
        return torch.cat([images, twins]), torch.cat([labels, labels])

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor | None:
        """Return cross-entropy, and that of the originals with the twins' style."""
        if not self.features:
            return None
        module = stage(model, self.features)
        if module is None:  # the server sent another network than the scenario's
            raise Refusal(f"the model has no {self.features!r} to restyle")
        images, labels = batch
        plain = cross_entropy(model(images), labels)
        generator = ctx.secret(self.name, "style", ctx.round, ctx.step)
        amounts = style_amounts(len(labels) // 2, generator).to(images)
        handle = module.register_forward_hook(lambda *seen: restyled(seen[-1], amounts))
        try:
            styled: Tensor = model(images)
        finally:
            handle.remove()
        return plain + self.feature_weight * cross_entropy(styled, labels[: len(styled)])


def stage(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of this name, also where the server put something before the model."""
    modules: dict[str, Any] = dict(model.named_modules())
    return next((m for n, m in modules.items() if n == name or n.endswith("." + name)), None)


def fits(model: nn.Module, module: Called) -> bool:
    """Say whether a module makes maps with a deviation, and what follows takes half of the batch.

    A shortcut around it would bring all of the batch.
    """
    if len(module.outputs) != 3 or prod(module.outputs[1:]) == 1:
        return False
    spec: DataSpec = model.spec  # type: ignore[assignment]
    handle = module.layer.register_forward_hook(lambda *seen: seen[-1][:2])
    try:
        with torch.no_grad():
            logits(model, next(model.parameters()).new_zeros(4, *spec.shape))
    except RuntimeError:  # sizes that do not match
        return False
    finally:
        handle.remove()
    return True


def style_amounts(count: int, generator: torch.Generator) -> Tensor:
    """Return ``l ~ Beta(10 U, 10)`` for each image, ``[count]`` float64."""
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    return torch.from_numpy(numbers.beta(10 * (1 - numbers.random(count)), 10.0))


def restyled(features: Tensor, amounts: Tensor) -> Tensor:
    """Move the first half's channel statistics towards the second's: ``[2n, C, ...]`` to n."""
    own, twin = features.flatten(2).chunk(2)
    amount = amounts.view(-1, 1, 1)
    means = own.mean(dim=2, keepdim=True), twin.mean(dim=2, keepdim=True)
    stds = own.std(dim=2, keepdim=True) + 1e-8, twin.std(dim=2, keepdim=True) + 1e-8
    mean, std = ((1 - amount) * mine + amount * its for mine, its in (means, stds))
    return ((own - means[0]) / stds[0] * std + mean).view(len(own), *features.shape[1:])
