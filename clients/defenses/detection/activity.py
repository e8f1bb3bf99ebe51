"""Activity: how much of the received model do the client's own images move?

``activity/dead``    share of a layer's rows (filters) that no image of the batch moves, the largest
                     over layers.  1 for a model made to give no gradient, so that the sum behind
                     secure aggregation is another client's update (Pasquini, Francati, Ateniese,
                     CCS 2022).
``activity/silent``  share of the pairs (row, image) of a hidden linear layer without gradient, the
                     largest over layers.  Trap weights fire for one image in a hundred (Boenisch et
                     al., EuroS&P 2023), ReLU at random for every other.

Images that move nothing at all (a loss of zero) are left out, or a well-trained model would look
dead.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.detection.judged import judged, largest
from clients.defenses.detection.layers import classes_of, hidden
from clients.per_example import per_example_gradients
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

Share = Annotated[float, Field(ge=0, lt=1)]


@register("defense", "activity")
@dataclass(frozen=True, kw_only=True)
class Activity(Defense):
    """Measure which rows of the received model the client's own batch moves.

    Undecidable where no image has a gradient.  Costs a gradient for each example.

    Parameters
    ----------
    dead, silent : float or None
        Refuse a model whose share is above this; None only reports.
    """

    paper: ClassVar[Paper] = Paper(
        title="Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
        authors="Pasquini, Francati, Ateniese",
        venue="CCS",
        year=2022,
        published="none: the paper has the suppression, the check is ours",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={"attack": "none", "model.name": "mlp(hidden=[64])", "defenses": "activity"},
        # Half of an untrained ReLU layer is silent for an image.
        figure="detection.0.checks.activity/silent",
        low=0.2,
        high=0.8,
    )
    changes_upload: ClassVar[bool] = False

    dead: Share | None = None
    silent: Share | None = None

    @property
    def refuses_on_examples(self) -> bool:
        """Whether a limit is set."""
        return self.dead is not None or self.silent is not None

    def inspect(
        self,
        model: nn.Module,
        received: Tensors,
        probe: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return the scores ``activity/dead`` and ``activity/silent``."""
        limits = {f"{self.name}/dead": self.dead, f"{self.name}/silent": self.silent}
        moved, learning = moved_rows(model, probe)
        scores = dict.fromkeys(limits, float("nan"))
        if bool(learning.any()):
            inner = hidden(received, classes_of(model, probe))
            still = [1 - _share(own.any(dim=0)) for own in moved.values()]
            silent = [1 - _share(moved[name][learning]) for name in inner if name in moved]
            scores = dict(zip(limits, (largest(still), largest(silent)), strict=True))
        return judged(scores, limits)


def moved_rows(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Return, for each weight, which example moves which row, and which examples move anything.

    Returns
    -------
    moved : dict of str to Tensor
        ``[B, R]`` bool.
    learning : Tensor
        ``[B]`` bool; biases count.
    """
    moved: dict[str, list[Tensor]] = {}
    learning = []
    for chunk in per_example_gradients(model, batch):
        any_moved = torch.stack([g.flatten(1).any(dim=1) for g in chunk.values()])
        learning.append(any_moved.any(dim=0))
        for name, gradients in chunk.items():
            if gradients.ndim >= 3:  # one dimension more than the weight
                moved.setdefault(name, []).append(gradients.flatten(2).any(dim=2))
    return {name: torch.cat(parts) for name, parts in moved.items()}, torch.cat(learning)


def _share(true: Tensor) -> float:
    return float(true.double().mean())
