"""GroupNorm in the place of BatchNorm, for training whose every example counts by itself."""

import inspect
import logging
import typing
from collections.abc import Callable
from typing import Any

from torch import nn

from fedsim import registry
from fedsim.data.dataset import DataSpec
from fedsim.models.building import build_model
from fedsim.registry import Expression, register


def mixing_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers whose outcome for one example depends on others.

    BatchNorm, and what else keeps running statistics over a batch.
    """
    norms = nn.modules.batchnorm._BatchNorm
    kept = nn.modules.instancenorm._InstanceNorm
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, norms) or (isinstance(layer, kept) and layer.track_running_stats)
    ]


def group_normalized(expression: str) -> str:
    """Return the expression of a model with GroupNorm: its own ``norm`` if it can, or a wrapper."""
    (found,) = registry.parse(expression, "model.name")
    component = registry.components("model")[found.name]
    if "group" in _norms(component):
        return str(Expression(found.name, {**found.arguments, "norm": "group"}))
    return str(Expression("group-normalized", {"of": expression}))


def _norms(component: Callable[..., Any]) -> tuple[Any, ...]:
    if "norm" not in inspect.signature(component).parameters:
        return ()
    return typing.get_args(typing.get_type_hints(component)["norm"])


@register("model", "group-normalized")
def wrapped(spec: DataSpec, *, of: str) -> nn.Module:
    """Build another model with GroupNorm where it has BatchNorm, as opacus replaces it.

    Parameters
    ----------
    spec : DataSpec
        Shape, number of classes, mean and standard deviation.
    of : str
        The other model's expression.
    """
    from opacus.validators import ModuleValidator  # slow to import

    logging.getLogger("opacus").setLevel(logging.WARNING)
    fixed: nn.Module = ModuleValidator.fix(build_model(of, spec))
    return fixed
