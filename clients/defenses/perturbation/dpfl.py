"""Fine-grained noise by layer activity (DPFL), as its paper means it, not as its code does it.

Zhu, Liu, Li, Yang, Xia, Lu, "A Fine-Grained Differentially Private Federated Learning against
Leakage from Gradients", IEEE Internet of Things Journal 2021.  The share of positive outputs of
each layer on a few images, normalized over layers to sum to one, divides the budget among layers:

    epsilon_l = epsilon * share_l,    noise_l ~ Laplace(2 alpha eta / epsilon_l)

with each entry clamped to ``+- alpha`` (times the rate ``eta``) before.  More active layers get
*less* noise.  What is wrong in the authors' code, and not here: one scalar is drawn for a whole
tensor, which the difference of any two entries removes; the noise of conv3 is added to conv2;
biases get none; nothing is clamped, so that the sensitivity is not what the scale says.

What it promises: by default nothing.  Its scale is for one coordinate; a vector of d coordinates
has d times the L1 sensitivity, and shares taken from private images leak through the scales.  With
``sensitivity="vector"`` and ``activity="public"`` both are as they must be, and an epsilon is told:
the noise is then d_l times larger, and nothing is learned through it at any epsilon of use.  There
is none beside a defense that wraps the model (``digestnn``, ``pefl``, ``spn``, ``fedkl``): activity
is of the model in training, and a part that stays at home has moved on private images.  What breaks
the default: averaging over rounds, and total variation, which takes noise off.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.toy import RATIO_ATTACK
from clients.ledger import record, released
from fedsim.accounting import Release
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "dpfl")
@dataclass(frozen=True, kw_only=True)
class DPFL(Defense):
    """Clamp every entry of the upload, and add Laplace noise whose scale hangs on its layer.

    The upload of FedSGD is a gradient: entries are clamped to ``alpha``, and the server's rate is
    the paper's ``eta``.  That of FedAvg is up to ``steps`` gradients times the rate: to ``alpha``
    times both.

    Parameters
    ----------
    epsilon : float
        Of one upload, over all layers together.
    alpha : float
        Largest magnitude of a gradient's entry.
    sensitivity : {"coordinate", "vector"}
        For which the noise is: one entry, as published, or all of a layer's, as the guarantee asks.
    activity : {"private", "public"}
        On what a layer's activity is measured: the last batch of the round, as the paper's local
        validation set, or 32 images of uniform noise that everybody can draw.
    """

    paper: ClassVar[Paper] = Paper(
        title="A Fine-Grained Differentially Private Federated Learning against Leakage from "
        "Gradients",
        authors="Zhu, Liu, Li, Yang, Xia, Lu",
        venue="IEEE Internet of Things Journal",
        year=2021,
        published="no table was read; the code's defaults are epsilon 10, alpha 1, rate 0.1",
        measured="fedsim run scenarios/dpfl.toml: none of 256 images at 20 dB, 209 undefended; "
        "accuracy after the round 0.138, 0.214 undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "dpfl"},
        # Noise of half the clamp in every entry, the biases' too: what is left is noise.
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    reads_model: ClassVar[bool] = True
    strengths: ClassVar[tuple[str, ...]] = (
        "dpfl(epsilon=1000.0)",
        "dpfl(epsilon=100.0)",
        "dpfl(epsilon=10.0)",
    )
    # Each layer's scale is secret; this is that of a quarter of the budget.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='laplace(scale=0.08)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    epsilon: Annotated[float, Field(ge=1e-6)] = 10.0
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    sensitivity: Literal["coordinate", "vector"] = "coordinate"
    activity: Literal["private", "public"] = "private"

    def check_setting(self, setting: Setting) -> None:
        """Refuse to call a model public that has gathered statistics of private images."""
        gathers = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in setting.model.modules()
        )
        if self.activity == "public" and gathers and setting.batchnorm != "frozen":
            raise ValueError(
                "activity='public' would be measured with BatchNorm statistics of the client's own "
                "images; use model.batchnorm = 'frozen', or a model without BatchNorm"
            )

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Clamp, then add each entry's own noise, from the secret stream."""
        limit = self.limit(ctx.plan)
        scales = self.scales(update, limit, ctx)
        generator = ctx.secret(self.name, ctx.round, ctx.step)
        ctx.effect(self).figures |= {
            "share_clamped": _share_above(update, limit),
            "smallest_scale": min(scales.values()),
            "largest_scale": max(scales.values()),
        }
        if self._promises(ctx.plan):
            record(ctx, self.name, (Release(0.0, pure=self.epsilon),))
            ctx.effect(self).releases = released(ctx, self.name)
        return {
            name: clamped(tensor, limit) + scales[name] * laplace(tensor, generator)
            for name, tensor in update.items()
        }

    def limit(self, plan: TrainingPlan) -> float:
        """Return the largest magnitude of an entry of the upload."""
        return self.alpha if plan.kind == "gradient" else self.alpha * plan.lr * plan.steps

    def scales(self, update: Tensors, limit: float, ctx: ClientContext) -> dict[str, float]:
        """Return each tensor's Laplace scale, ``2 limit / epsilon_l``, or ``d_l`` times that."""
        shares = self._shares(update, ctx)
        sizes = dict.fromkeys(shares, 0)
        for name, tensor in update.items():
            sizes[_layer(name)] += tensor.numel()
        return {
            name: 2
            * limit
            * (sizes[_layer(name)] if self.sensitivity == "vector" else 1)
            / (self.epsilon * shares[_layer(name)])
            for name in update
        }

    def _shares(self, update: Tensors, ctx: ClientContext) -> dict[str, float]:
        """Return each layer's share of the budget; they sum to one."""
        if ctx.trainee is None or ctx.batch is None:
            raise RuntimeError("dpfl needs the model and the batch that the update came of")
        images = ctx.batch[0]
        if self.activity == "public":
            noise = torch.rand(32, *images.shape[1:], generator=ctx.public(self.name, "probe"))
            images = noise.to(images)
        active = positive_shares(ctx.trainee, images)
        layers = dict.fromkeys(_layer(name) for name in update)
        typical = sum(active.values()) / max(len(active), 1)
        raw = {layer: active.get(layer, typical) for layer in layers}
        return {layer: share / sum(raw.values()) for layer, share in raw.items()}

    @property
    def noises(self) -> Place:
        """The upload."""
        return "update"

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return None after the noise: it has no bound."""
        return entering if at == "gradient" else None

    def privacy(
        self,
        plan: TrainingPlan,
        entering: Mapping[Place, float | None],  # noqa: ARG002 - it clamps by itself
    ) -> Privacy | None:
        """Return pure epsilon over all rounds, where the noise is for whole vectors.

        Replacing all of a client's data moves each entry by at most ``2 limit``, a layer of d_l by
        ``2 d_l limit`` in L1, which its Laplace noise of scale ``2 d_l limit / epsilon_l`` hides;
        the layers' epsilon_l sum to epsilon, the rounds add up.  The shares are of the model
        received and of public images, if the model is: FedAvg's has seen private ones by then,
        and so have parameters that stay at home (``reads_model``).
        """
        if not self._promises(plan):
            return None
        return Privacy(
            epsilon=self.epsilon * plan.rounds,
            delta=0.0,
            unit="client",
            relation="replace-one",
            mechanism=f"Laplace for each layer, entries clamped to {self.limit(plan):g}, "
            f"{plan.rounds} releases, no amplification",
        )

    def _promises(self, plan: TrainingPlan) -> bool:
        whole = self.sensitivity == "vector" and self.activity == "public"
        return whole and plan.kind == "gradient"


def positive_shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the share of positive outputs of each module with parameters of its own, by name.

    On a copy in eval mode, so that no statistics move.  Smoothed as if one more output were
    positive and one not: a layer that is silent gets little, never nothing.
    """
    probe = copy.deepcopy(model).eval()
    seen: dict[str, float] = {}

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen[name] = (int((output > 0).sum()) + 1) / (output.numel() + 2)

    for name, module in probe.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    with torch.no_grad():
        probe(images)
    return seen


def clamped(tensor: Tensor, limit: float) -> Tensor:
    """Return each entry cut off at ``+- limit``; what is not a number, which no cut holds, as 0."""
    return tensor.nan_to_num().clamp(-limit, limit)


def laplace(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return independent Laplace noise of scale 1, one draw for each entry.

    The difference of two exponential draws, in float64: no uniform draw is near enough to an end
    to be cut off.
    """
    shape = tensor.shape
    one, other = (
        torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) for _ in range(2)
    )
    return (one - other).to(tensor)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _share_above(tensors: Tensors, limit: float) -> float:
    size = sum(tensor.numel() for tensor in tensors.values())
    return sum(int((tensor.abs() > limit).sum()) for tensor in tensors.values()) / max(size, 1)
