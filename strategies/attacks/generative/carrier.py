"""The network as SEER sees it: one linear layer whose gradient is read, and what lies before it.

For that layer's input ``f_i`` (features) and the derivative ``delta_i`` of image i's loss by its
output, the gradient of a sum of losses weighted by ``w`` is ``sum_i w_i delta_i [f_i, 1]^T``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.attacks.generative.normal import NormalEquations
from strategies.attacks.generative.rounds import SurrogateRounds

# Batches on which the property is regressed; strength of that ridge.
BATCHES, STRENGTH = 400, 1e-4
# Shift of every BatchNorm at the start: its output, of variance 1, then seldom meets a ReLU's bend.
SHIFT = 3.0
# Logit of the class that the network is sure of when training starts: p = 0.998 of ten classes.
CERTAIN = 8.0


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, in the order in which the model registers them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


class Carrier:
    """A network in train mode (BatchNorm uses a batch's own statistics), owned from here on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.name, self.layer = next(iter(linear_layers(model).items()))
        self._inputs: tuple[Tensor, ...] = ()
        self.layer.register_forward_pre_hook(self._keep)

    def features(self, images: Tensor) -> Tensor:
        """Return the layer's inputs ``[B, F]``."""
        with torch.no_grad():
            self.model(images)
        return self._inputs[0].detach()

    def read(self, images: Tensor, labels: Tensor, weights: Tensor, *, train: bool) -> Tensor:
        """Return ``sum_i w_i grad CE_i`` for each row of ``weights`` ``[K, B]``: ``[K, U, F + 1]``.

        One forward pass and K vector-Jacobian products; differentiable again with ``train``.
        """
        losses = cross_entropy(self.model(images), labels, reduction="none")
        wanted = [self.layer.weight, self.layer.bias]
        sums = []
        for row in weights:
            weight, bias = torch.autograd.grad(
                losses, wanted, row, create_graph=train, retain_graph=True
            )
            sums.append(torch.cat([weight, bias.unsqueeze(1)], dim=1))
        return torch.stack(sums)

    def read_update(self, gradient: dict[str, Tensor]) -> Tensor:
        """Return the same of a gradient that came back, ``[U, F + 1]``; a protocol's is float64."""
        weight, bias = gradient[f"{self.name}.weight"], gradient[f"{self.name}.bias"]
        return torch.cat([weight, bias.unsqueeze(1)], dim=1).to(self.layer.weight)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs


def see(carrier: Carrier, rounds: SurrogateRounds, taus: Tensor) -> None:
    """Let training start from a network that sees the property already.

    The convolutions stay as they were but for BatchNorm's shifts, which carry features past the
    ReLUs, so that they are linear in the image.  The first ``len(taus)`` units of the layer get the
    least-squares estimate of the standardized score, less one of ``taus`` each; the others stay
    honest.  Of the last layer only one class's row is not zero, equal for all units, and its bias
    is large: ``p - y`` is then 1 there for every image of another class, whatever its label.
    """
    layer, last = carrier.layer, list(linear_layers(carrier.model).values())[-1]
    with torch.no_grad():
        for module in carrier.model.modules():
            if isinstance(module, _BatchNorm):
                module.bias.fill_(SHIFT)
        size = float(last.weight.norm(dim=1).mean()) / last.in_features**0.5
        for parameter in (last.weight, last.bias):
            parameter.zero_()
        last.weight[rounds.rarest_class] = size
        last.bias[rounds.rarest_class] = CERTAIN
    fitted = NormalEquations()
    for _ in range(BATCHES):
        batch = rounds.draw()
        fitted.add(carrier.features(batch.images), batch.scores.unsqueeze(1))
    row = fitted.solve(STRENGTH).squeeze(1)
    with torch.no_grad():
        layer.weight[: len(taus)] = row.to(layer.weight)
        layer.bias[: len(taus)] = -float(fitted.mean @ row) - taus.to(layer.bias)
