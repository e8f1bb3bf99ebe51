"""Gaussian noise on what a client sends: local differential privacy, where a clip bounds it.

``u <- u + N(0, std^2 I)``.  With the L2 norm clipped to C before it, replacing all of a client's
data moves what is sent by at most ``2 C`` (nobody can be added to or removed from a client's own
message), and each of the T messages is the Gaussian mechanism of Dwork and Roth 2014, App. A; T of
them compose to one of ``std / sqrt(T)`` exactly (Dong, Roth, Su 2022, Cor. 3.3), whose epsilon is
that of Balle and Wang 2018, Theorem 8.  No subsampling amplifies: the server sees who takes part.
Without a clip there is no sensitivity, hence no epsilon: the noise may help, nothing is proven.
With one, every release goes into the client's ledger; a budget that stops it is ``local-dp``'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from clients.defenses.toy import RATIO_ATTACK
from clients.ledger import record, released
from clients.noise import Std, noised
from fedsim.accounting import Release, check_delta
from fedsim.accounting import epsilon as total
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(Defense):
    """Add independent normal noise to every coordinate, from the client's secret stream.

    Parameters
    ----------
    std : float
        Standard deviation, absolute; of the gradient (FedSGD) or of ``after - before`` (FedAvg).
    at : {"update", "gradient"}
        What is perturbed: the upload only, or each step's batch gradient before the client itself
        trains on it.
    delta : float
        The delta at which epsilon is told.
    """

    paper: ClassVar[Paper] = Paper(
        title="Federated Learning with Differential Privacy: Algorithms and Performance Analysis",
        authors="Wei, Li, Ding, Ma, Yang, Farokhi, Jin, Quek, Poor",
        venue="IEEE Transactions on Information Forensics and Security",
        year=2020,
        published="no figure for reconstruction",
        measured="ratio attack on a first linear layer, gradient norm 12, std 1e-4 / 1e-3 / 1e-2 / "
        "1e-1: best row 56.6 / 36.7 / 17.1 / 7.3 dB, least squares 70.9 / 50.5 / 21.5 / 5.7 dB, "
        "means over 64 secret keys (pytest tests/clients/test_defenses_table.py); fedsim run "
        "scenarios/robbing_the_fed_noised.toml (clipped to 1): 6 of 256 images at 20 dB with std "
        "1e-3, 181 with 1e-4",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "gaussian(std=0.1)"},
        # Noise of the size of the whole bias gradient: what is left is noise.
        figure="leak.psnr.mean",
        low=3.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.NOISE
    strengths: ClassVar[tuple[str, ...]] = (
        "clip(norm=0.1) | gaussian(std=1e-4)",
        "clip(norm=0.1) | gaussian(std=1e-3)",
        "clip(norm=0.1) | gaussian(std=1e-2)",
    )
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='clip(norm=0.1) | gaussian(std=1e-3)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    std: Std = 1e-3
    at: Place = "update"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def check_setting(self, setting: Setting) -> None:
        """Refuse a delta of one over the number of clients."""
        check_delta(self.delta, setting.clients, "client")

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        """Add noise to one step's gradient."""
        return self._noised(gradient, ctx) if self.at == "gradient" else gradient

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Add noise to the upload."""
        return self._noised(update, ctx) if self.at == "update" else update

    def _noised(self, tensors: Tensors, ctx: ClientContext) -> Tensors:
        bound = ctx.bounds.get(self.name, {}).get(self.at)
        if bound is not None:
            record(ctx, self.name, (Release(self.std / (2 * bound)),))
            ctx.effect(self).releases = released(ctx, self.name)
        return noised(tensors, self.std, ctx.secret(self.name, ctx.round, ctx.step))

    @property
    def noises(self) -> Place:
        """As asked."""
        return self.at

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return None where the noise is added: it has no bound."""
        return entering if at != self.at else None

    def privacy(self, plan: TrainingPlan, entering: Mapping[Place, float | None]) -> Privacy | None:
        """Return client-level epsilon over all rounds; None without a norm bound before the noise.

        At the gradient every local step of every round is one release: the batch gradient's clip
        does not bound single examples, so that the unit is the client here too.
        """
        bound = entering[self.at]
        if bound is None:
            return None
        releases = plan.rounds * (plan.steps if self.at == "gradient" else 1)
        sensitivity = 2 * bound
        return Privacy(
            epsilon=epsilon_of(self.std, sensitivity, releases, self.delta),
            delta=self.delta,
            unit="client",
            relation="replace-one",
            mechanism=f"Gaussian, std {self.std:g}, sensitivity {sensitivity:g} (2 x clip), "
            f"{releases} releases, no amplification",
        )


def epsilon_of(std: float, sensitivity: float, releases: int, delta: float) -> float:
    """Return epsilon of ``releases`` Gaussian mechanisms on the same data, at ``delta``."""
    return total((Release(std / sensitivity, count=releases),), delta)
