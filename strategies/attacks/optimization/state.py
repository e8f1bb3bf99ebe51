"""What parts of a search remember between iterations, as tensors by name: what checkpoints hold."""

from collections.abc import Mapping

from torch import Tensor


class Stateful:
    """Something that may remember; this one does not."""

    def state(self) -> dict[str, Tensor]:
        """Return what it remembers, for :meth:`restore`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what another of its kind remembered."""


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several parts as one mapping, each named ``part.tensor``."""
    return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def inside(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of one part of what :func:`joined` returned."""
    start = f"{part}."
    return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
