"""What it costs an attack that it can be cut off: a look, a checkpoint, and finding one.

``python -m tests.benchmarks.being_cut_off``
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fedsim import registry
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import federated, told, watching

SIZES = {"1 MiB": 2**18, "64 MiB": 2**24}


def costs(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, float]:
    """Return seconds for one of each, in the attack's own process; the lowest of five."""
    looks = 20_000

    def look() -> None:
        for _ in range(looks):
            assert not knowledge.stopping

    found = {"a look at stopping": lowest(look) / looks}
    for size, numbers in SIZES.items():
        state = {"state": torch.rand(numbers)}

        def keep(state: dict[str, torch.Tensor] = state) -> None:
            knowledge.keep("state", state)
            knowledge.require(Capability.UPDATES)  # answered after it was written

        found[f"keep {size}"] = lowest(keep)
        found[f"kept {size}"] = lowest(lambda: knowledge.kept("state"))
    return found


def lowest(deed: object, times: int = 5) -> float:
    """Return the seconds of the fastest of some calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        deed()  # type: ignore[operator]
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Measure and print."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    attack = watching(costs)
    registry.components("attack")
    registry.register("attack", "watching")(attack)
    with tempfile.TemporaryDirectory() as folder:
        found = told(federated(Path(folder), {"attack": "watching"}))
    for what, seconds in found.items():
        print(f"{what}: {seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{what}: {seconds:.3f} s")


if __name__ == "__main__":
    from tests.benchmarks import being_cut_off  # the attack's process imports it by this name

    being_cut_off.main()
