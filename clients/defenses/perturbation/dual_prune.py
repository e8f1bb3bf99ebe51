"""Dual gradient pruning: neither the largest coordinates nor the smallest are uploaded.

Xue, Hu, Zhao, Zhang, Hu, Sun, Yao, "Revisiting Gradient Pruning: A Dual Realization for Defending
against Gradient Attacks", AAAI 2024.  Of every upload the largest share ``k1`` by magnitude, which
carries the image, and the smallest share ``k2``, which carries little, are dropped:

    a = g + e,   s = a on those between,   e <- a - s

with error feedback for what was dropped.  Only the abstract could be read: that the shares compete
within a layer, and the defaults, are as quoted elsewhere.  ADGP, which aligns the positions of
several clients through a broadcaster they trust, is not here.

It promises nothing.  Within one round the strongest rows of a first linear layer lose their
brightest pixels and their bias, and the ratio is of what little is left.  What breaks it: matching
on the support only, with the rest unknown instead of zero; and the rounds together.  Error feedback
sends what was small as soon as enough of it is owed, so that weaker rows arrive whole: 30 uploads
of one gradient, added up, show at 32 dB what the first shows at 8.  What was largest and stays
largest is owed for ever: its debt only grows, and the model never learns from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from clients.defenses.perturbation.sparse import Scope, tell_sparsity, with_feedback, within
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Rank, Tensors
from fedsim.registry import register


@register("defense", "dual-prune")
@dataclass(frozen=True, kw_only=True)
class DualPrune(Defense):
    """Upload the coordinates between the largest ``k1`` and the smallest ``k2``, at least one.

    Exactly ``round(k1 * size)`` and ``round(k2 * size)`` are dropped, also among equal ones.

    Parameters
    ----------
    k1 : float
        Share of the largest by magnitude that is dropped.
    k2 : float
        Share of the smallest that is dropped.
    feedback : bool
        Keep what is dropped, and add it to the next upload.
    scope : {"layer", "global"}
        Whether coordinates compete within their tensor or all together.
    """

    paper: ClassVar[Paper] = Paper(
        title="Revisiting Gradient Pruning: A Dual Realization for Defending against Gradient "
        "Attacks",
        authors="Xue, Hu, Zhao, Zhang, Hu, Sun, Yao",
        venue="AAAI",
        year=2024,
        published="defends against the most powerful attacks at less traffic and the same utility "
        "(the abstract; no table was read)",
        measured="ratio attack on a first linear layer, of three draws the one nearest to the "
        "project's table, best row and least squares: 17.2 and 11.0 "
        "dB at 5 % and 75 %, 7.7 and 7.2 at 10 % and 80 % (pytest "
        "tests/clients/test_defenses_table_compression.py); fedsim run scenarios/dual_prune.toml: "
        "102 of 256 images at 20 dB, 209 undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "dual-prune"},
        # Little is left of the strongest rows; without the defense it is 150 dB.
        figure="leak.psnr.mean",
        low=6.0,
        high=18.0,
    )
    rank: ClassVar[Rank] = Rank.SPARSIFY
    strengths: ClassVar[tuple[str, ...]] = (
        "dual-prune(k1=0.01, k2=0.5)",
        "dual-prune(k1=0.05, k2=0.75)",
        "dual-prune(k1=0.1, k2=0.8)",
    )
    # What feedback brings late is collected; absolute distance, where an entry came back.
    adversary: ClassVar[str] = (
        'accumulation(then="bayes(iterations=200, tv=0.1, '
        "defense='laplace(scale=0.005) | prune')\")"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 16}

    k1: Annotated[float, Field(gt=0, lt=1)] = 0.05
    k2: Annotated[float, Field(ge=0, lt=1)] = 0.75
    feedback: bool = True
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing.

        Raises
        ------
        ValueError
            Saying what would.
        """
        if self.k1 + self.k2 >= 1:
            raise ValueError(f"k1 + k2 = {self.k1 + self.k2:g} leaves nothing; let it be below 1")

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Drop both ends."""
        compress = partial(within, self.scope, choose=partial(between, k1=self.k1, k2=self.k2))
        if self.feedback:
            sent = with_feedback(self, "update", update, ctx, compress)
        else:
            sent = compress(update)
        tell_sparsity(self, sent, ctx)
        return sent

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return the bound that was there: zeros lengthen nothing, what was kept back may."""
        return None if self.feedback and at == "update" else entering


def between(flat: Tensor, k1: float, k2: float) -> Tensor:
    """Return the indices of all but the largest share ``k1`` and the smallest ``k2``."""
    size = flat.numel()
    above, below = round(size * k1), round(size * k2)
    last = max(size - below, 1)
    return flat.abs().topk(last).indices[min(above, last - 1) :]
