"""Learning-rate perturbation: every client trains at a rate that only it knows.

Wan, Du, Yuan, Yang, Chen, Xu, "Enhancing Privacy Preservation in Federated Learning via Learning
Rate Perturbation", ICCV 2023: attacks on local training simulate it, and assume that they know the
rate.  Here each client draws ``eta_k ~ U((1 - s) eta, (1 + s) eta)``, whose mean is ``eta``, from
its secret stream.  Only the abstract could be read: whether the draw is for a round or for each
step is open, both are here; ada-LRP, which personalizes the mean, is not.

It promises nothing.  After one local step an update is ``-eta_k g``: a factor that every ratio and
cosine divides out: that is refused, as is FedSGD, which uploads ``g`` itself and is not changed.
Over more steps a rate drawn once is one unknown scalar.  How far it turns the update hangs on what
the steps are of: on one batch again and again hardly at all, over batches of single images a lot,
where the rate is large.  On one image, 256 units and a rate of 0.01 a constant factor of 3 leaves
cosines of 0.98 to the plain update after 5 and 20 steps; rates drawn for each step 0.954 to 1.000
after 5, and 0.992 to 1.000 after 20, over which they average out (20 keys,
``tests/clients/test_defenses_lr_perturbation.py``).  What breaks it is an attack that matches by
the cosine, or optimizes the rate along with the images; a ratio of rows that one image moves does
not see it at all.
"""

from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import ClientContext, Defense, Rank
from fedsim.registry import register


@register("defense", "lr-perturbation")
@dataclass(frozen=True, kw_only=True)
class LRPerturbation(Defense):
    """Draw the local learning rate uniformly around the scenario's, from the secret stream.

    Parameters
    ----------
    spread : float
        ``s``: half the width, as a share of the rate; 1 draws from ``U(0, 2 eta)``.
    every : {"round", "step"}
        How long a draw holds.
    """

    paper: ClassVar[Paper] = Paper(
        title="Enhancing Privacy Preservation in Federated Learning via Learning Rate Perturbation",
        authors="Wan, Du, Yuan, Yang, Chen, Xu",
        venue="ICCV",
        year=2023,
        published="less than 0.5 % of accuracy, ahead of five defenses against one attack (the "
        "abstract; no table was read)",
        measured="fedsim run scenarios/lr_perturbation.toml (nine local steps, a rate for each): "
        "1,895 of 2,261 images at 20 dB",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            **RATIO_ATTACK,
            "defenses": "lr-perturbation",
            "federation.clients": 2048,
            "federation.fraction": 0.002,
            "federation.local": "fedavg(epochs=5, batch_size=1, lr=0.01)",
        },
        # Five steps on one image, for clients that hold but one: every step is the image times
        # something, and the ratio exact to float32's rounding of weights, whatever the rates were.
        figure="leak.psnr.max",
        low=90.0,
        high=200.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "lr-perturbation(spread=0.5)",
        "lr-perturbation(spread=1.0)",
        "lr-perturbation(spread=1.0, every='step')",
    )
    # A cosine does not mind one factor for all; the steps are simulated at the scenario's rate.
    adversary: ClassVar[str] = "inverting-gradients(iterations=200, tv=1e-2, simulate=True)"

    spread: Annotated[float, Field(gt=0, le=1)] = 1.0
    every: Literal["round", "step"] = "round"

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse FedSGD: the gradient that it uploads has no learning rate in it."""
        if kind == "gradient":
            raise ValueError(
                "fedsgd uploads the gradient itself, which no local learning rate touches; use "
                "federation.local = 'fedavg(...)' with several steps a round"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse local training of one step, which a rate but scales."""
        training, most = setting.training, max(setting.examples)
        if training.epochs * ceil(most / training.batch_size) == 1:
            raise ValueError(
                f"federation.local makes one step a round: epochs={training.epochs}, batch_size="
                f"{training.batch_size}, and no client holds more than {most} examples; a rate is "
                "a factor that ratios and cosines divide out; let epochs be larger, or batch_size "
                "smaller"
            )

    def learning_rate(self, lr: float, ctx: ClientContext) -> float:
        """Return ``lr (1 + s u)`` with ``u`` uniform in [-1, 1)."""
        which = (ctx.round,) if self.every == "round" else (ctx.round, ctx.step)
        draw = torch.rand((), generator=ctx.secret(self.name, *which), dtype=torch.float64)
        rate = lr * (1 + self.spread * (2 * float(draw) - 1))
        figures = ctx.effect(self).figures
        figures["mean_rate"] = (figures.get("mean_rate", 0.0) * ctx.step + rate) / (ctx.step + 1)
        return rate
