"""What an attack does about BatchNorm statistics where a source of this package says them."""

from torch import nn

from fedsim import registry
from fedsim.attack import Setting
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.statistics.source import StatisticsSource


class TakesStatistics(TakesLabels):
    """An attack with a parameter ``statistics``, the expression of a source, beside ``labels``.

    Its parameter ``batchnorm`` is their weight; where that is 0 the source is not asked.
    """

    statistics: str
    batchnorm: float

    def __post_init__(self) -> None:
        """Refuse a label rule or statistics that do not exist (``ScenarioError``)."""
        super().__post_init__()
        _ = self.source

    @property
    def source(self) -> StatisticsSource:
        """Where the statistics are from."""
        source: StatisticsSource = registry.build(
            "statistics", self.statistics, "attack: statistics"
        )
        return source

    @property
    def oracles(self) -> frozenset[str]:
        """What the label rule and the statistics ask for."""
        return super().oracles | (self.source.oracles if self.batchnorm else frozenset())

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model that the label rule cannot read, or without statistics to match."""
        super().check(model, kind)
        if self.batchnorm:
            self.source.check(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches too large for the label rule, and statistics that say nothing."""
        super().check_setting(setting)
        if self.batchnorm:
            self.source.check_setting(setting)
