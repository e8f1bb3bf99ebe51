"""E2EGI's rule: negative rows once each, then what is left by the share of one example.

Li et al., "E2EGI: End-to-End Gradient Inversion in Federated Learning", IEEE JBHI 2023, and the
authors' code.  The sum of row c of the last layer's weight gradient is ``r_c = sum_i (p_ic - [y_i =
c]) |h_i| / B`` with features ``h >= 0``.  Untrained, p is about 1 / K, so that a class which does
not occur has about ``mean |h| / K``, the largest sums there are, and ``m = K max(r) / B`` is what
one example takes off its row.  Every negative row is named once and gets m back; then the lowest
row is named and gets m back, until B labels are named.  Labels may repeat.

Where every class occurs, no row says what an absent class has, and m is too small; a trained
network is not near uniform, and m is wrong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule, classifier, listed, moved


@register("labels", "e2egi")
@dataclass(frozen=True, kw_only=True)
class E2EGI(LabelRule):
    """Threat model A beside the batch size; for untrained networks with nonnegative features.

    Unchanged by any rescaling of the update.
    """

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def labels(
        self,
        view: ServerView,
        model: nn.Module,
        batch_size: int,
        knowledge: Knowledge,  # noqa: ARG002
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If the weight gradient is not in the update or not finite.
        """
        rows = moved(view, model, "weight").sum(dim=1)
        share = len(rows) * rows.max().clamp_min(0) / batch_size
        counts = torch.zeros(len(rows), dtype=torch.int64)
        named = rows.argsort()[:batch_size]
        named = named[rows[named] < 0]
        counts[named] += 1
        rows[named] += share
        for _ in range(batch_size - len(named)):
            lowest = rows.argmin()
            counts[lowest] += 1
            rows[lowest] += share
        return listed(counts)
