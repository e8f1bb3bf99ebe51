"""Optimizers over T independent problems at once: variables ``[T, n]``, stepped in place.

No step of one problem depends on another, and none waits for the device: a problem that went
astray (not finite) stays astray without touching its neighbors.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from strategies.attacks.optimization.schedules import constant


class Optimizer(ABC):
    """Steps variables along their gradient."""

    @abstractmethod
    def step(self, variables: Tensor, gradient: Tensor, progress: float) -> None:
        """Change ``variables`` ``[T, n]`` in place; ``progress`` in ``[0, 1)`` is of iterations."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Forget all problems but these."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what it remembers, for :meth:`restore`."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what another of its kind remembered."""


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), on the sign of the gradient where ``signed``.

    Parameters
    ----------
    lr : float
    signed : bool
    schedule : callable
        Factor of the rate by share of iterations done.
    betas : tuple of float
    decay : float
        Of the variables themselves, beside the gradient (AdamW, Loshchilov and Hutter 2019).
    """

    epsilon = 1e-8

    def __init__(
        self,
        lr: float,
        signed: bool,
        schedule: Callable[[float], float] = constant,
        betas: tuple[float, float] = (0.9, 0.999),
        decay: float = 0.0,
    ) -> None:
        self.lr, self.signed, self.schedule = lr, signed, schedule
        self.betas, self.decay = betas, decay
        self.steps = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def step(self, variables: Tensor, gradient: Tensor, progress: float) -> None:
        """Take one step; overwrites ``gradient``."""
        if self.signed:
            gradient.sign_()
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(variables), torch.zeros_like(variables)
        self.steps += 1
        slow, slower = self.betas
        self.first.lerp_(gradient, 1 - slow)
        self.second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        rate = self.lr * self.schedule(progress) / (1 - slow**self.steps)
        spread = (self.second / (1 - slower**self.steps)).sqrt_().add_(self.epsilon)
        if self.decay:
            variables.mul_(1 - self.lr * self.schedule(progress) * self.decay)
        variables.addcdiv_(self.first, spread, value=-rate)

    def keep(self, rows: Tensor) -> None:
        """Forget all problems but these."""
        if self.first is not None and self.second is not None:
            self.first, self.second = self.first[rows], self.second[rows]

    def state(self) -> dict[str, Tensor]:
        """Return both moments and the number of steps."""
        if self.first is None or self.second is None:
            return {}
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from both moments."""
        if state:
            self.first, self.second = state["first"].clone(), state["second"].clone()
            self.steps = int(state["steps"])


class Langevin(Optimizer):
    """Another optimizer, with normal noise on the variables after each step (Yin et al. 2021).

    Parameters
    ----------
    inner : Optimizer
    scale : callable
        Standard deviation of the noise by share of iterations done.
    generators : sequence of torch.Generator
        One for each problem, so that its noise does not depend on what runs beside it; on the CPU.
    """

    def __init__(
        self,
        inner: Optimizer,
        scale: Callable[[float], float],
        generators: Sequence[torch.Generator],
    ) -> None:
        self.inner, self.scale, self.generators = inner, scale, list(generators)

    def step(self, variables: Tensor, gradient: Tensor, progress: float) -> None:
        """Step, then add noise."""
        self.inner.step(variables, gradient, progress)
        size = variables.shape[1]
        noise = torch.stack([torch.randn(size, generator=each) for each in self.generators])
        variables.add_(noise.to(variables), alpha=self.scale(progress))

    def keep(self, rows: Tensor) -> None:
        """Forget all problems but these."""
        self.inner.keep(rows)
        self.generators = [self.generators[row] for row in rows.tolist()]

    def state(self) -> dict[str, Tensor]:
        """Return the inner optimizer's, and where the noise of each problem is."""
        noise = torch.stack([each.get_state() for each in self.generators])
        return {**self.inner.state(), "noise": noise}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the same noise, for as many problems as there were left."""
        inner = dict(state)
        self.generators = [
            torch.Generator().set_state(of_one.clone()) for of_one in inner.pop("noise").cpu()
        ]
        self.inner.restore(inner)


class LBFGS(Optimizer):
    """L-BFGS without a line search (Liu and Nocedal 1989), as ``torch.optim.LBFGS`` defaults do.

    Each problem has a history of its own; a pair without curvature (``y.s <= 1e-10``) keeps its
    place in the history and has no effect.  Pairs are kept divided by ``sqrt(y.s)``, which takes
    their curvature out of both loops.
    """

    def __init__(self, lr: float = 1.0, history: int = 100) -> None:
        self.lr = lr
        self.pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=history)
        self.scale: Tensor | None = None
        self.before: Tensor | None = None
        self.moved: Tensor | None = None

    def step(self, variables: Tensor, gradient: Tensor, progress: float) -> None:  # noqa: ARG002
        """Take one step of the two-loop recursion."""
        if self.before is None or self.moved is None or self.scale is None:
            length = gradient.abs().sum(dim=1, keepdim=True)
            self.moved = -gradient * (1 / length).clamp_max(1.0) * self.lr
            self.scale = torch.ones_like(length)
        else:
            self.scale = self._remember(gradient - self.before, self.moved, self.scale)
            self.moved = self._direction(gradient, self.scale).mul_(self.lr)
        self.before = gradient
        variables.add_(self.moved)

    def _remember(self, y: Tensor, s: Tensor, scale: Tensor) -> Tensor:
        """Keep a pair, and return the new scale of the first guess of the inverse Hessian."""
        curvature, square = _dot(y, s), _dot(y, y)
        bent = curvature > 1e-10
        share = torch.where(bent, curvature.rsqrt(), 0)
        self.pairs.append((s * share, y * share))
        return torch.where(bent, curvature / square, scale)

    def _direction(self, gradient: Tensor, scale: Tensor) -> Tensor:
        direction = -gradient
        shares = []
        for s, y in reversed(self.pairs):
            share = _dot(s, direction)
            direction.addcmul_(y, share, value=-1)
            shares.append(share)
        direction.mul_(scale)
        for (s, y), share in zip(self.pairs, reversed(shares), strict=True):
            direction.addcmul_(s, share - _dot(y, direction))
        return direction

    def keep(self, rows: Tensor) -> None:
        """Forget all problems but these."""
        if self.before is None or self.moved is None or self.scale is None:
            return
        self.before, self.moved, self.scale = (
            self.before[rows],
            self.moved[rows],
            self.scale[rows],
        )
        kept = [(s[rows], y[rows]) for s, y in self.pairs]
        self.pairs = deque(kept, maxlen=self.pairs.maxlen)

    def state(self) -> dict[str, Tensor]:
        """Return the last step and the history, newest last."""
        if self.before is None or self.moved is None or self.scale is None:
            return {}
        state = {"before": self.before, "moved": self.moved, "scale": self.scale}
        for name, column in zip(("s", "y"), zip(*self.pairs, strict=True), strict=False):
            state[name] = torch.stack(column)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the same history."""
        if not state:
            return
        self.before, self.moved, self.scale = (
            state[name].clone() for name in ("before", "moved", "scale")
        )
        if "s" in state:
            columns = (state[name].clone() for name in ("s", "y"))
            self.pairs = deque(zip(*columns, strict=True), maxlen=self.pairs.maxlen)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of each row ``[T, n]`` with its like, ``[T, 1]``."""
    if len(one) == 1:  # one operation instead of two
        return torch.mm(one, other.mT)
    product: Tensor = torch.linalg.vecdot(one, other)
    return product.unsqueeze(1)
