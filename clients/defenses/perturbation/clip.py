"""Clipping: scale what is uploaded down to a bounded L2 norm.

The norm is global, over all trained tensors as one vector: ``u <- u * min(1, C / ||u||_2)``
(McMahan, Ramage, Talwar, Zhang, ICLR 2018, Sec. 2).  Not the elementwise clamp, which changes the
direction, and not DP-SGD's clipping of every example's gradient: one factor for a whole batch or
update cancels in every ratio and cosine, so that by itself it hides nothing.  It is what makes
noise mean something: replacing all of a client's data moves what it sends by at most ``2 C``.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import ClientContext, Defense, Place, Rank, Tensors
from fedsim.registry import register

#: A norm that bounds: its square, and what noise is beside it, must stay within float32.
LEAST_NORM, MOST_NORM = 1e-15, 1e15
Norm = Annotated[float, Field(ge=LEAST_NORM, le=MOST_NORM)]


@register("defense", "clip")
@dataclass(frozen=True, kw_only=True)
class Clip(Defense):
    """Scale to a global L2 norm of at most ``norm``; direction and buffers stay.

    Parameters
    ----------
    norm : float
        ``C``.
    at : {"update", "gradient"}
        What is clipped: the upload only, or each step's batch gradient before the client itself
        trains on it.
    """

    paper: ClassVar[Paper] = Paper(
        title="Learning Differentially Private Recurrent Language Models",
        authors="McMahan, Ramage, Talwar, Zhang",
        venue="ICLR",
        year=2018,
        published="no privacy is claimed for clipping alone",
        measured="ratio attack on a first linear layer: 120 dB (the cap) with and without (pytest "
        "tests/clients/test_defenses_table.py); fedsim run scenarios/robbing_the_fed_clipped.toml: "
        "204 of 256 images at 20 dB, as many as undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "clip(norm=0.5)"},
        # One factor for all cancels in the ratio: not a decibel is lost.
        figure="leak.psnr.min",
        low=100.0,
        high=200.0,
    )
    rank: ClassVar[Rank] = Rank.CLIP
    strengths: ClassVar[tuple[str, ...]] = (
        "clip(norm=0.5)",
        "clip(norm=0.1)",
        "clip(norm=0.02)",
    )
    # A cosine does not mind one factor for all.  The noise is none of the clients': it makes the
    # distance that of absolute values, entry by entry, which finds more.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.1, defense='clip(norm=0.1) | laplace(scale=0.0003)')"
    )

    norm: Norm = 1.0
    at: Place = "update"

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:  # noqa: ARG002
        """Clip one step's gradient."""
        return clipped(gradient, self.norm) if self.at == "gradient" else gradient

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:  # noqa: ARG002
        """Clip the upload."""
        return clipped(update, self.norm) if self.at == "update" else update

    @property
    def clips(self) -> Place:
        """As asked."""
        return self.at

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return ``norm`` where this clips, or the bound that was there if it is tighter."""
        if at != self.at:
            return entering
        return self.norm if entering is None else min(self.norm, entering)


def global_norm(tensors: Tensors) -> float:
    """Return the L2 norm over all tensors as one vector, summed in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def clipped(tensors: Tensors, norm: float) -> Tensors:
    """Return the tensors scaled to at most ``norm``; the very same ones if they already are.

    What is not finite has no length that could be bounded: it counts as nothing, all of it, or the
    server would learn which data a model overflows on.
    """
    before = global_norm(tensors)
    if before <= norm:
        return tensors
    if not math.isfinite(before):
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    # A few units in the last place less, so that rounding never leaves more than ``norm``.
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())
    factor = norm / before * (1 - 4 * rounding)
    return {name: tensor * factor for name, tensor in tensors.items()}
