"""The private batch's own statistics, read off the running statistics that came back.

One training step moves them by ``new = (1 - m) old + m mu_B`` with the layer's momentum m (Ioffe
and Szegedy, "Batch Normalization", ICML 2015, as PyTorch keeps them), so ``mu_B = (new - (1 - m)
old) / m``.  The variance comes back unbiased, over all N H W values of a channel, and is made
biased here.  Exact for one local step.  Of an aggregate it gives the mean of the senders' own.
"""

from dataclasses import dataclass
from math import ceil

from torch import nn

from fedsim.attack import Setting
from fedsim.models.statistics import LayerStatistics, batchnorm_layers, positions
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.statistics.source import StatisticsSource, tracked


@register("statistics", "recovered")
@dataclass(frozen=True, kw_only=True)
class Recovered(StatisticsSource):
    """Threat model B, and no surrogate: clients that share BatchNorm's statistics tell theirs."""

    needs = frozenset({Capability.UPDATES, Capability.BASICS})

    def check(self, model: nn.Module) -> None:
        """Refuse a model without BatchNorm, or whose BatchNorm keeps no running statistics."""
        super().check(model)
        tracked(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse clients that keep their statistics, or that take several steps in a round."""
        _shared(setting.batchnorm)
        training = setting.training
        steps = training.epochs * ceil(max(setting.examples) / training.batch_size)
        if training.kind != "gradient" and steps > 1:
            raise ValueError(
                f"a client takes {steps} local steps, and what comes back mixes their statistics; "
                "let it take one, or use statistics='proxy'"
            )

    def statistics(
        self, view: ServerView, model: nn.Module, knowledge: Knowledge
    ) -> LayerStatistics:
        """Return the batch's mean and biased variance.

        Raises
        ------
        ValueError
            If clients do not share their statistics, or they did not come back.
        """
        _shared(knowledge.batchnorm)
        examples, places = knowledge.num_examples(view), positions(model)
        like = next(model.parameters())
        found: LayerStatistics = {}
        for name, layer in batchnorm_layers(model).items():
            share = 1.0 if layer.momentum is None else layer.momentum  # None: the batch's alone
            moments = []
            for kind in ("running_mean", "running_var"):
                if (after := view.received.get(f"{name}.{kind}")) is None:
                    raise ValueError(f"{view.label} brought no {name}.{kind} back")
                before = view.sent[f"{name}.{kind}"].double()
                moments.append((after.double() - (1 - share) * before) / share)
            count = examples * places[name]
            mean, variance = moments[0], moments[1] * (count - 1) / count
            found[name] = mean.to(like), variance.clamp_min(0).to(like)
        return found


def _shared(batchnorm: str) -> None:
    if batchnorm != "shared":
        raise ValueError(
            f"with model.batchnorm = {batchnorm!r} no running statistics come back; use "
            "statistics='proxy', or model.batchnorm = 'shared'"
        )
