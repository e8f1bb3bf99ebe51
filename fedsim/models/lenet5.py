"""LeNet-5 as it is usually built today: sigmoids, average pooling, three linear layers.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE 1998, Sec. II.B, with every map of the second convolution connected to all
of the first.  A sequence of plain layers, in the order in which they compute; nothing is
normalized.
"""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedsim.data.dataset import DataSpec
from fedsim.registry import register

Maps = Annotated[int, Field(gt=0)]
#: Below so many pixels the second convolution is padded too: without its border nothing is left.
LEAST = 12


@register("model", "lenet5")
def lenet5(
    spec: DataSpec,
    *,
    maps: tuple[Maps, Maps] | list[Maps] = (6, 16),
    padding_mode: Literal["zeros", "replicate"] = "zeros",
) -> nn.Module:
    """Build LeNet-5; 61,706 parameters at 28 x 28 with ten classes.  PyTorch's initialization.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    maps : tuple of int
        Channels of the two convolutions.
    padding_mode : {"zeros", "replicate"}
        What the convolutions see beyond the border.
    """
    if len(maps) != 2:
        raise ValueError(f"LeNet-5 has two convolutions, not {len(maps)}")
    channels, height, width = spec.shape
    first, second = maps
    border = 2 if min(height, width) < LEAST else 0
    height, width = ((side // 2 + 2 * border - 4) // 2 for side in (height, width))
    convolutions = nn.Sequential(
        nn.Conv2d(channels, first, 5, padding=2, padding_mode=padding_mode),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(first, second, 5, padding=border, padding_mode=padding_mode),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
    )
    linear = nn.Sequential(
        nn.Linear(second * height * width, 120),
        nn.Sigmoid(),
        nn.Linear(120, 84),
        nn.Sigmoid(),
        nn.Linear(84, spec.num_classes),
    )
    return nn.Sequential(
        OrderedDict(convolutions=convolutions, flatten=nn.Flatten(), linear=linear)
    )
