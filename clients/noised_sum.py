"""DP-SGD's step, whatever it is that is clipped: sample, clip every example's gradient, add noise.

    g = (sum_i clip(g_i) + N(0, (sigma C)^2 I)) / (q n)

(Abadi et al., CCS 2016, Alg. 1).  Each example is drawn by itself with probability q, from the
secret stream; batches of a shuffled epoch are no such sample, and their epsilon is not this one.
The divisor is the expected batch size ``q n``, and that is what the client says its update is of:
how many were drawn is private.  A batch may be empty; then its gradient is noise.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clients.defenses.perturbation.clip import Norm
from clients.ledger import Accounted, rounds_done
from clients.noise import StdOrNone, noised
from clients.per_example import per_example_gradients
from fedsim.accounting import Release, Releases
from fedsim.defense import Batch, ClientContext, Place, Tensors, TrainingPlan
from fedsim.models import group_normalized, mixing_layers


@dataclass(frozen=True, kw_only=True)
class NoisedSum(Accounted):
    """A step's gradient is a noised sum over single examples.

    Parameters
    ----------
    norm : float
        ``C``: the L2 norm to which gradients are clipped.
    sigma : float
        Noise of the sum, in units of ``norm``.
    """

    unit: ClassVar[Literal["client", "example"]] = "example"

    norm: Norm = 1.0
    sigma: StdOrNone = 1.0

    @abstractmethod
    def clip(self, gradients: Tensors) -> Tensors:
        """Return gradients ``[B, *shape]`` by name, each example's of bounded norm."""

    @abstractmethod
    def multiplier(self, tensors: int) -> float:
        """Return noise over sensitivity of a sum over ``tensors`` arrays' gradients."""

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002 - both kinds will do
        """Refuse layers that let the examples of a batch touch each other."""
        if found := mixing_layers(model):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(
                f"the model's {found[0]}{more} normalizes over the batch: no example has a "
                "gradient of its own; use a model with GroupNorm (resnet20(norm='group'), "
                "group-normalized(of='...')); fedsim fix FILE says which"
            )

    def fitting(self, model: str, network: nn.Module) -> str:
        """Return the model with GroupNorm in the place of BatchNorm."""
        return group_normalized(model) if mixing_layers(network) else model

    def weight(self, plan: TrainingPlan) -> int:
        """Return the expected number of examples."""
        return min(plan.examples, plan.steps * plan.batch_size)

    def sampler(
        self, batches: Iterable[Tensor], examples: int, ctx: ClientContext
    ) -> Iterator[Tensor]:
        """Draw as many batches anew, each example by itself."""
        generator = ctx.secret(self.name, "sample", ctx.round, rounds_done(ctx, self.name))
        for _ in batches:
            drawn = torch.rand(examples, generator=generator) < ctx.plan.sample_rate
            yield drawn.nonzero().flatten()

    def gradients(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensors:
        """Return the noised sum of clipped gradients, over the expected batch size."""
        total = {
            name: torch.zeros_like(p, requires_grad=False)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        for gradients in per_example_gradients(model, batch, alone=True):
            for name, each in self.clip(gradients).items():
                total[name] += each.sum(dim=0)
        sent = noised(total, self.sigma * self.norm, self.noise(ctx))
        expected = ctx.plan.sample_rate * ctx.plan.examples
        return {name: tensor / expected for name, tensor in sent.items()}

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Change nothing more; the round is over, and goes into the ledger."""
        self.spend(ctx)
        return update

    def norm_bound(self, at: Place, entering: float | None) -> float | None:  # noqa: ARG002
        """Return what entered: only noise was added, before there was a bound."""
        return entering

    def releases(self, plan: TrainingPlan, before: int) -> Releases:  # noqa: ARG002 - all alike
        """Every local step is one release of a sum over a sample."""
        return (Release(self.multiplier(plan.tensors), plan.sample_rate, plan.steps),)


def scaled(gradient: Tensor, norms: Tensor, norm: float) -> Tensor:
    """Return gradients ``[B, *shape]`` of ``norms`` ``[B]`` scaled to at most ``norm``.

    One that is not finite counts as none: a model that is made to overflow must not mark whom it
    overflows on.
    """
    rounding = 1 - 4 * torch.finfo(gradient.dtype).eps
    factors = (norm / norms).clamp(max=1).where(norms <= norm, norm / norms * rounding)
    finite = norms.isfinite().view(-1, *[1] * (gradient.dim() - 1))
    factors = factors.to(gradient.dtype).view(finite.shape)
    return torch.where(finite, gradient * factors, 0)


def norms_of(gradient: Tensor) -> Tensor:
    """Return the L2 norm of each example's gradient, ``[B]`` float64."""
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
    return norms
