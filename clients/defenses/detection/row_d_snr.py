"""Row-wise D-SNR: does one example own a row of a linear layer?

``x = dL/dW_r / dL/db_r`` is an image wherever a row's gradient is of one image (Boenisch et al.,
EuroS&P 2023; Phong et al. 2017), and so is the same ratio of the difference of two rows where their
gradients differ by one image (Fowl et al., ICLR 2022).  The D-SNR of Garov et al. (ICLR 2024) adds
up a layer and sees neither.  Here, for each linear layer but the head, with ``g_ir`` the gradient
of example i in row r:

``row-d-snr``              share of live rows in which one example outweighs all others together;
``row-d-snr/alone``        share of live rows that exactly one example moves;
``row-d-snr/differences``  share of live *differences* of neighboring rows in which one example
                           outweighs all others; neighbors by bias, whatever order they came in.

Each is the largest over layers.  A row (a difference) is live where it holds more than a thousandth
of the largest one's gradient.  The head is left out: in an honest one the row of a class is often
moved by its one image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.detection.judged import judged, largest, refuse_single
from clients.defenses.detection.layers import bias_of, classes_of, hidden, lengths, unread
from clients.defenses.toy import IMPRINTED
from clients.per_example import per_example_gradients
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

Share = Annotated[float, Field(ge=0, lt=1)]
LIVE = 1e-3


@register("defense", "row-d-snr")
@dataclass(frozen=True, kw_only=True)
class RowDSNR(Defense):
    """Measure, row by row, whether single examples stand alone in a linear layer.

    Undecidable for one example, and for a model without a linear layer before its head.  Costs a
    gradient for each example.

    Parameters
    ----------
    rows, alone, differences : float or None
        Refuse a model whose share is above this; None only reports.
    """

    paper: ClassVar[Paper] = Paper(
        title="Hiding in Plain Sight: Disguising Data Stealing Attacks in Federated Learning",
        authors="Garov, Dimitrov, Jovanović, Vechev",
        venue="ICLR",
        year=2024,
        published="none by rows: the paper has the ratio of layers",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**IMPRINTED, "defenses": "row-d-snr"},
        # (1 - 1/16)^7 = 64 % of eight images alone in a bin of sixteen, more of the live bins.
        figure="detection.0.checks.row-d-snr/differences",
        low=0.5,
        high=1.0,
    )
    changes_upload: ClassVar[bool] = False

    rows: Share | None = None
    alone: Share | None = None
    differences: Share | None = None

    @property
    def refuses_on_examples(self) -> bool:
        """Whether a limit is set."""
        return (self.rows, self.alone, self.differences) != (None, None, None)

    def inspect(
        self,
        model: nn.Module,
        received: Tensors,
        probe: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return the scores ``row-d-snr``, ``row-d-snr/alone`` and ``row-d-snr/differences``."""
        limits = {
            self.name: self.rows,
            f"{self.name}/alone": self.alone,
            f"{self.name}/differences": self.differences,
        }
        scores = row_scores(model, received, probe)
        return judged(dict(zip(limits, scores, strict=True)), limits, unread(received))

    def check_setting(self, setting: Setting) -> None:
        """Refuse a limit where every client's batch is of one example."""
        if any(limit is not None for limit in (self.rows, self.alone, self.differences)):
            refuse_single(self.name, setting)


def row_scores(model: nn.Module, received: Tensors, batch: Batch) -> tuple[float, float, float]:
    """Return the three shares, each the largest over layers; NaN where there is none."""
    found: list[tuple[float, float, float]] = []
    if len(batch[1]) > 1:
        for norms, differences in row_lengths(model, received, batch):
            found.append((owned(norms), moved_by_one(norms), owned(differences)))
    rows, alone, differenced = zip(*found, strict=True) if found else ((), (), ())
    return largest(rows), largest(alone), largest(differenced)


def row_lengths(
    model: nn.Module, received: Tensors, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``|g_ir|`` (``[B, R]``) and ``|g_ir - g_i,r+1|`` (``[B, R - 1]``) of each layer.

    Neighbors in order of the bias received; in the layer's own order where it has none.
    """
    layers = hidden(received, classes_of(model, batch))
    order = {
        name: bias.argsort() if (bias := bias_of(received, name)) is not None else None
        for name in layers
    }
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    for chunk in per_example_gradients(model, batch):
        for name in layers.keys() & chunk.keys():
            gradients = chunk[name]
            if (sorting := order[name]) is not None:
                gradients = gradients[:, sorting]
            steps = gradients[:, 1:] - gradients[:, :-1]
            found[name].append((lengths(gradients), lengths(steps)))
    for parts in found.values():
        if parts:
            norms, differences = (torch.cat(several) for several in zip(*parts, strict=True))
            yield norms, differences


def live(norms: Tensor) -> Tensor:
    """Return the columns of ``[B, R]`` that hold more than ``LIVE`` of the largest, ``[B, L]``."""
    held = norms.sum(dim=0)
    return norms[:, held > LIVE * held.max()] if held.numel() else norms


def owned(norms: Tensor) -> float:
    """Return the share of live rows in which one example outweighs all others; NaN if none."""
    alive = live(norms)
    first, total = alive.amax(dim=0), alive.sum(dim=0)
    return float((first > total - first).double().mean())


def moved_by_one(norms: Tensor) -> float:
    """Return the share of live rows that exactly one example moves by more than rounding."""
    alive = live(norms)
    moved = alive > LIVE * alive.amax(dim=0)
    return float((moved.sum(dim=0) == 1).double().mean())
