"""A small convolutional network, for quick federations and gradient inversion."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from fedsim.data.dataset import DataSpec
from fedsim.models.building import Normalize
from fedsim.registry import register

Width = Annotated[int, Field(gt=0)]


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions with ReLU (strides ``stride``, 2, 2), and linear layers."""

    def __init__(
        self,
        spec: DataSpec,
        width: int,
        stride: int,
        hidden: Sequence[int] = (),
        *,
        batchnorm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, across = spec.shape
        self.normalize = Normalize(spec)
        self.body = nn.Sequential()
        for before, after, step in (
            (channels, width, stride),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 2),
        ):
            self.body.append(nn.Conv2d(before, after, 3, stride=step, padding=1))
            self.body.extend([nn.BatchNorm2d(after)] * batchnorm)
            self.body.append(nn.ReLU())
        # A stride of 2 with this padding halves and rounds up.
        pixels = -(-height // (4 * stride)) * -(-across // (4 * stride))
        widths = [2 * width * pixels, *hidden]
        self.hidden = nn.Sequential()
        for before, after in pairwise(widths):
            self.hidden.extend([nn.Dropout(dropout)] * bool(dropout))
            self.hidden.extend([nn.Linear(before, after), nn.ReLU()])
        self.hidden.extend([nn.Dropout(dropout)] * bool(dropout))
        self.fc = nn.Linear(widths[-1], spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to logits ``[B, classes]``."""
        logits: Tensor = self.fc(self.hidden(self.body(self.normalize(images)).flatten(1)))
        return logits


@register("model", "convnet")
def convnet(
    spec: DataSpec,
    *,
    width: Width = 32,
    stride: Literal[1, 2] = 1,
    hidden: list[Width] | tuple[Width, ...] = (),
    norm: Literal["none", "batch"] = "none",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
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
    hidden : list of int
        Widths of fully connected ReLU layers before the last one.
    norm : {"none", "batch"}
        Whether BatchNorm follows each convolution.
    dropout : float
        Before each fully connected layer, in train mode only: with ``model.batchnorm = "frozen"``
        clients train in eval mode, without it.
    """
    return ConvNet(spec, width, stride, hidden, batchnorm=norm == "batch", dropout=dropout)
