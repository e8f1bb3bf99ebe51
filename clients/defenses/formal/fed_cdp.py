"""Fed-CDP: every example's gradient is clipped layer by layer, and every local step gets noise.

    g_m = (sum_i g_im / max(1, |g_im|_2 / C) + N(0, (sigma C)^2 I)) / (q n)    for each layer m

Wei, Liu, Wei, Pu, Chow, "Gradient-Leakage Resilient Federated Learning", ICDCS 2021, Sec. V.  A
layer is one array of parameters.  With L of them, one example moves the whole gradient by up to
``sqrt(L) C``, and that is the sensitivity that the ledger takes: sigma = 6 is a noise multiplier of
``6 / sqrt(L)``.  At q = 0.01 and 10,000 steps that is epsilon 0.60 for L = 1, 2.0 for L = 8, 11.4
for the 62 arrays of a ResNet; told by sigma alone it would be 0.60 for all.

The unit is one example.  The authors' code draws the examples of a batch without regard to the
sampling that their accountant assumes, has its block of fixed-norm noise commented out, and divides
the sum over 100 clients by 99.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from clients.defenses.perturbation.clip import Norm
from clients.defenses.toy import IMPRINTED
from clients.noise import StdOrNone
from clients.noised_sum import NoisedSum, norms_of, scaled
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "fed-cdp")
@dataclass(frozen=True, kw_only=True)
class FedCDP(NoisedSum):
    """Clip each array of each example's gradient to ``norm``; noise of ``sigma * norm`` on sums."""

    paper: ClassVar[Paper] = Paper(
        title="Gradient-Leakage Resilient Federated Learning",
        authors="Wei, Liu, Wei, Pu, Chow",
        venue="ICDCS",
        year=2021,
        published="no figure for reconstruction that could be read",
        measured="fedsim run scenarios/fed_cdp.toml (Robbing the Fed): sigma 6 / 0.001 leaves "
        "0 / 12 of 104 images at 20 dB",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "fed-cdp(norm=4.0, sigma=6.0)"},
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "fed-cdp(norm=4.0, sigma=0.01)",
        "fed-cdp(norm=4.0, sigma=0.1)",
        "fed-cdp(norm=4.0, sigma=6.0)",
    )
    # One image a step, and no array of its gradient so long as to be clipped.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='gaussian(std=0.4)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    norm: Norm = 4.0
    sigma: StdOrNone = 6.0

    def clip(self, gradients: Tensors) -> Tensors:
        """Clip each array by itself."""
        return {name: scaled(g, norms_of(g), self.norm) for name, g in gradients.items()}

    def multiplier(self, tensors: int) -> float:
        """``sigma / sqrt(L)``: one example more moves every array's sum by at most ``norm``."""
        return self.sigma / math.sqrt(tensors)

    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Example level, against who sees every upload."""
        return Privacy(
            epsilon=epsilon,
            delta=self.delta,
            unit="example",
            relation="add-or-remove-one",
            mechanism=f"Gaussian on the sum, noise multiplier {self.sigma:g} / sqrt of "
            f"{plan.tensors} arrays, Poisson sampling at rate {plan.sample_rate:.3g}, "
            f"{plan.steps * plan.rounds} steps",
        )
