"""Dropout before fully connected layers: the gradient is of a thinned network.

In each step each input of a fully connected layer is kept with probability 1 - p and then scaled
by 1 / (1 - p) (Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, JMLR 2014).  As a
defense: which inputs were kept is the client's secret, and no image explains the gradient in the
whole network.  The layer that reads the pixels is left as it is.  p is part of the network that
everybody shares.

Promised is nothing but that a search which draws masks of its own, or none, goes astray.  What
breaks it: Dropout Inversion searches masks together with the image (Scheliga, Maeder and Seeland,
"Dropout is NOT All You Need to Prevent Gradient Leakage", AAAI 2023).  A fully connected layer that
reads the pixels gives them away as before.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.model.network import Called, called, replace
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import ClientContext, Defense, Effect, Rank
from fedsim.models import build_model
from fedsim.registry import Expression, register

Share = Annotated[float, Field(gt=0, lt=1)]


@register("model", "dropout-network")
def dropout_network(spec: DataSpec, *, of: str, p: Share = 0.5) -> nn.Module:
    """Put dropout before a network's fully connected layers, but for one that reads the pixels.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    of : str
        Model expression of the network.
    p : float
        Share of the inputs that is dropped, in train mode.

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    model = build_model(of, spec)
    behind = thinned(model)
    if not behind:
        raise ValueError(f"{of} has no fully connected layer behind its first layer to thin out")
    for one in behind:
        replace(model, one.name, nn.Sequential(nn.Dropout(p), one.layer))
    return model


def thinned(model: nn.Module) -> list[Called]:
    """Return the fully connected layers with something trained before them, in their order."""
    found = called(model)
    spec: DataSpec = model.spec  # type: ignore[assignment]
    first = next(i for i, one in enumerate(found) if any(True for _ in one.layer.parameters()))
    reads_pixels = prod(found[first].inputs) == prod(spec.shape)
    start = first + isinstance(found[first].layer, nn.Linear) * reads_pixels
    return [one for one in found[start:] if isinstance(one.layer, nn.Linear)]


@register("defense", "dropout")
@dataclass(frozen=True, kw_only=True)
class Dropout(Defense):
    """Train, all together, a network with dropout; the masks are each client's secret.

    Clients must train in train mode: ``model.batchnorm`` is ``"private"`` or ``"shared"``.

    Parameters
    ----------
    p : float
        Share of the inputs that is dropped; 0.1 to 0.5 is usual.
    """

    paper: ClassVar[Paper] = Paper(
        title="Dropout is NOT All You Need to Prevent Gradient Leakage",
        authors="Daniel Scheliga, Patrick Maeder, Marco Seeland",
        venue="AAAI",
        year=2023,
        published="the authors' notebook, CIFAR-10, ViT, p = 0.5, one image, MSE of standardized "
        "images: an attack that ignores dropout 3.42-3.75, Dropout Inversion 0.0096-0.0144",
        measured="digits, convnet(width=8), p 0.5, one image, 4 clients: inverting-gradients "
        "10.7 dB, dropout-inversion on the same capture 42.8 (fedsim run scenarios/dropout.toml)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "inverting-gradients(iterations=150, tv=1e-3)",
            "defenses": "dropout",
            "data.dataset": "digits",
            "model.name": "convnet(width=8)",
            "model.batchnorm": "private",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        # Undefended it is 29 dB, a guess 11.
        low=6.0,
        high=17.0,
    )
    rank: ClassVar[Rank] = Rank.MODEL
    tells_of_network: ClassVar[bool] = True  # it is the same one as long as nothing is dropped
    strengths: ClassVar[tuple[str, ...]] = (
        "dropout(p=0.1)",
        "dropout(p=0.3)",
        "dropout(p=0.5)",
    )
    adversary: ClassVar[str] = "dropout-inversion(iterations=300, tv=1e-3)"

    p: Share = 0.5

    def architecture(self, model: str) -> str:
        """Return the network with dropout in it."""
        return str(Expression("dropout-network", {"of": model, "p": self.p}))

    def check_setting(self, setting: Setting) -> None:
        """Refuse clients that train with dropout off."""
        if setting.batchnorm == "frozen":
            raise ValueError(
                "with model.batchnorm = 'frozen' clients train in eval mode, dropout off; "
                "write 'private'"
            )

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        """Count what dropout keeps, for the auditor."""
        count = Kept(ctx.effect(self))
        for layer in model.modules():
            if isinstance(layer, nn.Dropout) and layer.p == self.p:
                layer.register_forward_hook(count)
        return model


class Kept:
    """Keeps the share of inputs other than zero that came through dropout, in ``kept``.

    The client's upload is changed once any input came through as another.
    """

    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.had, self.kept = 0, 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Count one layer's inputs."""
        self.had += int(torch.count_nonzero(inputs[0]))
        self.kept += int(torch.count_nonzero(output))
        self.effect.figures["kept"] = self.kept / max(self.had, 1)
        self.effect.changed |= not torch.equal(inputs[0], output)
