"""Blind separation of the M inputs that a linear layer's weight gradient mixes.

For ``z = W x + b`` and M examples, ``dL/dW = A X`` with ``A`` ``[h, M]`` (each example's ``dL/dz``,
over M for a mean) and the inputs ``X`` ``[M, D]``: what microphones hear of M speakers in one room.
Kariyappa et al., "Cocktail Party Attack", ICML 2023, Sec. 4.

Whitening: of the rows centered over D, ``G_c G_c^T / (D - 1) = V L V^T``; the M largest give
``Q = L^-1/2 V^T`` ``[M, h]`` and ``Z = Q G``.  What is left to find is ``U`` ``[M, M]`` with rows
of length one: ``S = U Z`` holds each input up to its sign and size.  The bias gradient
``dL/db = A 1`` settles both without the truth: ``U Q A`` is (nearly) a scaled permutation, so that
the input is ``U Q dL/dW`` over ``U Q dL/db``.  (The authors' code takes the sign that fits the
truth.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

# An eigenvalue counts as somebody's when it is so many times the next beyond the M-th, which is
# nobody's: rounding, quantization or noise.
AUDIBLE = 2.0


@dataclass(frozen=True)
class Prior:
    """What inputs look like: the weights of the terms of :func:`separation_loss`."""

    negentropy: float
    decorrelation: float
    temperature: float
    smoothness: float = 0.0
    sparsity: float = 0.0
    one_sided: float = 0.0


@dataclass(frozen=True)
class Whitened:
    """``whitener`` ``Q`` ``[k, h]`` float64; ``gap``: the k-th eigenvalue over the one beyond."""

    whitener: Tensor
    gap: float


def whiten(gradient: Tensor, examples: int) -> Whitened:
    """Whiten ``dL/dW`` ``[h, D]``, float64; ``k <= examples`` directions stand out of the noise."""
    centered = gradient - gradient.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(centered @ centered.T / (gradient.shape[1] - 1))
    values, vectors = values.flip(0), vectors.flip(1)
    rounding = values[0] * torch.finfo(values.dtype).eps
    beyond = torch.maximum(values[examples], rounding) if examples < len(values) else rounding
    k = int((values[:examples] > AUDIBLE * beyond).sum())
    gap = float(values[k - 1] / beyond) if k else 0.0
    return Whitened(vectors[:, :k].T / values[:k, None].sqrt(), gap)


def separation_loss(
    unmixing: Tensor, white: Tensor, prior: Prior, roughness: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return the loss of rows of length one ``U`` ``[M, M]`` on ``Z`` ``[M, D]``, not centered.

    ``- a mean_i (mean_p log cosh S_c)^2``, negentropy: inputs are not Gaussian;
    ``+ b mean_i sum_{k != i} (exp(T |cos(U_i, U_k)|) - 1)``: no two rows find the same input (the
    paper has the mean over pairs; with the sum one weight serves for few and for many inputs);
    ``+ c TV(S)`` for images; ``+ d mean |S|`` for features, which are sparse;
    ``+ e mean_i min(||S_i^+||, ||S_i^-||)``: inputs have one sign.
    """
    sources = unmixing @ white
    centered = (sources - sources.mean(dim=1, keepdim=True)).abs()
    contrast = (centered + softplus(-2 * centered) - log(2)).mean(dim=1)
    likeness = (unmixing @ unmixing.T).abs()
    repulsion = (torch.exp(prior.temperature * likeness) - 1).fill_diagonal_(0)
    loss = (
        prior.decorrelation * repulsion.sum(dim=1).mean()
        - prior.negentropy * contrast.square().mean()
    )
    if prior.smoothness and roughness is not None:
        loss = loss + prior.smoothness * roughness(sources)
    if prior.sparsity:
        loss = loss + prior.sparsity * sources.abs().mean()
    if prior.one_sided:
        sides = sources.relu().norm(dim=1), (-sources).relu().norm(dim=1)
        loss = loss + prior.one_sided * torch.minimum(*sides).mean()
    return loss


def unmix(
    whitened: Tensor,
    prior: Prior,
    *,
    iterations: int,
    lr: float,
    roughness: Callable[[Tensor], Tensor] | None = None,
    tell: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Find ``U`` ``[M, M]`` by Adam from the identity, the rate falling on a cosine to zero.

    ``whitened`` is ``Z`` ``[M, D]``, ``roughness`` the total variation of sources ``[M, D]``.
    """
    free = torch.eye(len(whitened), dtype=whitened.dtype, device=whitened.device)
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for step in range(iterations):
        optimizer.zero_grad()
        separation_loss(normalize(free), whitened, prior, roughness).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            tell(step)
    return normalize(free).detach()


def total_variation(images: Tensor) -> Tensor:
    """Return mean ``|dx/dh|`` + mean ``|dx/dw|`` of images ``[N, C, H, W]``."""
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()
