"""Self-audit: the client attacks its own update before anybody else can.

Before it sends an update, it reads it as the analytic attacks do, and compares what comes out with
all images that it trained on, which no server can.  From each linear layer whose fan-in is a whole
number of images, or of image planes (behind a pass-through):

    x = G_r / gb_r                             Phong et al. 2017; Boenisch et al. 2023
    x = (G_r - G_{r+1}) / (gb_r - gb_{r+1})    Fowl et al. 2022; neighbors by the received bias
    x = |G_r - G_{r+1}| / max |G_r - G_{r+1}|  Zhao et al. 2023: no bias is needed

``self-audit`` is the PSNR (dB) of the best candidate of all, ``self-audit/images`` the share of
the images that come back at ``recognizable`` dB or better.  It needs no idea of how the server
made its model, and finds honest models that leak too: the first layer of a perceptron on a small
batch does.  It cannot read what needs a decoder of the server's (SEER, Scale-MIA) or another
client's upload.

What it audits is the update as it would be sent, noise and all: the gradient (FedSGD), or what is
sent minus what was received (FedAvg).  Before training it reads the gradient of the first batch,
and refuses nothing by it: those scores stand where another check refuses the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.detection.judged import judged
from clients.defenses.detection.layers import bias_name, bias_of, linear, unread
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.registry import register

# 200 dB: closer than this is equality in double precision.
EQUAL = 1e-20
# Distances held at once.
AT_ONCE = 2**24


@register("defense", "self-audit")
@dataclass(frozen=True, kw_only=True)
class SelfAudit(Defense):
    """Invert the would-be update with the analytic read-outs, and look for one's own images.

    Undecidable for a model without a linear layer that reads whole images or planes.  Costs one
    batch gradient, and ``rows x images`` distances for each such layer.

    Parameters
    ----------
    refuse_above : float or None
        Refuse to send an update from which an image comes back better than this, in dB.
    images : float or None
        Refuse to send an update that gives away more than this share of its images.
    recognizable : float
        From how many dB on an image counts in ``images``.
    """

    paper: ClassVar[Paper] = Paper(
        title="Robbing the Fed: Directly Obtaining Private Data in Federated Learning with "
        "Modified Models",
        authors="Fowl, Geiping, Czaja, Goldblum, Goldstein",
        venue="ICLR",
        year=2022,
        published="none: the read-outs are theirs and of Boenisch et al. (EuroS&P 2023), using "
        "them on oneself is ours",
        measured="docs/detection.md (python tests/benchmarks/detection.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "self-audit"},
        # One image through a linear layer: exact, and the client knows before the server does.
        figure="detection.0.checks.self-audit",
        low=100.0,
        high=200.0,
    )
    changes_upload: ClassVar[bool] = False

    refuse_above: Annotated[float, Field(gt=0)] | None = None
    images: Annotated[float, Field(ge=0, lt=1)] | None = None
    recognizable: Annotated[float, Field(gt=0)] = 20.0

    @property
    def refuses_on_examples(self) -> bool:
        """Whether a limit is set."""
        return self.refuse_above is not None or self.images is not None

    def inspect(
        self,
        model: nn.Module,
        received: Tensors,
        probe: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return ``self-audit`` (dB) and ``self-audit/images`` (share) of the first batch."""
        scores = self._scores(received, batch_gradient(model, probe), probe[0])
        return Verdict(accept=True, checks=judged(scores, {}).checks)

    def inspect_update(
        self,
        received: Tensors,
        update: Tensors,
        used: Batch,
        ctx: ClientContext,  # noqa: ARG002
    ) -> Verdict:
        """Return ``self-audit`` (dB) and ``self-audit/images`` (share) of what would be sent."""
        scores = self._scores(received, update, used[0])
        limits = dict(zip(scores, (self.refuse_above, self.images), strict=True))
        return judged(scores, limits, unread(received))

    def _scores(self, received: Tensors, update: Tensors, images: Tensor) -> dict[str, float]:
        psnr = own_images_back(received, update, images)
        best = share = float("nan")
        if psnr is not None:
            best, share = float(psnr.max()), float((psnr >= self.recognizable).double().mean())
        return {self.name: best, f"{self.name}/images": share}


def batch_gradient(model: nn.Module, batch: Batch) -> Tensors:
    """Return the gradient of the mean loss: what FedSGD begins with, and FedAvg too."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = cross_entropy(model(batch[0]), batch[1])
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def own_images_back(received: Tensors, update: Tensors, images: Tensor) -> Tensor | None:
    """Return how well each image comes back, PSNR ``[B]`` in dB; None if no layer reads images.

    An image that is read plane by plane counts by its best plane.
    """
    best: Tensor | None = None
    for name, weight in linear(update).items():
        fitting = _units(images, weight.shape[1])
        if fitting is None:
            continue
        wanted, size = fitting
        closest = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        bias, sent = update.get(bias_name(name)), bias_of(received, name)
        for candidates in read_outs(weight.double(), bias, sent, size):
            if len(candidates):
                closest = torch.minimum(closest, least_errors(candidates, wanted))
        psnr = -10 * closest.clamp_min(EQUAL).log10()
        best = psnr if best is None else torch.maximum(best, psnr)
    return best


def _units(images: Tensor, fan_in: int) -> tuple[Tensor, int] | None:
    """Return what a layer's columns are compared with, ``[B, parts, size]``, and the size."""
    whole, plane = images[0].numel(), images[0, 0].numel()
    if fan_in % whole == 0:
        return images.double().flatten(1).unsqueeze(1), whole
    if fan_in % plane == 0:
        return images.double().flatten(2), plane
    return None


def read_outs(
    weight: Tensor, bias: Tensor | None, sent: Tensor | None, size: int
) -> Iterator[Tensor]:
    """Yield candidates ``[n, size]``: ratios, differences and scaled differences of the rows.

    ``weight`` (``[R, F]``) and ``bias`` (``[R]``) are the gradient's, ``sent`` the bias received.
    """
    if sent is not None:
        order = sent.argsort()
        weight, bias = weight[order], bias[order] if bias is not None else None
    # The outermost row by itself: nothing lies beyond it.
    steps = torch.cat([weight[:-1] - weight[1:], weight[-1:]])
    if bias is not None:
        own = bias.double()
        yield _divided(weight, own).reshape(-1, size)
        yield _divided(steps, torch.cat([own[:-1] - own[1:], own[-1:]])).reshape(-1, size)
    parts = steps.reshape(-1, size).abs()
    yield _divided(parts, parts.amax(dim=1))


def _divided(rows: Tensor, by: Tensor) -> Tensor:
    """Return ``rows / by`` where that is a number, in [0, 1]."""
    candidates = rows / by.unsqueeze(1)
    return candidates[candidates.isfinite().all(dim=1)].clamp(0, 1)


def least_errors(candidates: Tensor, wanted: Tensor) -> Tensor:
    """Return each image's mean squared error to the closest candidate, ``[B]``.

    Parameters
    ----------
    candidates : Tensor
        ``[n, size]`` float64.
    wanted : Tensor
        ``[B, parts, size]`` float64; the best part counts.
    """
    flat = wanted.flatten(0, 1)
    least = torch.full((len(flat),), torch.inf, dtype=torch.float64, device=flat.device)
    for some in torch.split(candidates, max(1, AT_ONCE // len(flat))):
        nearest = torch.cdist(flat, some, compute_mode="use_mm_for_euclid_dist").argmin(dim=1)
        # The product form finds the nearest; its own rounding hides what is below 1e-7.
        error = (flat - some[nearest]).square().mean(dim=1)
        least = torch.minimum(least, error)
    return least.view(wanted.shape[:2]).amin(dim=1)
