"""Digestive neural network: what the shared model sees went through a private network first.

    D(x) = sigmoid(gain * (W2 * relu(W1 * (2 x - 1) + b1) + b2)),
    loss = CE(f(D(x)), y) - apart * rms(D(x) - x)

with ``*`` convolutions of 3 x 3: D is trained beside the shared model f, so that f is right and
D(x) unlike x.  D never leaves the client; it is kept between rounds.  Lee, Kim, Ahn, Hussain, Cho,
Son: "Digestive neural networks: A novel defense strategy against inference attacks in federated
learning", Computers and Security 109, 2021.

Only the abstract was read.  The paper's second aim is that inference attacks are wrong; the
distance of D(x) from x stands for it, and D's form and ``apart`` are ours.

What it promises: gradients are of D(x): no attack that explains a gradient gets x from it alone.
What it does not: D is a small network that keeps edges and shapes.  Its inverse can be learned by
whom a client shows pairs; with surrogates of D, drawn as clients draw theirs, it comes to a guess
at most (``stand-in-inversion``), or to little more (``tests/clients/test_defenses_digestnn.py``).
f is of use only behind a D: accuracy that the server measures on plain images says nothing of what
clients get, who each have a D of their own; the report tells theirs on what they train on.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from clients.defenses.learning.stand_ins import hard, similarity, told
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, Defense, Rank, Tensors
from fedsim.registry import register

PRIVATE = "digest_"
FILTER = 3


@register("defense", "digestnn")
@dataclass(frozen=True, kw_only=True)
class DigestNN(Defense):
    """D's parameters are trained by the client's own rule and rate, and stay in its store.

    Parameters
    ----------
    width : int
        Channels between D's two convolutions.
    gain : float
        How steep the last sigmoid is: below 1 what it makes is gray.
    apart : float
        Weight of the distance between D(x) and x.
    """

    paper: ClassVar[Paper] = Paper(
        title="Digestive neural networks: A novel defense strategy against inference attacks in "
        "federated learning",
        authors="Lee, Kim, Ahn, Hussain, Cho, Son",
        venue="Computers and Security",
        year=2021,
        published="abstract: with gradients shared, accuracy 16.17 points above and attack "
        "accuracy 9 below differential privacy; the attacks infer membership",
        measured="fedsim run scenarios/digestnn.toml (first linear layer, ratio attack): 5.2 "
        "dB where undefended is exact",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "digestnn"},
        # D(x) is found exactly, and is not x.
        figure="leak.psnr.mean",
        low=2.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.MODEL
    strengths: ClassVar[tuple[str, ...]] = (
        "digestnn(apart=0.1)",
        "digestnn(apart=0.5)",
        "digestnn(apart=0.9)",
    )
    # It reads D(x) and goes on as rehearsals taught it, of networks drawn alike; that they are not
    # the client's own is what leaves it below a guess.
    adversary: ClassVar[str] = "stand-in-inversion(defense='digestnn(apart=0.5)')"

    width: Annotated[int, Field(ge=1)] = 16
    gain: Annotated[float, Field(gt=0)] = 8.0
    apart: Annotated[float, Field(ge=0)] = 0.5

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        """Have images go through D first; its parameters are remembered as they are trained."""
        like = next(model.parameters())
        spec: DataSpec = model.spec  # type: ignore[assignment]
        for name, initial in self.initial(spec.shape[0], ctx).items():
            start = ctx.store.get(f"{self.name}.{name}", initial)
            parameter = nn.Parameter(start.to(like).clone())
            model.register_parameter(PRIVATE + name, parameter)
            ctx.store[f"{self.name}.{name}"] = parameter.detach()
        model.register_forward_pre_hook(lambda module, inputs: (self.digested(module, inputs[0]),))
        return model

    def initial(self, channels: int, ctx: ClientContext) -> Tensors:
        """Return D's first weights, He et al.'s normal ones, of the client's secret stream."""
        generator = ctx.secret(self.name, "initial")

        def filters(outputs: int, inputs: int) -> Tensor:
            drawn = torch.randn(outputs, inputs, FILTER, FILTER, generator=generator)
            return drawn * math.sqrt(2 / (inputs * FILTER**2))

        return {
            "w1": filters(self.width, channels),
            "b1": torch.zeros(self.width),
            "w2": filters(channels, self.width),
            "b2": torch.zeros(channels),
        }

    def digested(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return D(x) in ``[0, 1]``, of the shape of images ``[B, C, H, W]``."""
        w1, b1, w2, b2 = (getattr(model, PRIVATE + name) for name in ("w1", "b1", "w2", "b2"))
        hidden = conv2d(2 * images - 1, w1, b1, padding=FILTER // 2).relu()
        return torch.sigmoid(self.gain * conv2d(hidden, w2, b2, padding=FILTER // 2))

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor:
        """Return cross-entropy behind D, less the distance; this has no derivative by f."""
        images, labels = batch
        out, digest = model(images), self.digested(model, images)
        far = (digest - images).square().flatten(1).mean(dim=1).sqrt().mean()
        right = (out.argmax(dim=1) == hard(labels)).double().mean()
        told(
            self,
            ctx,
            accuracy_behind_it=float(right),
            distance=float(far.detach()),
            ssim_to_the_private_image=float(similarity(digest.detach(), images).mean()),
        )
        return cross_entropy(out, labels) - self.apart * far
