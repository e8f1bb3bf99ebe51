"""Local differential privacy whose clipping follows the client and whose noise shrinks with time.

    u_t <- u_t min(1, C_t / |u_t|_2) + N(0, (z_t 2 C_t)^2 I)
    m_t  = min(|u_t|_2, C_t) + N(0, (s C_t)^2)                    kept by the client, never sent
    C_t+1 = C_t exp(eta (c m_t / C_t - 1)), within [C_t / 2, 2 C_t]
    z_t  = max(z d^t, z_last)

After Fu, Chen, Ling, "Adap DP-FL: Differentially Private Federated Learning with Adaptive Noise",
TrustCom 2022: the clipping norm follows each client's own norms from round to round, and there is
less noise as training converges.  Two things are this project's, because an epsilon needs them.
The norm that the next round's clipping hangs on is noised before use, and its noise stands in the
ledger: one that is not noised tells of the data through the size of later noise.  And the noise
falls by a schedule of the client's own count of rounds, not by the loss, and not by numbers of
rounds that a server writes.

Each round is one Gaussian mechanism of multiplier z_t (sensitivity ``2 C_t``: replacing all of a
client's data) and one of s (a norm in ``[0, C_t]`` moves by ``C_t``), chosen by what was released
before: they compose to ``1 / mu^2``, ``mu^2 = sum 1 / z_t^2 + 1 / s^2``.

Late rounds have little noise, and cost most: an attacker waits for them.  And one client's norm is
costly to follow in private: what ``s`` saves in epsilon it takes from how well C fits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from clients.defenses.perturbation.clip import Norm, clipped, global_norm
from clients.defenses.toy import RATIO_ATTACK
from clients.ledger import NoisedUpdate, rounds_done
from clients.noise import Std, noised
from fedsim.accounting import Release, Releases
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Privacy, Rank, Tensors, TrainingPlan
from fedsim.registry import register


@register("defense", "adaptive-noise-dp")
@dataclass(frozen=True, kw_only=True)
class AdaptiveNoiseDP(NoisedUpdate):
    """Clip the upload to a norm that follows this client's, and add noise that falls by round.

    Parameters
    ----------
    norm : float
        ``C_0``: the L2 norm that the first upload is clipped to.
    sigma : float
        ``z``: the first round's noise, in units of the sensitivity ``2 C``.
    decay : float
        ``d``: what each round's noise is of the last one's.
    least : float
        ``z_last``: the noise below which it does not fall.
    norm_sigma : float
        ``s``: noise of the norm that the client remembers, in units of ``C``.
    headroom : float
        ``c``: the clipping norm where it settles, in units of the updates' norm.
    rate : float
        ``eta``: how fast it follows.
    """

    paper: ClassVar[Paper] = Paper(
        title="Adap DP-FL: Differentially Private Federated Learning with Adaptive Noise",
        authors="Fu, Chen, Ling",
        venue="TrustCom",
        year=2022,
        published="no figure for reconstruction",
        measured="fedsim run scenarios/adaptive_noise_dp.toml: 0 of 31 images at 20 dB",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "adaptive-noise-dp(norm=1.0, sigma=1.0)"},
        figure="leak.psnr.mean",
        low=3.0,
        high=10.0,
    )
    rank: ClassVar[Rank] = Rank.CLIP
    strengths: ClassVar[tuple[str, ...]] = (
        "adaptive-noise-dp(norm=0.1, sigma=0.01)",
        "adaptive-noise-dp(norm=0.1, sigma=0.1)",
        "adaptive-noise-dp(norm=0.1, sigma=2.0)",
    )
    # The first round: 2 C times sigma.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='clip(norm=0.1) | gaussian(std=0.02)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    norm: Norm = 1.0
    sigma: Std = 2.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.95
    least: Std = 0.5
    norm_sigma: Std = 2.0
    headroom: Annotated[float, Field(gt=1)] = 1.25
    rate: Annotated[float, Field(gt=0)] = 0.2

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Clip, add the noise, choose the next norm, and enter both in the ledger."""
        bound, generator = self.bound(ctx), self.noise(ctx)
        done = rounds_done(ctx, self.name)
        within = clipped(update, bound)
        sent = noised(within, self._multiplier(done) * 2 * bound, generator)
        share = global_norm(within) / bound + self.norm_sigma * _one(generator)
        wanted = self.rate * (self.headroom * share - 1)
        following = bound * math.exp(min(max(wanted, -math.log(2)), math.log(2)))
        ctx.store[self._key] = torch.tensor([following], dtype=torch.float64)
        ctx.effect(self).figures["clipping norm"] = bound
        self.spend(ctx)
        return sent

    def bound(self, ctx: ClientContext) -> float:
        """Return this round's clipping norm: it hangs on what was noised before."""
        kept = ctx.store.get(self._key)
        return self.norm if kept is None else float(kept[0])

    @property
    def _key(self) -> str:
        return f"norm/{self.name}"

    def _multiplier(self, done: int) -> float:
        return max(self.sigma * self.decay**done, min(self.least, self.sigma))

    def releases(self, plan: TrainingPlan, before: int) -> Releases:  # noqa: ARG002 - no sampling
        """The noised update, and the noised norm that the next clipping hangs on."""
        return Release(self._multiplier(before)), Release(self.norm_sigma)

    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Client level, against the server itself."""
        last = self._multiplier(plan.rounds - 1)
        return Privacy(
            epsilon=epsilon,
            delta=self.delta,
            unit="client",
            relation="replace-one",
            mechanism=f"Gaussian, noise multiplier {self.sigma:g} falling to {last:.3g} of twice "
            f"the clipping norm, and {self.norm_sigma:g} for the norm that it follows, "
            f"{plan.rounds} rounds, no amplification",
        )


def _one(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator, dtype=torch.float64))
