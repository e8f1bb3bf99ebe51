"""Distributed differential privacy: each client adds its share of the noise that the sum needs.

Behind secure aggregation the server sees a sum only, so that noise in the sum is enough.  With
central noise ``N(0, sigma^2 c^2)`` and a cohort of C clients, of which one may be the victim, each
adds (Kairouz, Liu, Steinke, ICML 2021; as Boenisch et al., EuroS&P 2023, Sec. 8.1, state it)

    u <- u min(1, c / |u|_2) + N(0, sigma^2 c^2 / (C - 1) I)

and the C - 1 others together hide it behind ``sigma c``.  No single share hides anything: a server
that fills the cohort with devices of its own, which add none, has the victim's upload under a
(C - 1)th of the variance (``sybil-sa-dp``).  That is the point of shipping it.

The papers add discrete noise inside a finite field; here the noise is Gaussian, before the
protocol's quantization.  Rounding single shares is no post-processing of their sum, and is not in
the proof; nor is any defense after this one, with which no epsilon is told.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from clients.defenses.perturbation.clip import Norm, clipped
from clients.defenses.toy import RATIO_ATTACK
from clients.ledger import NoisedUpdate
from clients.noise import Std, noised
from fedsim.accounting import Release, Releases
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import ClientContext, Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "distributed-dp")
@dataclass(frozen=True, kw_only=True)
class DistributedDP(NoisedUpdate):
    """Clip the upload to ``norm``, and add one client's share of the noise of the whole sum.

    Epsilon is told behind a channel that lets the server read sums only, of clients who weigh
    alike; it is withheld where a sum held fewer of them than ``cohort``.

    Parameters
    ----------
    norm : float
        ``c``: the L2 norm that no upload exceeds before the noise.
    sigma : float
        Noise multiplier of the sum: its noise has standard deviation ``sigma * norm``.
    cohort : int
        ``C``: how many clients each believes are in the sum.  A scenario may not name more than
        can be; who they are nobody checks, which is what a server with sybils lives on.
    """

    paper: ClassVar[Paper] = Paper(
        title="The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure "
        "Aggregation",
        authors="Kairouz, Liu, Steinke",
        venue="ICML",
        year=2021,
        published="no figure for reconstruction",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "distributed-dp(norm=1.0, sigma=0.1, cohort=4)"},
        # In the clear each upload has a third of the variance: 0.06 an entry drowns any single row.
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.CLIP
    strengths: ClassVar[tuple[str, ...]] = (
        "distributed-dp(norm=0.1, sigma=0.01)",
        "distributed-dp(norm=0.1, sigma=0.1)",
        "distributed-dp(norm=0.1, sigma=1.0)",
    )
    # Of one upload, under its share of the noise: what a server with sybils has.  ``sybil-sa-dp``,
    # made for this defense, finds no row above the noise at these strengths and returns nothing.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, "
        "defense='clip(norm=0.1) | gaussian(std=0.0038)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}
    of_sums: ClassVar[bool] = True

    norm: Norm = 1.0
    sigma: Std = 0.1
    cohort: Annotated[int, Field(ge=2)] = 8

    @property
    def share(self) -> float:
        """Standard deviation of one client's noise: ``sigma c / sqrt(C - 1)``."""
        return self.sigma * self.norm / math.sqrt(self.cohort - 1)

    @property
    def in_each_sum(self) -> int:
        """``C``: without those who drop out, or are the server's, the noise falls short."""
        return self.cohort

    def check_setting(self, setting: Setting) -> None:
        """Refuse a cohort that no sum can have, or weights that make one client's noise less.

        The sum is weighed by examples: who weighs more than the others moves it by more than
        ``2 c``, behind shares of noise that weigh less than its own.
        """
        super().check_setting(setting)
        most = setting.cohort + setting.sybils
        if self.cohort > most:
            raise ValueError(
                f"cohort={self.cohort} is more than the {most} that take part in a round: the sum "
                f"would hold less noise than sigma says; let cohort be at most {most}"
            )
        fewest, largest = setting.uploads[0], setting.uploads[-1]
        if setting.channel.aggregates and fewest < largest:
            raise ValueError(
                f"clients would weigh {fewest} to {largest} examples in the sum, and its noise is "
                "that of equal weights; let all hold as many, or use federation.local = "
                f"'fedsgd(batch_size={min(setting.examples)})' or smaller batches"
            )
        self._check_range(setting, largest)

    def _check_range(self, setting: Setting, weight: int) -> None:
        """Refuse a protocol that cuts off what each client noised: what is left is another noise.

        A value reaches ``c`` and five standard deviations.  FedAvg's uploads are weights: those
        that training starts from, and what is added.
        """
        reached = self.norm + 5 * self.share
        if setting.training.kind == "weights":
            reached += max(float(p.detach().abs().max()) for p in setting.model.parameters())
        if reached > (most := setting.channel.carries(weight)):
            raise ValueError(
                f"uploads reach {reached:.3g} (norm, five standard deviations, and FedAvg's "
                f"weights), and {setting.channel.name} cuts each client's values off at "
                f"{most:.3g}: the sum would not hold the noise that epsilon is of; use a larger "
                "clipping_range, or a smaller norm or sigma"
            )

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Clip, then add this client's share, from its secret stream."""
        sent = noised(clipped(update, self.norm), self.share, self.noise(ctx))
        self.spend(ctx)
        return sent

    def releases(self, plan: TrainingPlan, before: int) -> Releases:  # noqa: ARG002 - all alike
        """One mechanism a round, on the sum.

        ``C - 1`` others add noise of ``sigma c`` in all, and replacing one client's data moves the
        sum by at most ``2 c``.
        """
        return (Release(self.sigma / 2),)

    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Client level, of the sum over all rounds, if the cohort is honest and weighs alike."""
        std, sensitivity = self.sigma * self.norm, 2 * self.norm
        return Privacy(
            epsilon=epsilon,
            delta=self.delta,
            unit="client",
            relation="replace-one",
            mechanism=f"Gaussian, of the sum of {self.cohort} honest clients who weigh alike: std "
            f"{std:g}, sensitivity {sensitivity:g} (2 x clip), {plan.rounds} releases; a server "
            "that brings clients of its own is not covered, nor what a channel rounds",
        )
