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

import copy
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule, classifier

PROBES = 256


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
        name, layer = classifier(model)
        if layer.bias is None:
            raise ValueError(
                f"the last layer {name!r} has no bias to read label counts from; use "
                "labels='idlg' for one example, labels='oracle', or a model with that bias"
            )

    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64, sorted.

        Raises
        ------
        ValueError
            If the bias gradient is not in the update or not finite.
        """
        name, _ = classifier(model)
        moved = view.update().get(f"{name}.bias")
        if moved is None or not moved.isfinite().all():
            raise ValueError(f"{view.label} has no finite gradient of {name}.bias to read")
        mean_p = mean_prediction(model, view, knowledge)
        gradient = moved.double().cpu() * _per_step(view, moved, mean_p, batch_size, knowledge)
        counts = largest_remainder(batch_size * (mean_p - gradient), batch_size)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


def mean_prediction(model: nn.Module, view: ServerView, knowledge: Knowledge) -> Tensor:
    """Return the mean predicted probability ``[K]``, float64, on what the adversary has."""
    parameter = next(model.parameters())
    generator = knowledge.generator(view.label, "mean prediction")
    if Capability.SURROGATE in knowledge.granted:
        surrogate = knowledge.surrogate
        chosen = torch.randperm(len(surrogate), generator=generator)[:PROBES]
        images, _ = surrogate.batch(chosen, parameter.dtype)
    else:
        spec = knowledge.basics.data
        noise = torch.randn(PROBES, *spec.shape, generator=generator)
        std, mean = (torch.tensor(v).view(-1, 1, 1) for v in (spec.std, spec.mean))
        images = (noise * std + mean).to(parameter.dtype)
    with torch.no_grad():
        # A copy: in train mode a forward pass moves BatchNorm's running statistics.
        logits: Tensor = copy.deepcopy(model)(images.to(parameter.device))
    return logits.double().softmax(dim=1).mean(dim=0).cpu()


def _per_step(
    view: ServerView, moved: Tensor, mean_p: Tensor, batch_size: int, knowledge: Knowledge
) -> float:
    """Return the factor that turns what moved into a mean gradient."""
    if view.kind == "gradient":
        return 1.0
    if Capability.DETAILS in knowledge.granted:
        training = knowledge.training
        steps = training.epochs * ceil(batch_size / training.batch_size)
        return 1.0 / (training.lr * steps)
    rising = moved.cpu() > 0
    if not rising.any():
        return 1.0
    return float((mean_p[rising] / moved.double().cpu()[rising]).min())


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
