"""Transmit-SNR: is a convolution there to pass the image on rather than to look at it?

Garov, Dimitrov, Jovanović, Vechev (ICLR 2024), their check for attacks that carry the image through
convolutions to a linear layer (Boenisch et al. 2023; LOKI; MKOR).  For each filter

    max |w| / (sum |w| - max |w|)

which is infinite for an identity kernel, whatever the value at its center; above 1 one weight
outweighs all others.  A server that puts a linear layer first (Robbing the Fed) has nothing to show
here.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.detection.judged import LARGEST, judged, largest
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

Ratio = Annotated[float, Field(gt=0)]


@register("defense", "transmit-snr")
@dataclass(frozen=True, kw_only=True)
class TransmitSNR(Defense):
    """Measure how far single weights dominate the filters of the received convolutions.

    Undecidable without convolutions.  Reads weights only.

    Parameters
    ----------
    refuse_above : float or None
        Refuse a model whose first convolution is above this; the paper's is 1.
    anywhere : float or None
        The same for the largest of all convolutions: an attacker may begin later.
    """

    paper: ClassVar[Paper] = Paper(
        title="Hiding in Plain Sight: Disguising Data Stealing Attacks in Federated Learning",
        authors="Garov, Dimitrov, Jovanović, Vechev",
        venue="ICLR",
        year=2024,
        published="no figure that we could read",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={"attack": "none", "model.name": "convnet", "defenses": "transmit-snr"},
        # The initial weights are uniform: the largest of 27 near twice the mean, over 26 others.
        figure="detection.0.checks.transmit-snr",
        low=1 / 26,
        high=0.3,
    )
    changes_upload: ClassVar[bool] = False

    refuse_above: Ratio | None = None
    anywhere: Ratio | None = None

    def inspect(
        self,
        model: nn.Module,  # noqa: ARG002
        received: Tensors,
        probe: Batch,  # noqa: ARG002
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return the scores ``transmit-snr`` (first convolution) and ``transmit-snr/anywhere``."""
        found = [transmit_snr(w) for w in received.values() if w.ndim >= 3 and w[0].numel() > 1]
        scores = {
            self.name: found[0] if found else float("nan"),
            f"{self.name}/anywhere": largest(found),
        }
        limits = dict(zip(scores, (self.refuse_above, self.anywhere), strict=True))
        return judged(scores, limits)


def transmit_snr(weight: Tensor) -> float:
    """Return the largest ratio over the filters of ``[out, in, ...]``; zero filters have none."""
    size = weight.flatten(1).double().abs()
    first, total = size.amax(dim=1), size.sum(dim=1)
    rest = torch.maximum(total - first, first / LARGEST)
    return float((first / rest).nan_to_num(0, 0, 0).max())
