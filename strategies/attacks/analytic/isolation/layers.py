"""A plain network as the list of its layers, for attacks that overwrite one layer after another."""

from torch import nn


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of nested ``nn.Sequential`` by name, in the order in which they compute.

    Raises
    ------
    ValueError
        If the model is anything else: what its ``forward`` does cannot be read off its layers.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"{type(model).__name__} is no plain sequence of layers; use mlp, cnn, lenet5 or vgg16"
        )
    found: dict[str, nn.Module] = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Sequential):
            inner = layers_of(layer)
            found |= {f"{name}.{deeper}": one for deeper, one in inner.items()}
        else:
            found[name] = layer
    return found
