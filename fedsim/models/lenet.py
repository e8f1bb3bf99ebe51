"""The LeNet variant on which Deep Leakage from Gradients was shown.

Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019; the architecture and the
initialization follow the authors' code, as do iDLG's.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.data.dataset import DataSpec
from fedsim.registry import register

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


class LeNet(nn.Module):
    """Three 5 x 5 convolutions of 12 channels (strides 2, 2, 1; padding 2) and a linear layer."""

    def __init__(self, spec: DataSpec, activation: str) -> None:
        super().__init__()
        channels, height, width = spec.shape
        act = ACTIVATIONS[activation]
        self.body = nn.Sequential(
            nn.Conv2d(channels, 12, 5, stride=2, padding=2),
            act(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            act(),
            nn.Conv2d(12, 12, 5, stride=1, padding=2),
            act(),
        )
        # A stride of 2 with this padding halves and rounds up: 32 -> 8, 28 -> 7.
        self.fc = nn.Linear(12 * -(-height // 4) * -(-width // 4), spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to logits ``[B, classes]``; nothing is normalized."""
        logits: Tensor = self.fc(self.body(images).flatten(1))
        return logits


@register("model", "lenet")
def lenet(
    spec: DataSpec,
    *,
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid",
    init: Literal["uniform", "default"] = "uniform",
) -> nn.Module:
    """Build DLG's LeNet; 768 features at 32 x 32, 588 at 28 x 28.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    activation : {"sigmoid", "tanh", "relu"}
        The paper's is the sigmoid: matching gradients needs second derivatives.
    init : {"uniform", "default"}
        ``"uniform"`` draws every weight and bias from U(-0.5, 0.5), as DLG's code does; without it
        the sigmoids saturate the match and the attack often stalls.  ``"default"`` is PyTorch's.
    """
    model = LeNet(spec, activation)
    if init == "uniform":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5)
    return model
