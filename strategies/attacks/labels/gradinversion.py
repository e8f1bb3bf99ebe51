"""GradInversion's rule: the classes whose row of the last layer's gradient dips lowest.

Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021, Sec. 3.1.
Row c of the weight gradient is ``sum_i (p_ic - [y_i = c]) h_i / B``.  Only an example of class c
pulls its row down, by nearly its whole feature vector, so the B rows with the lowest minimum over
the features are the labels.  Unlike a row's sum, a minimum does not cancel where features have both
signs (tanh).  Every class is named once: repeated labels are beyond the rule.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fedsim.attack import Setting
from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule, classifier, most_examples, moved


@register("labels", "gradinversion")
@dataclass(frozen=True, kw_only=True)
class GradInversion(LabelRule):
    """Threat model A beside the batch size; for labels that differ.

    Unchanged by any rescaling of the update.
    """

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse views of more examples than there are classes."""
        most, classes = most_examples(setting), classifier(setting.model)[1].out_features
        if most > classes:
            raise ValueError(
                f"a view is of up to {most} examples of {classes} classes, and the gradinversion "
                "rule names no class twice; use labels='analytic'"
            )

    def labels(
        self,
        view: ServerView,
        model: nn.Module,
        batch_size: int,
        knowledge: Knowledge,  # noqa: ARG002
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted, no label twice.

        Raises
        ------
        ValueError
            For more examples than classes, or if the weight gradient is not there or not finite.
        """
        lowest = moved(view, model, "weight").min(dim=1).values
        if batch_size > len(lowest):
            raise ValueError(
                f"{view.label} is of {batch_size} examples of {len(lowest)} classes, and the "
                "gradinversion rule names no class twice; use labels='analytic'"
            )
        return lowest.topk(batch_size, largest=False).indices.sort().values
