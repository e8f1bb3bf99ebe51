"""Gradient concentration: how many examples is a layer's gradient really of?

The effective number of examples behind a weight's gradient is that of Kish's design effect,

    n_eff(W) = (sum_i n_i)^2 / sum_i n_i^2,   n_i = |dl_i / dW|

which is B for equal lengths and k where k examples share it and the others are silent.  It falls
where the largest single ratio (D-SNR) still looks benign: class fishing leaves the several images
of one class (Wen et al., ICML 2022).  ``1 - min_W n_eff / B`` is the score, so that higher is more
suspicious.  The batch gradient's own concentration stands beside it: the share of its squared norm
in the top thousandth of its coordinates.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.detection.judged import judged, refuse_single
from clients.defenses.detection.layers import gradient_norms
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

Share = Annotated[float, Field(ge=0, lt=1)]
TOP = 1e-3


@register("defense", "gradient-concentration")
@dataclass(frozen=True, kw_only=True)
class GradientConcentration(Defense):
    """Measure on how few of the batch's examples a layer's gradient rests.

    Undecidable for one example, and where no example has a gradient.  Costs a gradient for each
    example.

    Parameters
    ----------
    refuse_above : float or None
        Refuse a model that leaves fewer than ``1 - refuse_above`` of the batch; 0.75 asks for a
        quarter.
    coordinates : float or None
        Refuse a model whose batch gradient has more than this share of its squared norm in the top
        thousandth of its coordinates.
    """

    paper: ClassVar[Paper] = Paper(
        title="Survey Sampling (the effective sample size)",
        authors="Kish",
        venue="Wiley",
        year=1965,
        published="not about learning: using it on per-example gradients is ours",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "attack": "none",
            "model.name": "convnet",
            "federation.local": "fedsgd(batch_size=32, lr=0.1)",
            "defenses": "gradient-concentration",
        },
        # An untrained model is nearly equally wrong on all images.
        figure="detection.0.checks.gradient-concentration",
        low=0.0,
        high=0.4,
    )
    changes_upload: ClassVar[bool] = False

    refuse_above: Share | None = None
    coordinates: Share | None = None

    @property
    def refuses_on_examples(self) -> bool:
        """Whether a limit is set."""
        return self.refuse_above is not None or self.coordinates is not None

    def inspect(
        self,
        model: nn.Module,
        received: Tensors,  # noqa: ARG002
        probe: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return ``gradient-concentration`` and ``gradient-concentration/coordinates``."""
        scores = {self.name: float("nan"), f"{self.name}/coordinates": in_the_top(model, probe)}
        if len(probe[1]) > 1:
            norms = gradient_norms(model, probe)
            counts = [effective(n) for n in norms.values() if float(n.sum()) > 0]
            least = min(counts, default=float("nan"))
            scores[self.name] = 1 - least / len(probe[1])
        limits = dict(zip(scores, (self.refuse_above, self.coordinates), strict=True))
        return judged(scores, limits)

    def check_setting(self, setting: Setting) -> None:
        """Refuse a limit on examples where every client's batch is of one."""
        if self.refuse_above is not None:
            refuse_single(self.name, setting)


def effective(norms: Tensor) -> float:
    """Return ``(sum n)^2 / sum n^2`` of lengths ``[B]``, between 1 and B."""
    scaled = norms.double() / norms.max()
    return float(scaled.sum().square() / scaled.square().sum())


def in_the_top(model: nn.Module, batch: Batch) -> float:
    """Return the share of the batch gradient's squared norm in its top thousandth; NaN if zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    squares = torch.cat([g.flatten() for g in gradients]).double().square()
    top = squares.topk(max(1, int(TOP * len(squares)))).values
    return float(top.sum() / squares.sum())
