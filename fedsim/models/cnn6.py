"""CNN6: six convolutions with LeakyReLU and a linear layer, no bias anywhere.

The network of R-GAP (Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021),
as in the authors' code, with a logit for each class where theirs has one logit in all.  A sequence
of plain layers, in the order in which they compute; nothing is normalized.
"""

from collections import OrderedDict
from typing import Annotated

from pydantic import Field
from torch import nn

from fedsim.data.dataset import DataSpec
from fedsim.registry import register

#: Channels, kernel, stride and padding of each convolution.
CONVOLUTIONS = (
    (12, 4, 2, 2),
    (36, 3, 2, 1),
    (36, 3, 1, 1),
    (36, 3, 1, 1),
    (64, 3, 2, 1),
    (128, 3, 1, 1),
)
SLOPE = 0.2


@register("model", "cnn6")
def cnn6(spec: DataSpec, *, second: Annotated[int, Field(gt=0)] = 36) -> nn.Module:
    """Build the network; 3,200 features at 32 x 32.  PyTorch's initialization.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    second : int
        Channels of the second convolution.  20 is the paper's CNN6-d, whose second layer's
        equations do not determine its input.
    """
    before, height, width = spec.shape
    encoder = nn.Sequential()
    for index, (after, kernel, stride, padding) in enumerate(CONVOLUTIONS):
        after = second if index == 1 else after  # noqa: PLW2901
        conv = nn.Conv2d(before, after, kernel, stride=stride, padding=padding, bias=False)
        encoder.extend([conv, nn.LeakyReLU(SLOPE)])
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        before = after
    head = nn.Linear(before * height * width, spec.num_classes, bias=False)
    return nn.Sequential(OrderedDict(encoder=encoder, flatten=nn.Flatten(), head=head))
