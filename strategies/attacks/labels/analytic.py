"""Analytic label counts: solve the bias gradient for how often each class occurs.

``b_c = mean_p_c - n_c / B`` gives ``n_c = B (mean_p_c - b_c)``, rounded by largest remainder so
that the counts add up to B.  The mean prediction comes from a forward pass of the model that the
server itself sent: on surrogate images where they are granted, else on noise.  At initialization
either is close to the truth; a trained model predicts the private images better than noise, and
counts from noise get worse.  Compared with other rules in Geiping's ``breaching`` and, under
FedAvg, by Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022.

After local training the bias has moved by ``lr`` times a sum of such gradients.  The step is
known at threat model C; below it, it is inferred from the fact that a class which does not occur
has ``b_c = mean_p_c``, and no class can have more.
"""

from dataclasses import dataclass
from math import ceil

from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.probing import probe
from strategies.attacks.labels.rule import LabelRule, biased_classifier, listed, moved


@register("labels", "analytic")
@dataclass(frozen=True, kw_only=True)
class Analytic(LabelRule):
    """Threat model B (mean prediction from noise) or D (from surrogate images).

    Returns sorted labels.  With the true mean prediction the counts are exact for any batch size
    and any repetition of labels (one step, one-hot labels, mean cross-entropy).
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
            If the bias gradient is not in the update or not finite.
        """
        bias = moved(view, model, "bias")
        mean_p = mean_prediction(model, view, knowledge)
        gradient = bias * per_step(view, bias, mean_p, batch_size, knowledge)
        counts = largest_remainder(batch_size * (mean_p - gradient), batch_size)
        return listed(counts)


def mean_prediction(model: nn.Module, view: ServerView, knowledge: Knowledge) -> Tensor:
    """Return the mean predicted probability ``[K]``, float64, on what the adversary has."""
    return probe(model, view, knowledge).probabilities.mean(dim=0)


def per_step(
    view: ServerView, update: Tensor, absent: Tensor, batch_size: int, knowledge: Knowledge
) -> float:
    """Return the factor that turns an update ``[K]`` into a mean gradient.

    ``absent`` is, ``[K]``, what the gradient would be for classes that do not occur.
    """
    if view.kind == "gradient":
        return 1.0
    if Capability.DETAILS in knowledge.granted:
        return 1.0 / (knowledge.training.lr * local_steps(batch_size, knowledge))
    rising = update > 0
    if not rising.any():
        return 1.0
    return float((absent[rising] / update[rising]).min())


def local_steps(batch_size: int, knowledge: Knowledge) -> int:
    """Return how many steps a client takes over so many examples (needs ``DETAILS``)."""
    training = knowledge.training
    return training.epochs * ceil(batch_size / training.batch_size)


def largest_remainder(shares: Tensor, total: int) -> Tensor:
    """Round ``[K]`` to whole numbers, none negative, that add up to ``total``.

    What is left after rounding down goes to the largest fractions.
    """
    shares = shares.double().clamp_min(0)
    shares = shares * (total / shares.sum()) if shares.sum() > 0 else shares + total / len(shares)
    counts = shares.floor()
    left = total - int(counts.sum())
    counts[(shares - counts).topk(left).indices] += 1
    return counts.long()
