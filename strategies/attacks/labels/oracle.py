"""The true labels: what many papers assume and no threat model grants."""

from dataclasses import dataclass

from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule


@register("labels", "oracle")
@dataclass(frozen=True, kw_only=True)
class Oracle(LabelRule):
    """Asks for the oracle grant ``labels``; the report wears its badge."""

    @property
    def oracles(self) -> frozenset[str]:
        """The grant ``labels``."""
        return frozenset({"labels"})

    def labels(
        self,
        view: ServerView,
        model: nn.Module,  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
        knowledge: Knowledge,
    ) -> Tensor:
        """Return ``[batch_size]`` int64, the truth.

        Raises
        ------
        fedsim.errors.NotGranted
            If the scenario does not grant the oracle.
        """
        return knowledge.oracle("labels", view).long().cpu()
