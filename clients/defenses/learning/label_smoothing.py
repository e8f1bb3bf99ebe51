"""Label smoothing: train on softened labels, so that the last layer says less of the class.

``y_j <- (1 - a) y_j + a / K`` (Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception
Architecture for Computer Vision", CVPR 2016, Sec. 7).  The gradient of the last bias is ``p - y``:
a label rule that looks for the one negative entry finds several once the model is sure of itself
(``p_j < a / K``), or none where ``a`` is negative.

Promises nothing of the images: every ratio and every imprint is as exact as before.  Broken for
labels as well by taking the smallest entry instead of a negative one.  Struppek, Hintersdorf,
Kersting, "Be Careful What You Smooth For", ICLR 2024, find that positive smoothing makes trained
models easier to invert and negative smoothing harder; ``amount`` takes both signs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from clients.defenses.learning.mixing import soft
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Rank
from fedsim.registry import register


@register("defense", "label-smoothing")
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Defense):
    """Move labels towards the uniform distribution, or, with a negative amount, away from it.

    Parameters
    ----------
    amount : float
        ``a``, not zero.
    """

    paper: ClassVar[Paper] = Paper(
        title="Rethinking the Inception Architecture for Computer Vision",
        authors="Szegedy, Vanhoucke, Ioffe, Shlens, Wojna",
        venue="CVPR",
        year=2016,
        published="no figure for reconstruction",
        measured="fedsim run scenarios/label_smoothing.toml (ratio attack on a first linear "
        "layer, one photo tile a client): 4 of 4 exact with their labels, 151 dB at least, as "
        "undefended; the smallest entry of the last bias gradient is the class even where nine of "
        "ten are negative (pytest tests/clients/test_defenses_label_smoothing.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "label-smoothing"},
        # Labels are not in the ratio.
        figure="leak.psnr.min",
        low=100.0,
        high=200.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = (
        "label-smoothing(amount=0.1)",
        "label-smoothing(amount=0.5)",
        "label-smoothing(amount=0.9)",
    )
    adversary: ClassVar[str] = "inverting-gradients(iterations=200, tv=1e-2)"

    amount: Annotated[float, Field(gt=-10, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if self.amount == 0:
            raise ValueError("an amount of 0 leaves the labels as they are; the usual one is 0.1")

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Return labels ``[B, K]`` that sum to one; images stay."""
        labels = soft(batch[1], batch[0], ctx)
        return batch[0], (1 - self.amount) * labels + self.amount / labels.shape[1]
