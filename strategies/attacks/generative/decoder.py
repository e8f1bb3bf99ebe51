"""The secret decoder: from the read gradient to an image, linearly.

``d(G) = v^T G R`` and the image is ``d(G) + b``: the *disaggregator* v ``[U]`` mixes the layer's
units so that one image's part remains, the *reconstructor* R ``[F + 1, D]`` shows its features.
Garov et al., ICLR 2024, Sec. 4; with all entries free (their released code: disaggregator the
identity, 540 million parameters) the decoder would need their million batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.attacks.generative.carrier import Carrier
from strategies.attacks.generative.normal import NormalEquations
from strategies.attacks.generative.rounds import Batch, SurrogateRounds

# Ridges of reconstructor and disaggregator.
SHOW, MIX = 1e-3, 1e-3


@dataclass(frozen=True)
class Decoder:
    """``mix`` is v ``[U]``, ``show`` R ``[F + 1, D]``, ``base`` b ``[D]``."""

    mix: Tensor
    show: Tensor
    base: Tensor

    def signal(self, read: Tensor) -> Tensor:
        """Return ``d(G)`` for ``[K, U, F + 1]``: ``[K, D]``, zero for no gradient."""
        return torch.einsum("u,kuf->kf", self.mix, read) @ self.show

    def __call__(self, read: Tensor) -> Tensor:
        """Return images ``[K, D]``, not clamped."""
        return self.signal(read) + self.base


def fit_decoder(
    carrier: Carrier, rounds: SurrogateRounds, clients: int, count: int
) -> tuple[Decoder, float]:
    """Solve for the decoder of a given network, on ``count`` rounds of ``clients`` batches.

    R by least squares from features to images, of the upper half of each batch (in the property);
    v and b by least squares from whole gradient sums, as they will arrive, to the one image whose
    standardized score is the largest of all.

    Returns
    -------
    decoder : Decoder
    error : float
        Mean squared error of the images it was fitted on.
    """
    shown = NormalEquations()
    for _ in range(count):
        batch = rounds.draw()
        upper = batch.scores.argsort(descending=True)[: -(-rounds.size // 2)]
        shown.add(carrier.features(batch.images)[upper], batch.images[upper].flatten(1))
    show = shown.solve(SHOW)
    show = torch.cat([show, -(shown.mean @ show).unsqueeze(0)])  # the bias's gradient centers
    pairs = [round_sum(carrier, [rounds.draw() for _ in range(clients)]) for _ in range(count)]
    parts = torch.stack([read.double() @ show for read, _ in pairs])  # [N, U, D]
    images = torch.stack([image for _, image in pairs]).double()
    return _mixed(parts, images, show, carrier.layer.weight.dtype)


def round_sum(carrier: Carrier, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return the gradient sum of all batches ``[U, F + 1]`` and the image with the property."""
    reads = []
    for batch in batches:
        ones = torch.ones_like(batch.scores).unsqueeze(0)
        reads.append(carrier.read(batch.images, batch.labels, ones, train=False)[0])
    best = max(batches, key=lambda batch: float(batch.scores.max()))
    return torch.stack(reads).sum(dim=0).detach(), best.images[best.scores.argmax()].flatten()


def _mixed(
    parts: Tensor, images: Tensor, show: Tensor, dtype: torch.dtype
) -> tuple[Decoder, float]:
    """Solve for v and b; every pixel of every round is an equation in v."""
    mean, base = parts.mean(dim=0), images.mean(dim=0)
    parts, wanted = parts - mean, images - base
    likeness = torch.einsum("rud,rvd->uv", parts, parts)
    ridge = MIX * likeness.diagonal().mean().clamp_min(1e-30) * torch.eye(len(likeness)).to(parts)
    mix = torch.linalg.solve(likeness + ridge, torch.einsum("rud,rd->u", parts, wanted))
    left = torch.einsum("u,rud->rd", mix, parts) - wanted
    decoder = Decoder(mix.to(dtype), show.to(dtype), (base - mix @ mean).to(dtype))
    return decoder, float(left.square().mean())
