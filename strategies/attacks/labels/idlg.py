"""iDLG's rule: one example's label is the only class whose logit gradient is negative.

Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020 (arXiv 2001.02610),
Sec. 3.  For one example the bias gradient is ``p - onehot(y)``: negative at y and nowhere else,
whatever the activations.  Without a bias the row sums of ``(p - onehot(y)) h^T`` say the same where
the features h are not negative (ReLU, sigmoid).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.attack import Setting
from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule, classifier, most_examples


@register("labels", "idlg")
@dataclass(frozen=True, kw_only=True)
class IDLG(LabelRule):
    """Threat model A; exact for one example.  Unchanged by any rescaling of the update."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse views of more than one example."""
        if (most := most_examples(setting)) > 1:
            raise ValueError(
                f"a view is of up to {most} examples and the idlg rule is for one; "
                "use labels='analytic'"
            )

    def labels(
        self,
        view: ServerView,
        model: nn.Module,
        batch_size: int,
        knowledge: Knowledge,  # noqa: ARG002
    ) -> Tensor:
        """Return ``[1]`` int64.

        Raises
        ------
        ValueError
            For more than one example: the sign rule holds for one.
        """
        if batch_size != 1:
            raise ValueError(
                f"{view.label} is of {batch_size} examples and the idlg rule is for one; "
                "use labels='analytic'"
            )
        return torch.tensor([negative_class(view, model)])


def negative_class(view: ServerView, model: nn.Module) -> int:
    """Return the class whose logit gradient is lowest.

    Raises
    ------
    ValueError
        If the update holds nothing of the last layer.
    """
    name, _ = classifier(model)
    update = view.update()
    if (bias := update.get(f"{name}.bias")) is not None:
        return int(bias.argmin())
    if (weight := update.get(f"{name}.weight")) is not None:
        return int(weight.sum(dim=1).argmin())
    raise ValueError(f"{view.label} holds no gradient of the last layer {name!r}")
