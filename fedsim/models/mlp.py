"""A multilayer perceptron that reads pixels."""

from itertools import pairwise
from math import prod
from typing import Annotated

from pydantic import Field
from torch import nn

from fedsim.data.dataset import DataSpec
from fedsim.models.building import Normalize
from fedsim.registry import register

Width = Annotated[int, Field(gt=0)]


@register("model", "mlp")
def mlp(
    spec: DataSpec, *, hidden: list[Width] | tuple[Width, ...] = (128,), normalize: bool = False
) -> nn.Module:
    """Build flatten -> (linear -> ReLU) for each hidden width -> linear.

    Unless it normalizes, the first layer's gradient is a mixture of the pixels themselves.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    hidden : list of int
        Widths; ``[]`` is softmax regression.
    normalize : bool
        Standardize images by the data's public constants first; layers keep their names.
    """
    pixels = nn.Flatten()
    layers: list[nn.Module] = [nn.Sequential(Normalize(spec), pixels) if normalize else pixels]
    for before, after in pairwise([prod(spec.shape), *hidden]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    widths = [prod(spec.shape), *hidden]
    return nn.Sequential(*layers, nn.Linear(widths[-1], spec.num_classes))
