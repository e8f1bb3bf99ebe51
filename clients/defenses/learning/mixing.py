"""Training on convex mixtures of a client's own images: what MixUp and InstaHide share.

A batch of B examples becomes B mixtures ``x~_i = sum_j w_ij x_{p_ij}``, ``y~_i`` likewise of the
labels, one-hot.  ``p_i1`` is example i of the batch; its k - 1 partners are others of the client's
examples, never the same one twice.  Mixing among the client's examples and not within the batch is
what keeps a batch of one from mixing with itself.  Partners and weights come from the secret
stream, new in every step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from fedsim.attack import Setting
from fedsim.defense import Batch, ClientContext, Defense, TrainingPlan

Weights = Literal["dirichlet", "normal"]
# Below this product of cap and k hardly any draw of weights is under the cap.
ROOM = 1.3


@dataclass(frozen=True, kw_only=True)
class Mixing(Defense):
    """Mix each example with partners of the same client; the client counts its own batch.

    Parameters
    ----------
    k : int
        Images in a mixture.
    cap : float
        Largest weight that one image may have.
    weights : {"dirichlet", "normal"}
        Dirichlet(3, 1, ..., 1), so that the example itself leads, or ``|N(0, 1)|`` over its sum;
        both drawn again where one is above ``cap``.
    """

    k: Annotated[int, Field(ge=2, le=8)] = 4
    cap: Annotated[float, Field(gt=0, le=1)] = 0.65
    weights: Weights = "dirichlet"

    def __post_init__(self) -> None:
        if self.cap * self.k < ROOM:
            raise ValueError(
                f"{self.k} weights that sum to 1 are hardly ever all below {self.cap:g}; let cap "
                f"be at least {ROOM / self.k:.3f}"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse clients with fewer than ``k`` examples: there is nobody to mix with."""
        if (fewest := min(setting.examples)) < self.k:
            raise ValueError(
                f"a client holds {fewest} examples, and {self.k} are mixed: let k be at most "
                f"{fewest}, or give each client more"
            )

    def sampler(
        self, batches: Iterable[Tensor], examples: int, ctx: ClientContext
    ) -> Iterator[Tensor]:
        """Put each example's partners behind it: ``[B]`` becomes ``[B * k]``."""
        for number, batch in enumerate(batches):
            generator = ctx.secret(self.name, "partners", ctx.round, number)
            yield with_partners(batch, examples, self.k, generator)

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Mix images ``[B * k, C, H, W]`` and labels to B of each."""
        generator = ctx.secret(self.name, "weights", ctx.round, ctx.step)
        weights = drawn_weights(len(batch[1]) // self.k, self.k, self.cap, self.weights, generator)
        return mixed(batch[0], soft(batch[1], batch[0], ctx), weights)

    def weight(self, plan: TrainingPlan) -> int | None:
        """Return the examples of the batch, not their partners, where one batch is uploaded."""
        return min(plan.batch_size, plan.examples) if plan.kind == "gradient" else None


def with_partners(batch: Tensor, examples: int, k: int, generator: torch.Generator) -> Tensor:
    """Return each of ``[B]`` indices followed by k - 1 others below ``examples``, ``[B * k]``."""
    order = torch.rand(len(batch), examples, generator=generator)
    order[torch.arange(len(batch)), batch] = -1.0  # itself first, whatever comes after
    return order.topk(k, largest=False).indices.flatten()


def drawn_weights(
    rows: int, k: int, cap: float, kind: Weights, generator: torch.Generator
) -> Tensor:
    """Return ``[rows, k]`` float64 on the simplex, none above ``cap``."""
    weights = torch.empty(rows, k, dtype=torch.float64)
    missing = torch.arange(rows)
    while len(missing):
        weights[missing] = _once(len(missing), k, kind, generator)
        missing = missing[weights[missing].max(dim=1).values > cap]
    return weights


def _once(rows: int, k: int, kind: Weights, generator: torch.Generator) -> Tensor:
    if kind == "normal":
        raw = torch.randn(rows, k, generator=generator, dtype=torch.float64).abs()
    else:  # Gamma(1) is an exponential, Gamma(3) the sum of three
        raw = torch.empty(rows, k + 2, dtype=torch.float64).exponential_(generator=generator)
        raw = torch.cat([raw[:, :3].sum(dim=1, keepdim=True), raw[:, 3:]], dim=1)
    return raw / raw.sum(dim=1, keepdim=True)


def soft(labels: Tensor, images: Tensor, ctx: ClientContext) -> Tensor:
    """Return labels ``[B]`` as ``[B, K]`` one-hot in the images' type; soft ones as they are."""
    if labels.dim() == 2:
        return labels
    assert ctx.spec is not None
    return one_hot(labels, ctx.spec.num_classes).to(images.dtype)


def mixed(images: Tensor, labels: Tensor, weights: Tensor) -> Batch:
    """Mix groups of k: images ``[B * k, ...]``, labels ``[B * k, K]``, weights ``[B, k]``."""
    weights = weights.to(images)
    grouped = images.view(*weights.shape, *images.shape[1:])
    return (
        torch.einsum("bk,bk...->b...", weights, grouped),
        torch.einsum("bk,bkc->bc", weights, labels.view(*weights.shape, -1)),
    )
