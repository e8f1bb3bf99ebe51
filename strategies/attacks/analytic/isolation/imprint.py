"""The imprint block of Fowl et al. (ICLR 2022): a wide linear layer put before a whole model.

``z = W x + b`` on the raw pixels, an activation, and a way back to the input's shape.  It needs
nothing of the model behind it, which gets ordinary images and gives ordinary logits.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.models import build_model
from fedsim.registry import register

MODEL = "robbing-the-fed-imprint"
Variant = Literal["dense", "sparse", "one-shot"]
ReadOut = Literal["addition", "linear"]


class Imprint(nn.Module):
    """``body(images + mean_i a(z_i) / gain)``, or ``body(V a(z))`` with a second linear layer.

    Attributes
    ----------
    imprint : nn.Linear
        ``[units, C*H*W]``: reads pixels.
    back : nn.Linear or None
        ``[C*H*W, units]``, for ``read_out="linear"``.
    body : nn.Module
        The federation's own model.
    """

    def __init__(self, body: nn.Module, spec: DataSpec, units: int, gain: float) -> None:
        super().__init__()
        pixels = torch.Size(spec.shape).numel()
        self.gain = gain
        self.imprint = nn.Linear(pixels, units)
        self.activation: nn.Module = nn.ReLU()
        self.back: nn.Linear | None = None
        self.body = body

    def shown(self, images: Tensor) -> Tensor:
        """Return what the body sees, ``[B, C, H, W]``."""
        signal = self.activation(self.imprint(images.flatten(1)))
        if self.back is not None:
            flat: Tensor = self.back(signal)
            return flat.view_as(images)
        shift: Tensor = signal.mean(dim=1).view(-1, 1, 1, 1) / self.gain
        return images + shift

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to the body's logits."""
        logits: Tensor = self.body(self.shown(images))
        return logits


@register("model", MODEL)
def robbing_the_fed_imprint(
    spec: DataSpec,
    *,
    body: str,
    units: Annotated[int, Field(ge=2)],
    variant: Variant = "dense",
    read_out: ReadOut = "addition",
    gain: Annotated[float, Field(gt=0)] = 1.0,
) -> nn.Module:
    """Put an imprint block before a model.

    Parameters
    ----------
    spec : DataSpec
        Shape of what the block reads.
    body : str
        Expression of the model behind it.
    units : int
        Rows of the imprint layer.
    variant : {"dense", "sparse", "one-shot"}
        ``"sparse"`` units saturate (Hardtanh between 0 and ``gain``); the others are ReLU.
    read_out : {"addition", "linear"}
        The way back: the mean activation added to every pixel, or a linear layer.
    gain : float
        What the rows are scaled by, and the way back by its inverse: the forward pass stays, the
        rows' gradients grow by ``1 / gain``.
    """
    model = Imprint(build_model(body, spec), spec, units, gain)
    if variant == "sparse":
        model.activation = nn.Hardtanh(0.0, gain)
    if read_out == "linear":
        model.back = nn.Linear(units, model.imprint.in_features)
    return model
