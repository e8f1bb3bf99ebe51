"""Local differential privacy of a client's update: clip, then noise that an epsilon asks for.

    u <- u min(1, C / |u|_2) + N(0, sigma^2 I)

What the server gets of one client is one message, which cannot be there or not: replacing all of
the client's data moves it by up to ``2 C``, and ``2 C`` is the sensitivity.  The noise is that of
the analytic Gaussian mechanism (Balle and Wang, ICML 2018, Theorem 8 and Alg. 1).  The textbook's
``sigma = 2 C sqrt(2 ln(1.25 / delta)) / epsilon`` (Dwork and Roth 2014, App. A) is proven for
epsilon below 1 only, and too little from about 8 on: what it calls 10 is 10.39, what it calls 20 is
25.4.  T rounds compose to one mechanism of ``sigma / sqrt(T)``; no sampling amplifies, because the
server sees who takes part.

It hides the client's whole data from the server itself, and costs what that costs: the noise has
norm ``sigma sqrt(d)`` beside an update of at most C.

Flower's ``LocalDpMod`` (1.41) takes the textbook's noise, leaves the sensitivity to the caller,
adds up no rounds and draws from numpy's global stream: a hundred rounds at its "epsilon = 1" come
to 10.4 where C is the sensitivity, to 25.4 where 2 C is.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from clients.defenses.perturbation.clip import Norm, clipped
from clients.defenses.toy import RATIO_ATTACK
from clients.ledger import NoisedUpdate
from clients.noise import noised
from fedsim.accounting import Release, Releases, gaussian_multiplier
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register

ROUNDING = 1e-7  # what the noise of all rounds, summed up again, may be off by


@register("defense", "local-dp")
@dataclass(frozen=True, kw_only=True)
class LocalDP(NoisedUpdate):
    """Clip the upload to ``norm`` and add the noise that gives ``epsilon`` at ``delta``.

    Parameters
    ----------
    norm : float
        ``C``: the L2 norm that no upload exceeds before the noise.
    epsilon : float
        What the server may learn of one client, for ``over``.
    over : {"run", "round"}
        Whether ``epsilon`` is of all rounds of the run together or of each.
    budget : float or None
        As ever; None is ``epsilon`` where that is of the run, so that a server that goes on after
        its last round is refused, and no end where it is of a round.
    """

    paper: ClassVar[Paper] = Paper(
        title="Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration "
        "and Optimal Denoising",
        authors="Balle, Wang",
        venue="ICML",
        year=2018,
        published="no figure for reconstruction",
        measured="fedsim run scenarios/local_dp.toml: epsilon 8 over two rounds, 0 of 32 images "
        "at 20 dB; epsilon 1e4 in one, ratio attack 6.6 dB, undefended 154, Bayes adversary 15.7",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "local-dp(norm=1.0, epsilon=8.0)"},
        figure="leak.psnr.mean",
        low=3.0,
        high=10.0,
    )
    rank: ClassVar[Rank] = Rank.CLIP
    strengths: ClassVar[tuple[str, ...]] = (
        "local-dp(norm=0.1, epsilon=1000.0)",
        "local-dp(norm=0.1, epsilon=100.0)",
        "local-dp(norm=0.1, epsilon=8.0)",
    )
    # 2 C times the multiplier of epsilon 100 in one round; rounds share it, each with more noise.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='clip(norm=0.1) | gaussian(std=0.0189)')"
    )

    norm: Norm = 1.0
    epsilon: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    over: Literal["run", "round"] = "run"

    def most(self) -> float | None:
        """Return the budget, or the run's epsilon with what rounding of a sum may add to it."""
        if self.budget is None and self.over == "run":
            return self.epsilon * (1 + ROUNDING)
        return self.budget

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Clip, add the noise, and enter it in the ledger."""
        sent = noised(clipped(update, self.norm), self.std(ctx.plan), self.noise(ctx))
        self.spend(ctx)
        return sent

    def std(self, plan: TrainingPlan) -> float:
        """Return the noise's standard deviation."""
        return self._multiplier(plan) * 2 * self.norm

    def _multiplier(self, plan: TrainingPlan) -> float:
        rounds = plan.rounds if self.over == "run" else 1
        return _calibrated(self.epsilon, self.delta) * math.sqrt(rounds)

    def releases(self, plan: TrainingPlan, before: int) -> Releases:  # noqa: ARG002 - all alike
        """One mechanism a round."""
        return (Release(self._multiplier(plan)),)

    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Client level, against the server itself."""
        return Privacy(
            epsilon=epsilon,
            delta=self.delta,
            unit="client",
            relation="replace-one",
            mechanism=f"analytic Gaussian, std {self.std(plan):.3g}, sensitivity "
            f"{2 * self.norm:g} (2 x clip), {plan.rounds} releases, no amplification",
        )


@lru_cache
def _calibrated(epsilon: float, delta: float) -> float:
    return gaussian_multiplier(epsilon, delta)
