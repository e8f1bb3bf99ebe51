"""D-SNR: does one example dominate a layer's gradient?

Garov, Dimitrov, Jovanović, Vechev, "Hiding in Plain Sight: Disguising Data Stealing Attacks in
Federated Learning", ICLR 2024.  An attack that leaves one image of the batch in the gradient must
silence the others, which shows in the lengths of the per-example gradients:

    D-SNR = max over weights W of  max_i |g_i| / sum_{j != i} |g_j|,   g_i = dl_i / dW

Equal lengths give ``1 / (B - 1)``; above 1 one example outweighs all others together.

It sees gradient *disaggregation* (Wen et al., Fishing).  It does not see an imprint (Fowl et al.,
Robbing the Fed), to whose layer every image contributes, nor much of SEER, which was made to pass.

Departures from the authors' code: every dense and convolutional weight is measured (its name filter
skips the first convolution and the shortcuts); no 1e-6 in the denominator, behind which a server
hides by scaling all gradients down.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from clients.defenses.detection.judged import judged, largest, over_the_rest, refuse_single
from clients.defenses.detection.layers import gradient_norms
from clients.defenses.toy import IMPRINTED
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register


@register("defense", "d-snr")
@dataclass(frozen=True, kw_only=True)
class DSNR(Defense):
    """Measure D-SNR of the received model on the client's own batch.

    Undecidable for one example, and where no example has a gradient.  Costs a gradient for each
    example.

    Parameters
    ----------
    refuse_above : float or None
        Refuse a model whose D-SNR is above this; the paper's is 1.  None only reports.
    """

    paper: ClassVar[Paper] = Paper(
        title="Hiding in Plain Sight: Disguising Data Stealing Attacks in Federated Learning",
        authors="Garov, Dimitrov, Jovanović, Vechev",
        venue="ICLR",
        year=2024,
        published="Fishing at 0.72, 15 and 52 in the paper's Fig. 1; 79, 33, 20, 8.7, 0.77 for its "
        "feature multiplier 16 to 12 (authors' repository); their own SEER at 0.65",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "d-snr"},
        # Blind to an imprint: eight examples of which none is silenced.
        figure="detection.0.checks.d-snr",
        low=1 / 7,
        high=0.7,
    )
    changes_upload: ClassVar[bool] = False

    refuse_above: Annotated[float, Field(gt=0)] | None = None

    @property
    def refuses_on_examples(self) -> bool:
        """Whether a limit is set."""
        return self.refuse_above is not None

    def inspect(
        self,
        model: nn.Module,
        received: Tensors,  # noqa: ARG002
        probe: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return the score ``d-snr``."""
        return judged({self.name: d_snr(model, probe)}, {self.name: self.refuse_above})

    def check_setting(self, setting: Setting) -> None:
        """Refuse a limit where every client's batch is of one example."""
        if self.refuse_above is not None:
            refuse_single(self.name, setting)


def d_snr(model: nn.Module, batch: Batch) -> float:
    """Return the largest ratio of any weight; NaN where there is none."""
    return largest(layer_ratios(model, batch).values())


def layer_ratios(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return ``max_i |g_i| / sum_{j != i} |g_j|`` for each weight that any example moves."""
    if len(batch[1]) < 2:
        return {}
    norms = gradient_norms(model, batch)
    return {
        name: over_the_rest(float(n.max()), float(n.sum()))
        for name, n in norms.items()
        if float(n.sum()) > 0
    }
