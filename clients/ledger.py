"""One client's privacy ledger: what it released so far, what that cost, and when it stops.

The ledger is kept in the client's persistent state, one for each formal defense, as rows of
(noise multiplier, sampling rate, count, pure epsilon): epsilon is computed from the whole list at
any time, so that two rounds with restored state are one long run.  It counts what was released,
whatever the server calls its rounds.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from fedsim.accounting import Release, Releases, check_delta, epsilon, exceeds, merged
from fedsim.attack import Setting
from fedsim.defense import (
    Batch,
    ClientContext,
    Defense,
    Place,
    Privacy,
    Tensors,
    TrainingPlan,
    Verdict,
)

SPENT = "its privacy budget is spent"
FORGOTTEN = (
    "a client whose SuperNode is started anew has its whole budget again, unless state='...' of "
    "its node config keeps what was spent"
)


def released(ctx: ClientContext, name: str) -> Releases:
    """Return what this client released under the defense ``name``, in this run."""
    rows = ctx.store.get(_key(name))
    if rows is None:
        return ()
    return tuple(Release(float(z), q, int(count), pure) for z, q, count, pure in rows.tolist())


def record(ctx: ClientContext, name: str, releases: Releases) -> None:
    """Add releases to the ledger."""
    rows = [[r.multiplier, r.rate, r.count, r.pure] for r in merged(released(ctx, name) + releases)]
    ctx.store[_key(name)] = torch.tensor(rows, dtype=torch.float64)


def _key(name: str) -> str:
    return f"ledger/{name}"


@dataclass(frozen=True, kw_only=True)
class Accounted(Defense):
    """A defense with a formal guarantee: it keeps a ledger, and stops when its budget is spent.

    Parameters
    ----------
    delta : float
        The delta at which epsilon is told.
    budget : float or None
        The epsilon that a client never exceeds in a run: it refuses a round that would.
    """

    #: Whose data the guarantee is about.
    unit: ClassVar[Literal["client", "example"]] = "client"

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    budget: Annotated[float, Field(gt=0)] | None = None

    def check_setting(self, setting: Setting) -> None:
        """Refuse a delta of one over the number of units: of clients, or of a client's examples."""
        number = max(setting.examples) if self.unit == "example" else setting.clients
        check_delta(self.delta, number, self.unit)

    @abstractmethod
    def releases(self, plan: TrainingPlan, before: int) -> Releases:
        """Return what one round of ``plan`` releases, after ``before`` rounds."""

    @abstractmethod
    def guarantee(self, epsilon: float, plan: TrainingPlan) -> Privacy:
        """Return what an epsilon over the whole run is about."""

    def inspect(
        self,
        model: nn.Module,  # noqa: ARG002 - what is asked does not matter, only that it is
        received: Tensors,  # noqa: ARG002
        probe: Batch,  # noqa: ARG002
        ctx: ClientContext,
    ) -> Verdict:
        """Refuse a round that would exceed the budget; the reason tells nothing of the data."""
        if (most := self.most()) is not None:
            coming = self.releases(ctx.plan, rounds_done(ctx, self.name))
            if exceeds(released(ctx, self.name) + coming, self.delta, most):
                return Verdict(accept=False, reason=f"{SPENT} (epsilon {most:g})")
        return Verdict(accept=True)

    def most(self) -> float | None:
        """Return the epsilon that a client never exceeds; None where there is no end."""
        return self.budget

    def spend(self, ctx: ClientContext) -> None:
        """Enter this round in the ledger, and tell the auditor what stands there."""
        done = rounds_done(ctx, self.name)
        record(ctx, self.name, self.releases(ctx.plan, done))
        ctx.store[_rounds(self.name)] = torch.tensor([done + 1])
        ctx.effect(self).releases = released(ctx, self.name)

    def noise(self, ctx: ClientContext) -> torch.Generator:
        """Return the generator of this step's noise.

        Named by the ledger's own count of rounds too: a server that calls two rounds by one number
        must not get the same noise twice, and subtract it.
        """
        return ctx.secret(self.name, ctx.round, rounds_done(ctx, self.name), ctx.step)

    def privacy(
        self,
        plan: TrainingPlan,
        entering: Mapping[Place, float | None],  # noqa: ARG002 - each clips by itself
    ) -> Privacy | None:
        """Return epsilon of a client that takes part in every round, and how long a budget binds.

        Whether its SuperNode keeps state, nobody but the SuperNode knows.
        """
        every = tuple(r for done in range(plan.rounds) for r in self.releases(plan, done))
        promised = self.guarantee(epsilon(every, self.delta), plan)
        if self.budget is None:
            return promised
        return replace(promised, mechanism=f"{promised.mechanism}; {FORGOTTEN}")


@dataclass(frozen=True, kw_only=True)
class NoisedUpdate(Accounted):
    """One that clips the update, and adds noise to it."""

    @property
    def noises(self) -> Place:
        """The upload, which it clips before."""
        return "update"

    @property
    def clips(self) -> Place:
        """The upload."""
        return "update"

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return None after the noise: it has no bound."""
        return entering if at == "gradient" else None


def rounds_done(ctx: ClientContext, name: str) -> int:
    """Return in how many rounds this client released something under the defense ``name``."""
    count = ctx.store.get(_rounds(name))
    return 0 if count is None else int(count[0])


def _rounds(name: str) -> str:
    return f"rounds/{name}"
