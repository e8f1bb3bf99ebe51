"""LLG: each example takes one impact off its class's gradient; take them back one by one.

Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning", PoPETs 2022(2),
Sec. 4 (arXiv 2105.09369).  The row sums of the last layer's weight gradient are
``r_c = mean_i (p_ic - [y_i = c]) S_i`` with S_i the sum of example i's features, which are not
negative behind a ReLU or a sigmoid: a class with ``r_c < 0`` occurs (property 1), and each example
adds the impact ``m`` to its class (property 2).  So every negative class is named once, then the
lowest again and again, each time without one more impact, until B are named.

LLG estimates ``m = (1 + 1/K) / B * sum of the negative r_c``: right where few of the K classes
occur, too small where all do, because the part ``mean_i p_ic S_i`` cancels most of what is
negative.  LLG* and LLG+ estimate impact and that part, the offset, by running the model on noise or
on surrogate images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.analytic import per_step
from strategies.attacks.labels.probing import Probe, probe
from strategies.attacks.labels.rule import LabelRule, classifier, moved


@register("labels", "llg")
@dataclass(frozen=True, kw_only=True)
class LLG(LabelRule):
    """Threat model A beside the batch size, or B (noise) and D (surrogate images).

    Parameters
    ----------
    impact : {"gradient", "model"}
        Where the impact comes from: the update alone (LLG, unchanged by any rescaling of it), or
        the model run on surrogate images where they are granted (LLG+) and on noise otherwise
        (LLG*; the paper also tries zeros and ones).
    """

    impact: Literal["gradient", "model"] = "gradient"

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If the weight gradient is not in the update, not finite, or nowhere negative.
        """
        sums = moved(view, model, "weight").sum(dim=1)
        if self.impact == "gradient":
            impact = (1 + 1 / len(sums)) * negative_share(view, sums, batch_size)
            return peel(sums, (sums < 0).nonzero().flatten(), impact, batch_size)
        impact, offset = impact_and_offset(probe(model, view, knowledge))
        sums = sums * per_step(view, sums, offset, batch_size, knowledge)
        occurs = (sums < 0).nonzero().flatten()
        return peel(sums - offset, occurs, impact / batch_size, batch_size)


def negative_share(view: ServerView, values: Tensor, batch_size: int) -> float:
    """Return what is negative in ``[K]``, by example: below 0.

    Raises
    ------
    ValueError
        If nothing is.
    """
    negative = float(values.clamp_max(0).sum())
    if negative == 0:
        raise ValueError(f"the last layer's gradient in {view.label} is nowhere negative")
    return negative / batch_size


def impact_and_offset(seen: Probe) -> tuple[float, Tensor]:
    """Return what one example adds to the row sum of its class (below 0), and the rest ``[K]``.

    The impact of an example alone is ``(p_y - 1) S``, times ``1 + 1/K`` as in the paper; images
    without labels stand for an example of each class.  The offset is the mean of ``p_c S`` over
    images of other classes.
    """
    weighted = seen.probabilities * seen.features.sum(dim=1, keepdim=True)  # [N, K]
    sums = seen.features.sum(dim=1)
    classes = weighted.shape[1]
    if seen.labels is None:
        return float((weighted.mean(dim=1) - sums).mean()) * (1 + 1 / classes), weighted.mean(dim=0)
    own = torch.nn.functional.one_hot(seen.labels, classes).bool()
    offset = weighted.masked_fill(own, 0).sum(dim=0) / (~own).sum(dim=0).clamp_min(1)
    return float((weighted[own] - sums).mean()) * (1 + 1 / classes), offset


def peel(values: Tensor, occurs: Tensor, impact: float, batch_size: int) -> Tensor:
    """Name each class that occurs once, the lowest first, then the lowest of all again and again.

    Parameters
    ----------
    values : Tensor
        ``[K]``: infinite for a class that must not be named.
    occurs : Tensor
        Indices of the classes that are named once for certain.
    impact : float
        Below 0: what one example adds to the value of its class.

    Returns
    -------
    Tensor
        ``[batch_size]`` int64, sorted.
    """
    left = values.clone()
    named: list[int] = occurs[values[occurs].argsort()][:batch_size].tolist()
    left[named] -= impact
    while len(named) < batch_size:
        lowest = int(left.argmin())
        left[lowest] -= impact
        named.append(lowest)
    return torch.tensor(named).sort().values
