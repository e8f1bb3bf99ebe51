"""Linear inversion: read an example straight off the first fully connected layer.

For ``z = W x + b`` and any loss, ``dL/dW_i = g_i x`` and ``dL/db_i = g_i`` with ``g_i = dL/dz_i``:
one example is their ratio, in any row whose g_i is not zero.  Phong et al., "Privacy-Preserving
Deep Learning via Additively Homomorphic Encryption", IEEE TIFS 2018 (WISTP 2017), Sec. III;
Geiping et al., "Inverting Gradients", NeurIPS 2020, Prop. 3.1.

A batch of B examples gives ``sum_b g_ib x_b / sum_b g_ib``: the mean weighted by g, exact only
for a row that is active on a single example.

Precision, for one example: a gradient upload carries the ratio to the last digits of its type.
Weights after one local step are ``W - lr g x``: most of float32's digits are spent on W, and each
factor of ten in ``lr`` costs 20 dB (``paper.measured``).  Clipping, or any other rescaling of the
whole update, cancels in the ratio.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.attack import Attack, Cost, Paper, Reconstruction, ToyCase
from fedsim.data import DataSpec
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.idlg import negative_class


@register("attack", "linear-inversion")
@dataclass(frozen=True, kw_only=True)
class LinearInversion(Attack):
    """Recover ``x = dW_i / db_i`` from the row with the largest ``|db_i|``, or all, in float64.

    Threat model A.  Cost: one division.  One candidate for each view, with the label that the
    sign of the last layer's bias gradient gives (exact for one example).  The score is the share
    of the layer's gradient that one example explains: 1 for one example, less for a mixture.

    Parameters
    ----------
    layer : str or None
        Name of the fully connected layer; None takes the first one that reads the pixels.
    rows : {"largest", "all"}
        The row with the largest ``|db_i|``, or the least squares of all of them, pixel by pixel,
        over what did not come back as 0: for clients who drop the largest entries.
    clip : bool
        Bring pixels to ``[0, 1]``; False is for attacks that go on with what clients trained on,
        which a defense may have taken out of there.
    """

    paper = Paper(
        title="Privacy-Preserving Deep Learning via Additively Homomorphic Encryption",
        authors="Le Trieu Phong, Yoshinori Aono, Takuya Hayashi, Lihua Wang, Shiho Moriai",
        venue="IEEE Transactions on Information Forensics and Security",
        year=2018,
        published="exact for one example (Sec. III; Geiping et al. 2020, Prop. 3.1: the input of "
        "any biased fully connected layer)",
        measured="photo-tiles, mlp, one example, 50 images, PSNR capped at 200 dB. float32: "
        "gradient 154 dB at least (median 159), label 100 %; weights after one step, median, "
        "lr 1: 156, 0.1: 148, 0.01: 131, 1e-3: 111, 1e-4: 91 dB. float64: 200 dB throughout "
        "(python -m pytest -m slow tests/strategies/passive/test_linear_inversion.py -s)",
    )
    needs = frozenset({Capability.UPDATES})
    unit = "views"
    toy = ToyCase(
        scenario={
            "threat-model": "A",
            "attack": "linear-inversion",
            "data.dataset": "digits",
            "model.name": "mlp",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=120.0,
        high=199.0,  # float32; 200 is the auditor's cap
    )

    layer: str | None = None
    rows: Literal["largest", "all"] = "largest"
    clip: bool = True

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model without a biased fully connected layer on the pixels."""
        reading_layer(model, self.layer)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return ``[M, C, H, W]``, float64, at most one candidate for each view."""
        examples, indices, labels, scores, receipts = [], [], [], [], []
        shape: tuple[int, ...] = (1, 1, 1)
        for index, view in enumerate(views):
            model = knowledge.model(view)
            shape = _shape(model)
            found = _ratio(view, reading_layer(model, self.layer), self.rows)
            knowledge.progress(index + 1, len(views), "")
            if found is None:
                receipts.append(f"{view.label}: no row of the first layer can be divided")
                continue
            pixels = found[0].view(shape)
            examples.append(pixels.clamp(0, 1) if self.clip else pixels)
            scores.append(found[1])
            indices.append(index)
            labels.append(negative_class(view, model))
        divided = "one row" if self.rows == "largest" else "all rows"
        return Reconstruction(
            examples=torch.stack(examples) if examples else torch.empty(0, *shape),
            views=torch.tensor(indices, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float64),
            cost=Cost(),
            receipts=(f"divided {divided} for each of {len(examples)} views", *receipts),
        )


@dataclass(frozen=True)
class ReadingLayer:
    """A fully connected layer whose input is ``scale * pixels + offset``, elementwise, ``[n]``."""

    name: str
    scale: Tensor
    offset: Tensor


def reading_layer(model: nn.Module, name: str | None = None) -> ReadingLayer:
    """Find the first fully connected layer that reads the pixels, by running three images.

    Raises
    ------
    ValueError
        If there is none, or not under this name.
    """
    shape = _shape(model)
    for candidate, inputs in _linear_inputs(model):
        if name not in (None, candidate) or inputs.shape != (3, prod(shape)):
            continue
        offset, scale = inputs[0], inputs[1] - inputs[0]
        pixels = _probe_images(shape)[2].flatten()
        if scale.abs().min() > 0 and torch.allclose(inputs[2], scale * pixels + offset):
            return ReadingLayer(candidate, scale, offset)
    which = "no fully connected layer with a bias reads" if name is None else f"{name!r} is no "
    which += "" if name is None else "fully connected layer with a bias that reads"
    raise ValueError(
        f"{which} this model's pixels directly; use a model that starts with one (mlp), or an "
        "attack by optimization (inverting-gradients)"
    )


def _shape(model: nn.Module) -> tuple[int, int, int]:
    spec: DataSpec = model.spec  # type: ignore[assignment]
    return spec.shape


def _probe_images(shape: tuple[int, ...]) -> Tensor:
    noise = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([torch.zeros_like(noise), torch.ones_like(noise), noise])


def _linear_inputs(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return name and input of each biased fully connected layer, in the order of the forward."""
    probe = copy.deepcopy(model).double().cpu().eval()
    seen: list[tuple[str, Tensor]] = []
    for name, module in probe.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.append((name, inputs[0].clone()))
            )
    with torch.no_grad():
        probe(_probe_images(_shape(model)))
    return seen


def _ratio(view: ServerView, layer: ReadingLayer, rows: str) -> tuple[Tensor, float] | None:
    """Return pixels ``[n]`` and the share of the gradient that they explain, both float64."""
    update = view.update()
    if f"{layer.name}.weight" not in update or f"{layer.name}.bias" not in update:
        return None
    weight = update[f"{layer.name}.weight"].double().cpu()  # [rows, n]
    bias = update[f"{layer.name}.bias"].double().cpu()  # [rows]
    if not bias.any():
        return None
    read = _of_largest(weight, bias) if rows == "largest" else _of_all(weight, bias)
    if not read.isfinite().all():
        return None
    residual = torch.linalg.norm(weight - torch.outer(bias, read))
    explained = 1 - float(residual / torch.linalg.norm(weight))
    return (read - layer.offset) / layer.scale, max(0.0, explained)


def _of_largest(weight: Tensor, bias: Tensor) -> Tensor:
    row = bias.abs().nan_to_num(0, posinf=0).argmax()
    return weight[row] / bias[row]


def _of_all(weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``sum_i W_ij b_i / sum_i b_i^2`` over the i whose ``W_ij`` is not 0; 0 for none."""
    square = torch.where(weight != 0, bias.square()[:, None], 0.0).sum(dim=0)
    return bias @ weight / torch.where(square == 0, 1.0, square)
