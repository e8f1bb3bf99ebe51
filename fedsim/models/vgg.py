"""VGG-16, configuration D of Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015.

Thirteen 3 x 3 convolutions in five blocks, a 2 x 2 max-pooling after each, and three linear layers;
torchvision's initialization.  A sequence of plain layers, in the order in which they compute.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedsim.data.dataset import DataSpec
from fedsim.models.building import Normalize
from fedsim.registry import register

# Channels of each block's convolutions.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALL = 96


@register("model", "vgg16")
def vgg16(
    spec: DataSpec,
    *,
    padding_mode: Literal["zeros", "replicate"] = "zeros",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    hidden: Annotated[int, Field(gt=0)] | None = None,
) -> nn.Module:
    """Build VGG-16 without BatchNorm, untrained; 138,357,544 parameters at 224 x 224, 1000 classes.

    Where the input is not 224 x 224 the first linear layer reads the last feature map as it is;
    torchvision's averages it to 7 x 7, which at 224 changes nothing.

    Parameters
    ----------
    spec : DataSpec
        Shape, number of classes, mean and standard deviation.
    padding_mode : {"zeros", "replicate"}
        What the convolutions see beyond the border.
    dropout : float
        After either hidden linear layer, in train mode only: with ``model.batchnorm = "frozen"``
        clients train in eval mode, without it.
    hidden : int or None
        Width of the hidden linear layers; None is 4096, and 512 below 96 pixels, where the few
        features that are left need no more.
    """
    before, height, width = spec.shape
    layers: list[nn.Module] = []
    for block in BLOCKS:
        for after in block:
            conv = nn.Conv2d(before, after, 3, padding=1, padding_mode=padding_mode)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ReLU()]
            before = after
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        height, width = -(-height // 2), -(-width // 2)
    if hidden is None:
        hidden = 512 if min(spec.shape[1:]) < SMALL else 4096
    widths = (before * height * width, hidden, hidden, spec.num_classes)
    linear = [nn.Linear(*ends) for ends in pairwise(widths)]
    for layer in linear:
        nn.init.normal_(layer.weight, 0, 0.01)
        nn.init.zeros_(layer.bias)
    head = [linear[0], nn.ReLU(), nn.Dropout(dropout), linear[1], nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(spec),
            features=nn.Sequential(*layers),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(*head, linear[2]),
        )
    )
