"""The statistics of a batch of other data of the same kind and size.

Huang et al., "Evaluating Gradient Inversion Attacks and Defenses in Federated Learning", NeurIPS
2021, Sec. 3: whoever does not have the private batch's statistics takes those of data like it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fedsim.models.statistics import LayerStatistics, layer_statistics
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.statistics.source import StatisticsSource


@register("statistics", "proxy")
@dataclass(frozen=True, kw_only=True)
class Proxy(StatisticsSource):
    """Threat model D: as many surrogate images as the update is of, under the model sent."""

    needs = frozenset({Capability.UPDATES, Capability.BASICS, Capability.SURROGATE})

    def statistics(
        self, view: ServerView, model: nn.Module, knowledge: Knowledge
    ) -> LayerStatistics:
        """Return those of surrogate images drawn for this view; all of them where they are few."""
        split = knowledge.surrogate
        order = torch.randperm(
            len(split), generator=knowledge.generator(view.label, "statistics", "proxy")
        )
        chosen = order[: knowledge.num_examples(view)]
        images, _ = split.batch(chosen, next(model.parameters()).dtype)
        return layer_statistics(model, images)
