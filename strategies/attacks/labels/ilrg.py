"""iLRG: read each class's features off the last layer, and solve for how often it occurs.

Ma et al., "Instance-wise Batch Label Restoration via Gradients in Federated Learning", ICLR 2023,
Sec. 3.  With ``g_c`` the row of class c in the last layer's weight gradient, ``g_c / b_c`` is a
weighted mean of the batch's features; the paper takes it for the features of class c, and what the
last layer makes of it for the prediction of its examples, row c of P ``[K, K]``.  The counts k then
solve, by least squares (the paper's pseudo-inverse),

    sum_j k_j = B,    sum_j k_j P_jc - k_c = B b_c   for each class c.

The equations are exact for the true mean prediction of each class.  Rounding is by largest
remainder here; the authors' code rounds to nearest and mends the total.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.analytic import largest_remainder, mean_prediction, per_step
from strategies.attacks.labels.rule import LabelRule, biased_classifier, classifier, listed, moved


@register("labels", "ilrg")
@dataclass(frozen=True, kw_only=True)
class ILRG(LabelRule):
    """Threat model B; runs the model on nothing, only its last layer on features that it read.

    After local training the size of a step is known at C, and inferred below as ``analytic`` does.
    """

    needs = frozenset({Capability.UPDATES, Capability.BASICS})

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer with a bias."""
        biased_classifier(model)

    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If weight or bias gradient is not in the update or not finite.
        """
        weight, bias = moved(view, model, "weight"), moved(view, model, "bias")
        predictions = class_predictions(weight, bias, classifier(model)[1])
        if view.kind == "weights":
            absent = mean_prediction(model, view, knowledge)
            bias = bias * per_step(view, bias, absent, batch_size, knowledge)
        counts = solve_counts(predictions, bias, batch_size)
        return listed(largest_remainder(counts, batch_size))


def class_predictions(weight: Tensor, bias: Tensor, layer: nn.Linear) -> Tensor:
    """Return P ``[K, K]``: what the layer predicts for the features of each class.

    A class whose bias gradient is exactly 0 has no ratio; its features are taken to be 0.
    """
    features = (weight / bias.unsqueeze(1)).nan_to_num(0, posinf=0, neginf=0)  # [K, d]
    own = (parameter.detach().double().cpu() for parameter in (layer.weight, layer.bias))
    return torch.nn.functional.linear(features, *own).softmax(dim=1)


def solve_counts(predictions: Tensor, bias: Tensor, batch_size: int) -> Tensor:
    """Return ``[K]`` counts, not yet whole, by least squares of least norm."""
    classes = len(bias)
    total = torch.ones(1, classes, dtype=bias.dtype)
    equations = torch.cat([total, predictions.T - torch.eye(classes, dtype=bias.dtype)])
    right = batch_size * torch.cat([torch.ones(1, dtype=bias.dtype), bias])
    solved: Tensor = torch.linalg.pinv(equations) @ right
    return solved
