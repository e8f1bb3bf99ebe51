"""What an attack does about labels where a rule of this package reads them for it."""

from typing import ClassVar

from torch import nn

from fedsim import registry
from fedsim.attack import Attack, Setting
from strategies.attacks.labels.rule import LabelRule


class TakesLabels(Attack):
    """An attack whose parameter ``labels`` is a label rule expression.

    What the rule refuses the attack refuses, and what it asks for the attack asks for.  One with
    more to check calls these, and checks what is its own.
    """

    labels: str
    #: What ``labels`` says where no rule reads them: they are searched with the images.
    searched: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Refuse a label rule that does not exist (``ScenarioError``)."""
        _ = self.rule

    @property
    def rule(self) -> LabelRule | None:
        """The label rule; None where labels are searched."""
        if self.labels == self.searched:
            return None
        rule: LabelRule = registry.build("labels", self.labels, "attack: labels")
        return rule

    @property
    def oracles(self) -> frozenset[str]:
        """What the label rule asks for."""
        return self.rule.oracles if self.rule else frozenset()

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model that the label rule cannot read."""
        if self.rule:
            self.rule.check(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches of more examples than the label rule can name."""
        if self.rule:
            self.rule.check_setting(setting)
