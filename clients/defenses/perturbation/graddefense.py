"""GradDefense: noise on some slices of the gradient, cut so that all tell equally much.

The sensitivity of a layer (parameter tensor) with weights W_l to a batch of n images is

    s_l = mean_i | d/dx_i <v_l, dL/dW_l> |_F

All gradients as one vector, in which each entry of a layer weighs ``s_l / |W_l|``, are cut into
``slices`` consecutive slices of equal weight; ``perturbed`` of them, drawn anew in each step, get
N(0, scale^2) on every entry.  Wang, Guo, Xie, Qi: "Protect Privacy from Gradient Leakage Attack in
Federated Learning", INFOCOM 2022, and the authors' code.

What was wrong there: v_l is all ones, and under softmax cross-entropy the last layer's gradient
sums to exactly 0 for every input (the probabilities minus the label sum to 0): its sensitivity is
identically 0, the whole layer goes to the last slice, and half of the time it has no noise at all.
Here v_l is drawn from N(0, I) by default.  Also its slices overlap by one entry, and its noise
comes from a generator that is seeded with 0.

What it promises: no formal guarantee.  What it does not: the slices without noise are exact, and
which they are is drawn anew each step: who sees two uploads of the same examples knows which
entries agree.  Not here: the variant that clips each example's slices, and the server's
compensation, which filters eigenvalues and denoises for an attacker as well as for training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.aside import gradient_of, the_step
from clients.defenses.toy import RATIO_ATTACK
from clients.noise import Std, normal
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Place, Rank, Tensors
from fedsim.registry import register

EDGES = "graddefense.edges"


@register("defense", "graddefense")
@dataclass(frozen=True, kw_only=True)
class GradDefense(Defense):
    """Perturb slices of each step's gradient, before the client itself trains on it.

    The root batch, on which sensitivity is measured, is the client's own first of the round: the
    paper's is a set that all share, and where it comes from is left open.

    Parameters
    ----------
    slices : int
        How many slices there are.
    perturbed : int
        How many of them get noise.
    scale : float
        Its standard deviation: 0.01 is that of others' comparisons (plato), the authors' own
        demo has 5e-4.
    projection : {"normal", "ones"}
        v: drawn from N(0, I), or all ones as in the authors' code.
    """

    paper: ClassVar[Paper] = Paper(
        title="Protect Privacy from Gradient Leakage Attack in Federated Learning",
        authors="Wang, Guo, Xie, Qi",
        venue="INFOCOM",
        year=2022,
        published="no figure was read",
        measured="fedsim run scenarios/graddefense.toml (convnet(stride=2), inverting-"
        "gradients): 22.8 dB, 30.9 undefended; with ones for the projection 22.8, "
        "with noise on all ten 19.9",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "graddefense"},
        # A row in a slice without noise is exact; where no whole row is, noise decides.  By the
        # machine's secret key that befalls one to four of the four images, never none so far.
        figure="leak.psnr.min",
        low=12.0,
        high=30.0,
    )
    rank: ClassVar[Rank] = Rank.GRADIENT
    strengths: ClassVar[tuple[str, ...]] = (
        "graddefense(perturbed=2)",
        "graddefense(perturbed=5)",
        "graddefense(perturbed=10)",
    )
    # Absolute distance: entries with noise are outliers among those without.
    adversary: ClassVar[str] = (
        "bayes(iterations=200, tv=0.4, defense='laplace(scale=0.005)', rounds=True)"
    )
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {"federation.rounds": 4}

    slices: Annotated[int, Field(ge=1)] = 10
    perturbed: Annotated[int, Field(ge=1)] = 5
    scale: Std = 0.01
    projection: Literal["normal", "ones"] = "normal"

    def __post_init__(self) -> None:
        """Refuse more perturbed slices than there are (``ValueError``)."""
        if self.perturbed > self.slices:
            raise ValueError(f"of {self.slices} slices {self.perturbed} cannot be perturbed")

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse more slices than the model has parameters."""
        if (size := sum(p.numel() for p in model.parameters())) < self.slices:
            raise ValueError(f"{size} parameters cannot be cut into {self.slices} slices")

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        """Return the gradient with noise on the slices that this step draws."""
        model, batch = the_step(ctx.trainee, ctx.batch)
        generator = ctx.secret(self.name, ctx.round, ctx.step)
        if ctx.step == 0:
            sensitivity = self.sensitivity(model, batch, generator)
            ctx.store[EDGES] = edges({n: sensitivity[n] for n in gradient}, gradient, self.slices)
        ends = ctx.store[EDGES].tolist()
        flat = torch.cat([g.detach().flatten() for g in gradient.values()])
        drawn = torch.randperm(self.slices, generator=generator)[: self.perturbed].tolist()
        for index in drawn:
            start, end = ends[index], ends[index + 1]
            flat[start:end] += self.scale * normal(flat[start:end], generator)
        share = sum(ends[index + 1] - ends[index] for index in drawn) / len(flat)
        ctx.effect(self).figures["share of entries with noise"] = share
        parts = flat.split([g.numel() for g in gradient.values()])  # type: ignore[no-untyped-call]
        return {n: part.view_as(gradient[n]) for n, part in zip(gradient, parts, strict=True)}

    @property
    def noises(self) -> Place:
        """Each step's gradient."""
        return "gradient"

    def sensitivity(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """Return ``s_l`` of each layer; one double backward pass for each."""
        images = batch[0].detach().requires_grad_()
        gradient = gradient_of(model, (images, batch[1]), create_graph=True)
        found = {}
        for name, g in gradient.items():
            v = normal(g, generator) if self.projection == "normal" else torch.ones_like(g)
            (slope,) = torch.autograd.grad(
                g, images, v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found[name] = float(slope.flatten(1).norm(dim=1).mean())
        return found


def edges(sensitivity: dict[str, float], gradient: Tensors, slices: int) -> Tensor:
    """Return where slices of equal sensitivity begin and end: ``[slices + 1]`` int64, rising.

    Entries behind the last that tells anything fall to the last slice; no slice is empty.  Where
    nothing tells anything all entries weigh the same.
    """
    sizes = torch.tensor([gradient[name].numel() for name in sensitivity])
    weights = torch.tensor(list(sensitivity.values()), dtype=torch.float64)
    if not weights.sum() > 0:
        weights = sizes.double()
    reached = torch.repeat_interleave(weights / sizes, sizes).cumsum(dim=0)
    wanted = reached[-1] * torch.arange(1, slices) / slices
    cuts = torch.searchsorted(reached, wanted) + 1
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, sizes.sum().view(1)])
    least = torch.arange(slices + 1)
    ends = (ends - least).cummax(dim=0).values + least  # no two cuts in one place
    return torch.minimum(ends, sizes.sum() - slices + least)
