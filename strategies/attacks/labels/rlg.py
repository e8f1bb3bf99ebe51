"""RLG: a class occurs if a hyperplane parts it from all others in the gradient's singular space.

Dang et al., "Revealing and Protecting Labels in Distributed Training", NeurIPS 2021, Sec. 3.  The
last layer's weight gradient ``[K, d]`` is ``(P - Y)^T H / B`` with predictions P and one-hot labels
Y, ``[B, K]``, and features H ``[B, d]``.  For B below K and d, and independent features, its left
singular vectors span the rows of ``P - Y``.  An example's row ``p - onehot(y)`` is negative at y
and nowhere else.  So the classes that occur are sought by one linear program each: is there a
vector of that span, negative at c and not negative elsewhere?  No feature need be positive, and no
bias is read.

It tells which classes occur, not how often.  Where fewer than B do, the others are dealt among them
by LLG's loop over the row sums; that part is ours.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from fedsim.attack import Setting
from fedsim.registry import register
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.llg import negative_share, peel
from strategies.attacks.labels.rule import LabelRule, classifier, most_examples, moved

# A vector of length about 1 that is meant to be negative somewhere is so by more than this.
CLEAR = 1e-2
# Singular values below this share of the largest are rounding: float32 has seven digits.
ROUNDING = 1e-6


@register("labels", "rlg")
@dataclass(frozen=True, kw_only=True)
class RLG(LabelRule):
    """Threat model A beside the batch size; fewer examples than classes and features.

    Unchanged by any rescaling of the update.  One linear program a class.
    """

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not end in a fully connected layer."""
        classifier(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse views of as many examples as there are classes or features."""
        most, layer = most_examples(setting), classifier(setting.model)[1]
        if most >= min(layer.out_features, layer.in_features):
            raise ValueError(
                f"a view is of up to {most} examples and the rlg rule needs fewer than classes and "
                f"features ({layer.out_features}, {layer.in_features}); use labels='analytic'"
            )

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
            For as many examples as classes or features, or if the weight gradient is not in the
            update, not finite, or has no negative row.
        """
        weight = moved(view, model, "weight")
        if batch_size >= min(weight.shape):
            raise ValueError(
                f"{view.label} is of {batch_size} examples and the rlg rule needs fewer than "
                f"classes and features ({weight.shape[0]}, {weight.shape[1]}); use "
                "labels='analytic'"
            )
        sums = weight.sum(dim=1)
        impact = negative_share(view, sums, batch_size)
        margins = separation(singular_space(weight, batch_size))
        occurs = (margins > CLEAR).nonzero().flatten()
        if not len(occurs):  # noise has filled the span: any class may be there
            return peel(sums, occurs, impact, batch_size)
        surest = occurs[margins[occurs].argsort(descending=True)][:batch_size]
        among = torch.full_like(sums, torch.inf)
        among[surest] = sums[surest]
        return peel(among, surest, impact, batch_size)


def singular_space(weight: Tensor, batch_size: int) -> Tensor:
    """Return ``[K, r]``, orthonormal: left singular vectors, at most one for each example."""
    left: Tensor
    left, values, _ = torch.linalg.svd(weight, full_matrices=False)
    rank = int((values > ROUNDING * values[0]).sum())
    return left[:, : min(rank, batch_size)]


def separation(space: Tensor) -> Tensor:
    """Return for each class how far below 0 it can be while no other class is, ``[K]``, at least 0.

    Class c's program: minimize ``space[c] x`` such that ``space[j] x >= 0`` for all others, and
    ``-1 <= x <= 1``.
    """
    rows = space.numpy()
    found = torch.zeros(len(rows), dtype=torch.float64)
    for index, row in enumerate(rows):
        others = rows[[j for j in range(len(rows)) if j != index]]
        solved = linprog(row, A_ub=-others, b_ub=[0.0] * len(others), bounds=(-1, 1))
        found[index] = max(0.0, -solved.fun) if solved.success else 0.0
    return found
