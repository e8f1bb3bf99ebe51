"""The running statistics that the server itself sent: what the model has seen so far, on average.

Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021, Sec. 3:
the prior of the paper.  They stand for the data, not for this batch.
"""

from dataclasses import dataclass

from torch import nn

from fedsim.attack import Setting
from fedsim.models.statistics import LayerStatistics, batchnorm_layers
from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.statistics.source import StatisticsSource, tracked


@register("statistics", "running")
@dataclass(frozen=True, kw_only=True)
class Running(StatisticsSource):
    """Threat model A.  A network that nobody has trained has 0 and 1, which say nothing."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model without BatchNorm, or whose BatchNorm keeps no running statistics."""
        super().check(model)
        tracked(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse statistics that stay as they were made: 0 and 1 in every layer."""
        buffers = dict(setting.model.named_buffers())
        layers = batchnorm_layers(setting.model)
        blank = all(
            not buffers[f"{name}.running_mean"].any()
            and (buffers[f"{name}.running_var"] == 1).all()
            for name in layers
        )
        if blank and setting.batchnorm != "shared":
            raise ValueError(
                "the running statistics of this model are 0 and 1, and with model.batchnorm = "
                f"{setting.batchnorm!r} no round changes them; use statistics='proxy', or "
                "model.batchnorm = 'shared' and more rounds than one"
            )

    def statistics(
        self,
        view: ServerView,
        model: nn.Module,
        knowledge: Knowledge,  # noqa: ARG002
    ) -> LayerStatistics:
        """Return what was sent as running mean and variance."""
        like = next(model.parameters())
        return {
            name: (
                view.sent[f"{name}.running_mean"].to(like),
                view.sent[f"{name}.running_var"].to(like),
            )
            for name in batchnorm_layers(model)
        }
