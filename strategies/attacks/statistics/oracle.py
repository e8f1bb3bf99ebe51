"""The private batch's own statistics: what papers assume where clients do not send them."""

from dataclasses import dataclass

from torch import nn

from fedsim.models.statistics import LayerStatistics
from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.statistics.source import StatisticsSource


@register("statistics", "oracle")
@dataclass(frozen=True, kw_only=True)
class Oracle(StatisticsSource):
    """Asks for the oracle grant ``batchnorm``; the report wears its badge."""

    @property
    def oracles(self) -> frozenset[str]:
        """The grant ``batchnorm``."""
        return frozenset({"batchnorm"})

    def statistics(
        self, view: ServerView, model: nn.Module, knowledge: Knowledge
    ) -> LayerStatistics:
        """Return the truth: of the images as they were before any defense, in the model sent.

        Raises
        ------
        fedsim.errors.NotGranted
            If the scenario does not grant the oracle.
        """
        like = next(model.parameters())
        truth = knowledge.oracle("batchnorm", view)
        return {name: (mean.to(like), var.to(like)) for name, (mean, var) in truth.items()}
