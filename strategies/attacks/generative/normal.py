"""Least squares on what comes in pieces and would be too much at once."""

import torch
from torch import Tensor


class NormalEquations:
    """Ridge regression of y ``[D]`` on x ``[F]``, both less their means, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._moments: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows ``[N, F]`` and ``[N, D]``."""
        x, y = x.double(), y.double()
        moments = [x.sum(dim=0), y.sum(dim=0), x.T @ x, x.T @ y]
        self._moments = (
            [a + b for a, b in zip(self._moments, moments, strict=True)] if self.count else moments
        )
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """``[F]``: the mean of x."""
        return self._moments[0] / self.count

    @property
    def target(self) -> Tensor:
        """``[D]``: the mean of y."""
        return self._moments[1] / self.count

    def solve(self, strength: float) -> Tensor:
        """Return ``W`` ``[F, D]`` of ``y = target + (x - mean) W``.

        ``strength`` is the ridge's, against the mean variance of x (at least the smallest number
        there is, so that what never varies gets no weight).
        """
        _, _, square, cross = self._moments
        covariance = square / self.count - torch.outer(self.mean, self.mean)
        ridge = strength * covariance.diagonal().mean().clamp_min(1e-30)
        ridged = covariance + ridge * torch.eye(len(covariance)).to(covariance)
        solved: Tensor = torch.linalg.solve(
            ridged, cross / self.count - torch.outer(self.mean, self.target)
        )
        return solved
