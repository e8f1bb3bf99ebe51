"""Bias-negative: LLG's loop on the bias gradient, which no activation disturbs.

The rule that Geiping's ``breaching`` calls "bias-corrected"; LLG's idea (Wainakh et al., PoPETs
2022) without its weights.  ``b_c = mean_p_c - n_c / B``: every class with ``b_c < 0`` is named
once, then the lowest again and again, each time without one impact more.  The impact is taken to be
``m = 1/B * sum of the negative b_c``.  The true one is ``-1/B``: m is close to it where few of the
classes occur, and too small where all do, because mean_p then cancels what is negative.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.llg import negative_share, peel
from strategies.attacks.labels.rule import LabelRule, biased_classifier, moved


@register("labels", "bias-negative")
@dataclass(frozen=True, kw_only=True)
class BiasNegative(LabelRule):
    """Threat model A beside the batch size; unchanged by any rescaling of the update.

    Exact for one example, and for a batch of one class, whatever the model predicts.
    """

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer with a bias."""
        biased_classifier(model)

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
            If the bias gradient is not in the update, not finite, or nowhere negative.
        """
        bias = moved(view, model, "bias")
        impact = negative_share(view, bias, batch_size)
        return peel(bias, (bias < 0).nonzero().flatten(), impact, batch_size)
