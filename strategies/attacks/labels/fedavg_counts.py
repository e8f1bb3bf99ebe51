"""Label counts under FedAvg: the model's predictions are followed along the local steps.

Geng et al., "Towards General Deep Leakage in Federated Learning", 2021 (arXiv 2110.09074), as
carried to many local steps by Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022
(its code, ``restore_labels``).  A step k moves the last layer's bias by
``lr (mean_p_c - n_c / m)`` over its mini-batch, and the row sums of its weights by that times O,
the sum of an example's features.  Neither prediction nor O is known at the steps between, so both
are measured at the weights sent and at the weights received, and put on a line: step k of T has
the share ``k / T`` of the way.  Averaged over the steps, with D_c what moved,

    n_c = N mean_k (p_c(k) - D_c / (lr T O(k)))      read="weight", the papers'
    n_c = N mean_k (p_c(k) - D_c / (lr T))           read="bias"

For one step the line is its first point, and with the true mean prediction the bias's counts are
exact.  The mini-batches are taken to be equally large: a smaller last one makes its examples count
for more.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.analytic import largest_remainder, local_steps, per_step
from strategies.attacks.labels.probing import Probe, probe
from strategies.attacks.labels.rule import (
    LabelRule,
    biased_classifier,
    classifier,
    listed,
    moved,
)


@register("labels", "fedavg-counts")
@dataclass(frozen=True, kw_only=True)
class FedAvgCounts(LabelRule):
    """Threat model C (number of steps and their size), better at D (surrogate images).

    Below C the middle of the line stands for all steps, and what a step moved is inferred as
    ``analytic`` does.  A gradient is one step.

    Parameters
    ----------
    read : {"bias", "weight"}
        Which part of the last layer; the weights need features that are not negative.
    """

    needs = frozenset({Capability.UPDATES, Capability.BASICS})

    read: Literal["bias", "weight"] = "bias"

    def check(self, model: nn.Module) -> None:
        """Refuse a model without the layer that is to be read."""
        if self.read == "bias":
            biased_classifier(model)
        else:
            classifier(model)

    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If that part of the last layer is not in the update or not finite.
        """
        along = way(view, batch_size, knowledge).unsqueeze(1)  # [T, 1]
        start = probe(model, view, knowledge)
        end = probe(received(model, view), view, knowledge) if along.any() else start
        p = (1 - along) * start.probabilities.mean(dim=0) + along * end.probabilities.mean(dim=0)
        size = (1 - along) * feature_sum(start) + along * feature_sum(end)  # [T, 1]
        if self.read == "bias":
            step, size = moved(view, model, "bias"), torch.ones_like(size)
        else:
            step = moved(view, model, "weight").sum(dim=1)
        absent = (p * size).mean(dim=0)
        gradient = step * per_step(view, step, absent, batch_size, knowledge)
        counts = batch_size * (p - gradient / size).mean(dim=0)
        return listed(largest_remainder(counts, batch_size))


def way(view: ServerView, batch_size: int, knowledge: Knowledge) -> Tensor:
    """Return how far along the line each local step began, ``[T]`` in ``[0, 1)``."""
    if view.kind == "gradient":
        return torch.zeros(1, dtype=torch.float64)
    if Capability.DETAILS not in knowledge.granted:
        return torch.full((1,), 0.5, dtype=torch.float64)
    steps = local_steps(batch_size, knowledge)
    return torch.arange(steps, dtype=torch.float64) / steps


def received(model: nn.Module, view: ServerView) -> nn.Module:
    """Return a copy of the model with the weights that came back."""
    after = copy.deepcopy(model)
    after.load_state_dict(view.received, strict=False)  # statistics may have stayed at home
    return after


def feature_sum(seen: Probe) -> float:
    """Return the mean of the summed features, O."""
    return float(seen.features.sum(dim=1).mean())
