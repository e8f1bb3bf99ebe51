"""Three strided convolutions and three linear layers; the network of Shi et al., NDSS 2025.

A sequence of plain layers, in the order in which they compute; nothing is normalized.
"""

from collections import OrderedDict
from typing import Annotated

from pydantic import Field
from torch import nn

from fedsim.data.dataset import DataSpec
from fedsim.registry import register

Width = Annotated[int, Field(gt=0)]
FILTERS = (12, 32, 64)


@register("model", "cnn")
def cnn(spec: DataSpec, *, hidden: tuple[Width, Width] | list[Width] = (1024, 512)) -> nn.Module:
    """Build 4 x 4 convolutions of stride 2 (12, 32, 64 channels) and the linear layers behind them.

    1,024 features at 32 x 32; PyTorch's initialization.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    hidden : tuple of int
        Widths of the two hidden linear layers.
    """
    if len(hidden) != 2:
        raise ValueError(f"there are two hidden linear layers, not {len(hidden)}")
    before, height, width = spec.shape
    encoder: list[nn.Module] = []
    for after in FILTERS:
        encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        before, height, width = after, height // 2, width // 2
    first, second = hidden
    head = nn.Sequential(
        nn.Linear(before * height * width, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, spec.num_classes),
    )
    return nn.Sequential(
        OrderedDict(encoder=nn.Sequential(*encoder), flatten=nn.Flatten(), head=head)
    )
