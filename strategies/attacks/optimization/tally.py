"""What an attack by optimization has done so far: told, kept for another attempt, handed over."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.attack import Cost, Reconstruction
from fedsim.threat import Knowledge
from strategies.attacks.optimization.matching import Best, Run, Watch
from strategies.attacks.optimization.parametrizations import Parametrization

# Seconds between two words on progress, and between two checkpoints.
TELL_EVERY = 0.5
KEEP_EVERY = 20.0
# Goes up when what a checkpoint holds changes: one of before is not found.
KEPT = "matching-2"


class Tally:
    """Iterations of single problems, evaluations and receipts of a whole attack.

    Batches of restarts come in the same order whenever the attack is run on the same views: their
    numbers say which of them an earlier attempt had finished, and their jobs whether it is the same
    one (another device runs more at once).

    Parameters
    ----------
    total : int
        Iterations that there are to do, over all problems.
    knowledge : Knowledge
    """

    def __init__(self, total: int, knowledge: Knowledge) -> None:
        self.total, self.knowledge = total, knowledge
        self.done = self.evaluations = self.batches = 0
        self.receipts: list[str] = []
        self.stopped = False
        self.told, self.saved = -TELL_EVERY, time.monotonic()
        self.earlier = knowledge.kept(KEPT)
        self.finished: dict[str, Tensor] = {}
        if self.earlier:
            self.receipts.append("went on from the checkpoint of an attempt that was cut off")

    @contextmanager
    def batch(
        self, jobs: Sequence[object], iterations: int, device: torch.device
    ) -> Iterator["Batch"]:
        """Count and keep one batch of restarts, while it runs; ``jobs`` tell them apart."""
        start = f"{self.batches}-{hashlib.sha256(repr(jobs).encode()).hexdigest()[:12]}."
        kept = {
            name.removeprefix(start): tensor.to(device)
            for name, tensor in self.earlier.items()
            if name.startswith(start)
        }
        batch = Batch(self, start, kept)
        yield batch
        self.batches += 1
        self.done += len(jobs) * iterations
        if batch.finished is None:
            return
        self.evaluations += batch.finished.evaluations
        for name, tensor in batch.finished.state().items():
            self.finished[f"{start}done.{name}"] = tensor.cpu()

    def tell(self, iteration: int, problems: int, best: Tensor) -> None:
        """Report progress and the best distance, unless that was just done."""
        if time.monotonic() - self.told < TELL_EVERY:
            return
        self.told = time.monotonic()
        text = f"distance {best.min().item():.3g}"
        if problems > 1:
            text += f" (best of {problems} at once, median {best.median().item():.3g})"
        self.knowledge.progress(self.done + iteration * problems, self.total, text)

    def keep(self, start: str, run: Run) -> None:
        """Keep what is done, for an attempt after this one, unless that was just done."""
        if time.monotonic() - self.saved < KEEP_EVERY:
            return
        self.saved = time.monotonic()
        state = {f"{start}{name}": t.cpu() for name, t in run.state().items()}
        self.knowledge.keep(KEPT, {**self.finished, **state})


@dataclass
class Batch(Watch):
    """One batch of restarts as it runs: what an earlier attempt left of it, and its end."""

    tally: Tally
    start: str
    kept: Mapping[str, Tensor]
    finished: Best | None = field(init=False)

    def __post_init__(self) -> None:
        done = {k.removeprefix("done."): t for k, t in self.kept.items() if k.startswith("done.")}
        self.finished = Best.restored(done) if done else None

    @property
    def earlier(self) -> Mapping[str, Tensor] | None:
        """Where an earlier attempt was."""
        return self.kept or None

    def __call__(self, run: Run) -> bool:
        """Tell, keep, and say whether somebody wants the best so far."""
        self.tally.tell(run.iteration, len(run.rows), run.part.distance)
        self.tally.keep(self.start, run)
        if self.tally.knowledge.stopping and not self.tally.stopped:
            self.tally.stopped = True
            self.tally.receipts.append(
                f"stopped by hand at iteration {run.iteration}: this is the best so far"
            )
        return self.tally.stopped


@dataclass
class Findings:
    """Candidates of all groups of views, as they come."""

    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def add(self, best: Best, parametrization: Parametrization, indices: Sequence[int]) -> None:
        """Add the best restart of each view of a group, where there is one."""
        alive = best.distance.isfinite().nonzero().squeeze(1)
        if not len(alive):
            return
        images, labels = parametrization.take(alive).finish(best.variables[alive])
        size, alive = images.shape[1], alive.cpu()
        self.images.append(images.flatten(0, 1).detach().cpu())
        self.labels.append(labels.flatten().cpu())
        self.views.append(torch.tensor(indices)[alive].repeat_interleave(size))
        self.scores.append(-best.distance.cpu()[alive].repeat_interleave(size))

    def reconstruction(self, tally: Tally) -> Reconstruction:
        """Hand over everything; batches that fell out have nothing in it."""
        tally.knowledge.progress(tally.total, tally.total, "")
        nothing = torch.empty(0, dtype=torch.int64)
        return Reconstruction(
            examples=torch.cat(self.images) if self.images else torch.empty(0, 1, 1, 1),
            views=torch.cat(self.views) if self.views else nothing,
            labels=torch.cat(self.labels) if self.labels else nothing,
            scores=torch.cat(self.scores) if self.scores else torch.empty(0),
            cost=Cost(gradient_evaluations=tally.evaluations),
            receipts=tuple(tally.receipts),
        )
