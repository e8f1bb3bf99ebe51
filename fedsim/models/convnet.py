"""A small convolutional network without BatchNorm, for quick federations and gradient inversion."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from fedsim.data.dataset import DataSpec
from fedsim.models.building import Normalize
from fedsim.registry import register


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions with ReLU (strides ``stride``, 2, 2), and a linear layer."""

    def __init__(self, spec: DataSpec, width: int, stride: int) -> None:
        super().__init__()
        channels, height, across = spec.shape
        self.normalize = Normalize(spec)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        # A stride of 2 with this padding halves and rounds up.
        pixels = -(-height // (4 * stride)) * -(-across // (4 * stride))
        self.fc = nn.Linear(2 * width * pixels, spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to logits ``[B, classes]``."""
        logits: Tensor = self.fc(self.body(self.normalize(images)).flatten(1))
        return logits


@register("model", "convnet")
def convnet(
    spec: DataSpec, *, width: Annotated[int, Field(gt=0)] = 32, stride: Literal[1, 2] = 1
) -> nn.Module:
    """Build the network; PyTorch's default initialization.

    Parameters
    ----------
    spec : DataSpec
        Shape, number of classes, mean and standard deviation.
    width : int
        Channels of the first convolution; the others have twice as many.
    stride : {1, 2}
        Of the first convolution; with 2 images are much harder to get back.
    """
    return ConvNet(spec, width, stride)
