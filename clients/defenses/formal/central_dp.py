"""Central differential privacy: the server clips every client's update, and noises their average.

    u_k <- u_k min(1, S / |u_k|_2)        w <- w + (sum_k u_k) / n + N(0, (z S / n)^2 I)

DP-FedAvg with a fixed denominator: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private
Recurrent Language Models", ICLR 2018, Alg. 1; all clients weigh alike, and n is the cohort that was
asked, whoever answers.  Adaptive clipping is Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021,
Alg. 1: with b the noised share of updates *as they came* whose norm is at most S,

    S <- S exp(-eta (b - gamma))

which settles where a share gamma is left as it is.  The share's noise takes a part of z.

**It hides nothing from the server**, which reads every upload in the clear and is trusted to forget
it.  The guarantee is about the models that come out: against whoever gets those and nothing else.

Flower's own (1.41) asks whether the norm is below S after clipping, where it always is: S runs away
from 10 to 1,484 and from 0.1 to 7e-4 in fifty rounds in which every norm is 1.  It divides by zero
for an update that is zero, counts integer buffers into the norm, and adds the noise of equal
weights to an average by numbers of examples.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from pydantic import Field

from clients.defenses.perturbation.clip import LEAST_NORM, MOST_NORM, Norm
from clients.defenses.toy import RATIO_ATTACK
from clients.noise import StdOrNone
from fedsim.accounting import Release, check_delta, epsilon
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Defense, Place, Privacy, Rank, ServerContext, TrainingPlan
from fedsim.federation import Wrapper, with_arrays
from fedsim.models import is_buffer
from fedsim.registry import register

Arrays = dict[str, NDArray[np.float64]]
_CHOOSING = (flower.FedMedian, flower.FedTrimmedAvg, flower.MultiKrum, flower.Bulyan)


@register("defense", "central-dp")
@dataclass(frozen=True, kw_only=True)
class CentralDP(Defense):
    """The server clips updates to ``norm``, averages them alike, and adds noise to the average.

    An update is ``after - before`` (FedAvg), or ``-lr * gradient`` (FedSGD).

    Parameters
    ----------
    norm : float
        ``S``, or what it starts from.
    sigma : float
        ``z``: noise of the sum, in units of ``norm``.
    adaptive : bool
        Whether ``norm`` follows the quantile of the updates' norms.
    quantile : float
        ``gamma``: the share of updates that is to be left unclipped.
    rate : float
        ``eta``: how fast ``norm`` follows.
    relation : {"add-or-remove-one", "replace-one"}
        What may differ of the clients: one more, as in the paper, or all data of one, which moves
        the sum by twice as much.
    delta : float
        The delta at which epsilon is told.
    """

    paper: ClassVar[Paper] = Paper(
        title="Learning Differentially Private Recurrent Language Models",
        authors="McMahan, Ramage, Talwar, Zhang",
        venue="ICLR",
        year=2018,
        published="no privacy from the server is claimed, and no figure for reconstruction",
        measured="fedsim run scenarios/central_dp.toml: 16 of 16 images at 20 dB, as undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "central-dp(norm=0.1, sigma=1.0)"},
        # The server reads uploads before it adds any noise: not a decibel is lost.
        figure="leak.psnr.min",
        low=100.0,
        high=200.0,
    )
    changes_upload: ClassVar[bool] = False
    rank: ClassVar[Rank] = Rank.SERVER
    strengths: ClassVar[tuple[str, ...]] = (
        "central-dp(norm=0.1, sigma=0.01)",
        "central-dp(norm=0.1, sigma=0.1)",
        "central-dp(norm=0.1, sigma=1.0)",
    )
    adversary: ClassVar[str] = "bayes(iterations=200, tv=0.1, defense='laplace(scale=0.005)')"

    norm: Norm = 1.0
    sigma: StdOrNone = 1.0
    adaptive: bool = False
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: Annotated[float, Field(gt=0, le=10)] = 0.2
    relation: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def check_setting(self, setting: Setting) -> None:
        """Refuse a channel behind which the server has no single client's update to clip."""
        check_delta(self.delta, setting.clients, "client")
        if setting.channel.aggregates:
            raise ValueError(
                f"behind {setting.channel.name} the server gets sums, and cannot clip what is in "
                "them; clients must: local-dp, distributed-dp, or channel = 'plain'"
            )
        if setting.channel.mixes:
            raise ValueError(
                f"behind {setting.channel.name} each upload is of several clients, and each client "
                "in several: clipping uploads bounds nobody's part by norm; clients must clip "
                "before they mix (local-dp), or channel = 'plain'"
            )

    def strategy(self, inner: Strategy, ctx: ServerContext) -> Strategy:
        """Clip and noise what ``inner`` is told clients made."""
        if isinstance(inner, _CHOOSING):
            raise ValueError(
                f"{type(inner).__name__} compares uploads, and the noise is that of their mean; "
                "use an average: fedavg, fedavgm, fedadam, fedadagrad, fedyogi"
            )
        return CentralServer(inner, self, ctx)

    def count_noise(self, cohort: int) -> float:
        """Return the noise on the number of short updates: a twentieth of the cohort.

        That is the paper's, for cohorts of a hundred and more.  In small ones it is ``sigma``, so
        that the number costs no more than a quarter of the privacy.
        """
        return max(cohort / 20, self.sigma)

    def noise_multiplier(self, cohort: int) -> float:
        """Return what of ``sigma`` the sum gets: more, where the share of short updates is told.

        ``z^-2 = z_sum^-2 + (2 sigma_b)^-2`` (Andrew et al., Theorem 1): a count of updates, each
        counted as 1/2 or -1/2, has a sensitivity of 1/2.
        """
        if not self.adaptive:
            return self.sigma
        return self.sigma / math.sqrt(1 - (self.sigma / (2 * self.count_noise(cohort))) ** 2)

    def privacy(
        self,
        plan: TrainingPlan,
        entering: Mapping[Place, float | None],  # noqa: ARG002 - the server clips by itself
    ) -> Privacy | None:
        """Return client-level epsilon of all models that come out, for who sees nothing else.

        No sampling amplifies: who takes part hangs on the public seed.
        """
        multiplier = self.sigma / (2 if self.relation == "replace-one" else 1)
        return Privacy(
            epsilon=epsilon((Release(multiplier, count=plan.rounds),), self.delta),
            delta=self.delta,
            unit="client",
            relation=self.relation,
            mechanism=f"Gaussian on the sum at the server, noise multiplier {self.sigma:g}, "
            f"{plan.rounds} releases, no amplification; of the models that come out only: the "
            "server itself reads every upload, and nothing is hidden from it",
        )


class CentralServer(Wrapper):
    """Hands the inner strategy one update, the noised average of the clipped ones."""

    def __init__(self, inner: Strategy, defense: CentralDP, ctx: ServerContext) -> None:
        super().__init__(inner)
        self.defense, self.ctx, self.norm = defense, ctx, defense.norm
        self.rounds = self.seen = self.clipped = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what was sent."""
        self.sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, add up, add noise: integer arrays and BatchNorm's statistics stay as they were."""
        answered = list(replies)
        before = {
            name: array.numpy().astype(np.float64)
            for name, array in self.sent.items()
            if np.issubdtype(array.dtype, np.floating) and not is_buffer(name)
        }
        total, short = self._sum(before, answered)
        cohort, norm = self.ctx.cohort, self.norm
        std = self.defense.noise_multiplier(cohort) * norm / cohort
        generator = self.ctx.secret(self.defense.name, server_round)
        after = ArrayRecord(dict(self.sent))
        for name, array in before.items():
            noise = torch.randn(array.shape, generator=generator, dtype=torch.float64)
            average = array + total[name] / cohort + std * noise.numpy()
            after[name] = Array(average.astype(self.sent[name].dtype))
        if self.defense.adaptive:
            self._adapt(short - len(answered) / 2, generator)
        self._tell(len(answered), short, norm, std)
        return self.inner.aggregate_train(server_round, [with_arrays(answered[0], after)])

    def _sum(self, before: Arrays, replies: list[Message]) -> tuple[Arrays, int]:
        """Return the sum of clipped updates, and how many were too short to clip."""
        total = {name: np.zeros_like(array) for name, array in before.items()}
        short = 0
        for reply in replies:
            arrays = reply.content.array_records["arrays"]
            update = {name: arrays[name].numpy() - array for name, array in before.items()}
            length = math.sqrt(sum(float(np.square(u).sum()) for u in update.values()))
            short += length <= self.norm
            if not math.isfinite(length):  # nothing bounds it: it counts as no change
                continue
            factor = self.norm / length if length > self.norm else 1.0
            for name, part in update.items():
                total[name] += factor * part
        return total, short

    def _adapt(self, centered: float, generator: torch.Generator) -> None:
        """Move ``S`` by the noised share of updates that it leaves alone, within what may be."""
        count_noise = self.defense.count_noise(self.ctx.cohort) if self.defense.sigma else 0.0
        noise = count_noise * float(torch.randn((), generator=generator, dtype=torch.float64))
        share = (centered + noise) / self.ctx.cohort + 0.5
        moved = math.log(self.norm) - self.defense.rate * (share - self.defense.quantile)
        self.norm = math.exp(min(max(moved, math.log(LEAST_NORM)), math.log(MOST_NORM)))

    def _tell(self, replies: int, short: int, norm: float, std: float) -> None:
        self.rounds, self.seen = self.rounds + 1, self.seen + replies
        self.clipped += replies - short
        self.ctx.figures[self.defense.name] = {
            "rounds": self.rounds,
            "updates clipped": self.clipped,
            "of": self.seen,
            "norm in the last round": norm,
            "noise std in the last round": std,
        }
