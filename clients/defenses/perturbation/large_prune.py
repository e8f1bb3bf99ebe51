"""Pruning the largest coordinates: what stands out is what reconstructs.

Zhang, Zhu, Ren, Xiong, Choo, "Preserving Data Privacy in Federated Learning through Large Gradient
Pruning", Computers & Security 125, 2023.  The largest share of an upload's coordinates by magnitude
is set to zero, the rest is sent as it is.  The paper was not read: its share, whether the rest is
scaled up again, and whether what is dropped is remembered are open.  Here the rest is sent as it
is; error feedback is a parameter.  It is dual pruning (``dual-prune``) with no share of
the small ones dropped.

It promises nothing, and hides little from a ratio: where every row of a first linear layer carries
the same image at another strength, dropping the strongest leaves the weaker whole, bias included,
and one division of a weak row gives the image back exactly (120 dB at 10 %).  Only who reads the
strongest row, adds all rows up, or matches by the L2 norm, is bothered.  And it drops most of the
gradient's length.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from clients.defenses.perturbation.dual_prune import between
from clients.defenses.perturbation.sparse import Scope, tell_sparsity, with_feedback, within
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Rank, Tensors
from fedsim.registry import register


@register("defense", "large-prune")
@dataclass(frozen=True, kw_only=True)
class LargePrune(Defense):
    """Set the largest share ``ratio`` of the coordinates to zero: ``round(ratio * size)`` of them.

    Parameters
    ----------
    ratio : float
        Share that is dropped.
    feedback : bool
        Keep what is dropped, and add it to the next upload.
    scope : {"layer", "global"}
        Whether coordinates compete within their tensor or all together.
    """

    paper: ClassVar[Paper] = Paper(
        title="Preserving Data Privacy in Federated Learning through Large Gradient Pruning",
        authors="Zhang, Zhu, Ren, Xiong, Choo",
        venue="Computers & Security",
        year=2023,
        published="no figure was read",
        measured="ratio attack on a first linear layer at 10 %: best row exact, 120 dB (pytest "
        "tests/clients/test_defenses_large_prune.py); fedsim run scenarios/large_prune.toml: 102 "
        "of 256 images at 20 dB, 209 undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "large-prune(ratio=0.3)"},
        # The attack divides the row of the strongest bias, which is cut; a weak row would be exact.
        figure="leak.psnr.mean",
        low=5.0,
        high=18.0,
    )
    rank: ClassVar[Rank] = Rank.SPARSIFY
    strengths: ClassVar[tuple[str, ...]] = (
        "large-prune(ratio=0.01)",
        "large-prune(ratio=0.05)",
        "large-prune(ratio=0.2)",
    )
    # Absolute distance, where an entry came back.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='laplace(scale=0.005) | prune')"
    )

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.05
    feedback: bool = False
    scope: Scope = "layer"

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Drop the largest."""
        compress = partial(within, self.scope, choose=partial(between, k1=self.ratio, k2=0.0))
        if self.feedback:
            sent = with_feedback(self, "update", update, ctx, compress)
        else:
            sent = compress(update)
        tell_sparsity(self, sent, ctx)
        return sent

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return the bound that was there: zeros lengthen nothing, what was kept back may."""
        return None if self.feedback and at == "update" else entering
