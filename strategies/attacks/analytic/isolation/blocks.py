"""A block of columns for each client: how imprints of different clients stay apart in a sum.

Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi (CVPR 2023, Sec. 3; S&P 2024, Sec. 4).  A
convolution before the imprint has ``channels`` maps for each of ``C`` clients.  Client k's own
model passes the image through its maps only, kernel value ``scale`` at the center, and every other
kernel is zero; so only the ``D`` columns of the imprint that read these maps get a gradient at
client k, and the sum over clients still holds each client's block by itself:

    shown = images + back(a(W relu(conv_k(images)) + b)),   W: [n, C * D]

A zero kernel stays zero while clients train: its map is 0, where ReLU lets no derivative through.
Biases are summed over clients, so that the read-out must do without them: a row is the image times
an unknown number.  The papers stretch it to the range of pixels; the bin says more, because the
attacker knows between which cut-offs the mean of the image lies.

The papers let the way back replace the image; here it is added to it, as in Fowl et al. (2022), so
that the model behind keeps working and its gradient does not depend on BatchNorm (a third party's
re-implementation does the same).
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from fedsim.attack import Cost, Reconstruction
from fedsim.data import DataSpec
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation.bins import (
    brightness,
    empirical_cutoffs,
    normal_cutoffs,
    scalar_of,
)

Bins = Literal["normal", "empirical"]
Read = Callable[[ServerView, DataSpec], tuple[Tensor, Tensor, Tensor, int]]
# Examples on which the attacker tries its own model to set the scale.
PROBE = 64
# Neighboring pixels of an image are alike, those of noise are not: with rounding and quantization
# their correlation stays below so many standard errors.  Size alone does not tell: quantization
# moves some rows by a fraction of a step throughout, and images differ a thousandfold.
STANDARD_ERRORS = 4.0
# A row counts as occupied above so many rounding errors of what carries it.
ROUNDING = 8.0


class BlockImprint(nn.Module):
    """``body(images + back(a(imprint(relu(conv(images))))))``.

    Attributes
    ----------
    conv : nn.Conv2d
        ``channels`` to ``clients * channels`` maps, 3 x 3.
    imprint : nn.Module
        ``[B, clients * D]`` to ``[B, units]``.
    back : nn.Linear
        ``units`` to ``D``, constant: every unit that is on shifts the image by ``1 / units``.
    """

    def __init__(
        self,
        body: nn.Module,
        spec: DataSpec,
        *,
        clients: int,
        units: int,
        imprint: nn.Module,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        channels = spec.shape[0]
        self.conv = nn.Conv2d(channels, clients * channels, 3, padding=1)
        self.imprint = imprint
        self.activation = activation
        self.back = nn.Linear(units, torch.Size(spec.shape).numel())
        self.body = body

    def read(self, images: Tensor) -> Tensor:
        """Return what the imprint reads, ``[B, clients * D]``."""
        return relu(self.conv(images)).flatten(1)

    def shown(self, images: Tensor) -> Tensor:
        """Return what the body sees, ``[B, C, H, W]``."""
        signal = self.activation(self.imprint(self.read(images)))
        shift: Tensor = self.back(signal)
        return images + shift.view_as(images)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to the body's logits."""
        logits: Tensor = self.body(self.shown(images))
        return logits


# -- what is sent ----------------------------------------------------------------------------------
def around(
    spec: DataSpec, clients: int, scale: float, imprint: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all that stands before the body, in the model's order, every client's block open."""
    channels, pixels = spec.shape[0], torch.Size(spec.shape).numel()
    units, dtype = len(imprint["imprint.bias"]), imprint["imprint.bias"].dtype
    kernels = torch.zeros(clients, channels, channels, 3, 3, dtype=dtype)
    for channel in range(channels):
        kernels[:, channel, channel, 1, 1] = scale
    return {
        "conv.weight": kernels.flatten(0, 1),
        "conv.bias": torch.zeros(clients * channels, dtype=dtype),
        **imprint,
        "back.weight": torch.full((pixels, units), 1 / units, dtype=dtype),
        "back.bias": torch.zeros(pixels, dtype=dtype),
    }


def only_block(kernels: Tensor, client: int) -> Tensor:
    """Return kernels ``[clients * channels, channels, 3, 3]`` of which only one client's pass."""
    channels = kernels.shape[1]
    own = torch.zeros_like(kernels)
    block = slice(client * channels, (client + 1) * channels)
    own[block] = kernels[block]
    return own


def brightness_cutoffs(knowledge: Knowledge, units: int, bins: Bins) -> Tensor:
    """Return cut-offs of the mean pixel, ``[units + 1]`` float64, the outermost beyond all images.

    ``normal``: quantiles of a normal distribution with the surrogate images' mean and spread, as
    the papers have it; ``empirical``: the surrogate images' own.
    """
    quantiles = torch.linspace(0, 1, units + 1, dtype=torch.float64)
    values = scalar_of(knowledge.surrogate, brightness(knowledge.basics.data))
    if bins == "empirical":
        return empirical_cutoffs(values, quantiles)
    return values.mean() + values.std().clamp_min(1e-6) * normal_cutoffs(quantiles)


def signal_gradient(model: BlockImprint, knowledge: Knowledge, dtype: torch.dtype) -> float:
    """Return ``mean_j |s_j|`` over surrogate examples: how much one unit's signal moves a loss.

    ``model`` is a single client's, at scale 1.
    """
    surrogate = knowledge.surrogate
    generator = knowledge.generator("blocks", "probe")
    images, labels = surrogate.batch(torch.randperm(len(surrogate), generator=generator)[:PROBE])
    model.train(knowledge.batchnorm != "frozen").to(knowledge.device)
    images, labels = images.to(knowledge.device, dtype), labels.to(knowledge.device)
    shown = model.shown(images).detach().requires_grad_()
    loss = cross_entropy(model.body(shown), labels, reduction="sum")
    (pixels,) = torch.autograd.grad(loss, shown)
    per_unit = pixels.flatten(1) @ model.back.weight[:, 0].detach()
    return max(float(per_unit.abs().mean()), 1e-12)


# -- what is read ----------------------------------------------------------------------------------
def is_occupied(rows: Tensor, rounding: Tensor, spec: DataSpec) -> Tensor:
    """Say which rows ``[n, D]`` hold an image and not noise.

    ``rounding`` (``[n]`` or one) is the rounding error of what carries a row.
    """
    size = rows.square().mean(dim=1).sqrt()
    centered = (rows - rows.mean(dim=1, keepdim=True)).view(-1, *spec.shape)
    across = (centered[..., 1:] * centered[..., :-1]).flatten(1)
    down = (centered[..., 1:, :] * centered[..., :-1, :]).flatten(1)
    pairs = torch.cat([across, down], dim=1)
    correlation = pairs.mean(dim=1) / centered.square().flatten(1).mean(dim=1)
    alike: Tensor = correlation > STANDARD_ERRORS / pairs.shape[1] ** 0.5
    return alike & size.isfinite() & (size > ROUNDING * rounding)


def brightened(rows: Tensor, cutoffs: Tensor, bins: Tensor) -> Tensor:
    """Return images ``[k, D]`` from rows: the mean of each is that of its bin's middle.

    Rows are an image times a number of unknown sign, and images are nowhere negative.  The
    outermost bins reach beyond all images; theirs are taken as wide as the next.
    """
    edges = cutoffs.clone()
    edges[0], edges[-1] = 2 * edges[1] - edges[2], 2 * edges[-2] - edges[-3]
    middle = ((edges[:-1] + edges[1:]) / 2).clamp(0, 1)[bins]
    shape = rows.abs()
    return shape * (middle / shape.mean(dim=1)).unsqueeze(1)


def told(view: ServerView, clients: Tensor, bins: int) -> str:
    """Say how many bins were read, and of whom: the block is the client."""
    counts = [int((clients == client).sum()) for client in view.senders]
    each = ", ".join(f"client {k}: {count}" for k, count in zip(view.senders, counts, strict=True))
    if len(counts) > 8:
        each = f"{min(counts)} to {max(counts)} of each of {len(counts)} clients"
    return f"read {len(clients)} occupied bins of {bins} in view {view.label} ({each})"


def read_views(views: Sequence[ServerView], knowledge: Knowledge, read: Read) -> Reconstruction:
    """Read every occupied bin of every sender's block; no more than there are examples.

    ``read`` gives of a view images ``[k, D]``, strength and client of each, and bins in all.
    """
    started = time.perf_counter()
    knowledge.require(Capability.UPDATES)
    spec = knowledge.basics.data
    found, scores, sources, receipts = [], [], [], []
    for index, view in enumerate(views):
        images, strength, clients, bins = read(view, spec)
        best = strength.argsort(descending=True, stable=True)[: knowledge.most_examples(view)]
        found.append(images[best].view(-1, *spec.shape).clamp(0, 1))
        scores.append(strength[best].float())
        sources.append(torch.full((len(best),), index))
        receipts.append(told(view, clients, bins))
    return Reconstruction(
        examples=torch.cat(found) if found else torch.empty(0, *spec.shape),
        views=torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64),
        scores=torch.cat(scores) if scores else None,
        cost=Cost(seconds=time.perf_counter() - started),
        receipts=tuple(receipts),
    )
