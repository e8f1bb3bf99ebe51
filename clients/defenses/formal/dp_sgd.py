"""DP-SGD: every example's gradient is clipped, and the sum of a sample gets noise.

    g = (sum_i g_i min(1, C / |g_i|_2) + N(0, (sigma C)^2 I)) / (q n)

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy",
CCS 2016, Alg. 1.  The client trains on it, and what the server sees of a round is the outcome of
its steps: all steps of all rounds are accounted for, at the client's own sampling rate q, by
privacy loss distributions.  The unit is one example; a client of n examples is told apart far more
easily.

With little noise (``sigma C`` far below the gradients) this is clipping, and generative priors see
through it: the epsilon in the report says so.  BatchNorm has no per-example gradient, and is
refused.

Flower's opacus example builds a privacy engine anew in each round and reports that round's epsilon
only; the ledger here adds up rounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from clients.defenses.toy import IMPRINTED
from clients.noised_sum import NoisedSum, norms_of, scaled
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "dp-sgd")
@dataclass(frozen=True, kw_only=True)
class DPSGD(NoisedSum):
    """Clip each example's whole gradient to ``norm``; noise of ``sigma * norm`` on the sum."""

    paper: ClassVar[Paper] = Paper(
        title="Deep Learning with Differential Privacy",
        authors="Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang",
        venue="CCS",
        year=2016,
        published="no figure for reconstruction",
        measured="fedsim run scenarios/dp_sgd.toml (Robbing the Fed): sigma 1 / 0.1 / 0.01 / 0.001 "
        "leaves 0 / 0 / 10 / 100 of 129 images at 20 dB, undefended 101 of 128; epsilon 1.14 / "
        "82 / 5,355 / 503,653",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "dp-sgd(norm=1.0, sigma=1.0)"},
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "dp-sgd(norm=1.0, sigma=0.01)",
        "dp-sgd(norm=1.0, sigma=0.1)",
        "dp-sgd(norm=1.0, sigma=1.0)",
    )
    # One image a step: the sum's noise and clip are the gradient's.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='clip(norm=1.0) | gaussian(std=0.1)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    def clip(self, gradients: Tensors) -> Tensors:
        """Clip over all arrays as one vector."""
        each = torch.stack([norms_of(gradient) for gradient in gradients.values()])
        norms = each.square().sum(dim=0).sqrt()
        return {name: scaled(g, norms, self.norm) for name, g in gradients.items()}

    def multiplier(self, tensors: int) -> float:  # noqa: ARG002 - they are clipped as one
        """``sigma``: one example more moves the sum by at most ``norm``."""
        return self.sigma

    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Example level, against who sees every upload."""
        return Privacy(
            epsilon=epsilon,
            delta=self.delta,
            unit="example",
            relation="add-or-remove-one",
            mechanism=f"Gaussian on the sum, noise multiplier {self.sigma:g}, Poisson sampling at "
            f"rate {plan.sample_rate:.3g}, {plan.steps * plan.rounds} steps",
        )
