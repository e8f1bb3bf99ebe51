"""What weights after several local steps would have moved by: local training, unrolled.

``w_0 - w_K`` of stochastic gradient descent on candidate batches, differentiable with respect to
them (Geiping et al. 2020, Sec. 6; Dimitrov et al. 2022, Sec. 4.1).  Memory grows with the steps:
each keeps its graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedsim.attack import Setting
from fedsim.penalized import penalized_loss
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.gradients import Operator, freeze
from strategies.attacks.optimization.parametrizations import Candidate


class LocalUpdates(Operator):
    """The change of the named parameters over a sequence of mini-batches.

    Parameters
    ----------
    model : nn.Module
        Owned from here on, as :class:`~.gradients.BatchGradients` does.
    names : sequence of str
    training : TrainingDetails
        Rate, momentum and weight decay of the clients.
    steps : sequence of Tensor
        For each step the places, ``[m]`` int64, of its mini-batch among a candidate's images.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        training: TrainingDetails,
        steps: Sequence[Tensor],
    ) -> None:
        freeze(model, names)
        self.model, self.training = model, training
        everything = dict(model.named_parameters())
        self._start = {name: everything[name].detach() for name in names}
        self.steps = [step.to(next(model.parameters()).device) for step in steps]
        self.evaluations = len(steps)
        self._gradient = grad(self._loss)
        self._each = vmap(self._walk, randomness="different")

    def __call__(self, candidate: Candidate) -> tuple[list[Tensor], list[Tensor]]:
        """Return ``w_0 - w_K`` for each name; nothing is read on the way."""
        return list(self._each(candidate.images, candidate.labels).values()), []

    def _walk(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        weights, moving = self._start, dict.fromkeys(self._start, torch.zeros(()))
        decay, momentum, lr = (
            self.training.weight_decay,
            self.training.momentum,
            self.training.lr,
        )
        for place in self.steps:
            gradients = self._gradient(weights, images[place], labels[place])
            if decay:
                gradients = {name: g + decay * weights[name] for name, g in gradients.items()}
            if momentum:
                gradients = {name: g + momentum * moving[name] for name, g in gradients.items()}
                moving = gradients
            weights = {name: weights[name] - lr * g for name, g in gradients.items()}
        return {name: start - weights[name] for name, start in self._start.items()}

    def _loss(self, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return penalized_loss(self.model, (images, labels), weights)


def in_order(examples: int, training: TrainingDetails, sets: int = 1) -> list[Tensor]:
    """Return every step's mini-batch where each epoch walks its set of images from first to last.

    With one set all epochs walk the same images in the same order (a known, or guessed, order);
    with a set for each epoch every epoch has images, and so an order, of its own.

    Parameters
    ----------
    examples : int
        Images in a set.
    training : TrainingDetails
    sets : int
        1, or as many as epochs.
    """
    steps: list[Tensor] = []
    for epoch in range(training.epochs):
        first = examples * (epoch % sets)
        steps += torch.split(torch.arange(first, first + examples), training.batch_size)
    return steps


def one_client_each(setting: Setting) -> None:
    """Refuse sums (``ValueError``): what several clients did is not one client's local training."""
    if setting.channel.aggregates:
        raise ValueError(
            "a sum of several clients' weights is no client's local training to simulate; use sme "
            "or inverting-gradients, which simulate nothing, or channel = 'plain'"
        )
