"""RoFL, emulated: a secure sum that only takes uploads whose norm is proven to be within bounds.

RoFL (Lycklama, Burkhalter, Viand, Küchler, Hithnawi, IEEE S&P 2023) has each client commit to the
upload that it masks, and prove in zero knowledge that ::

    max |u| <= linf      and / or      |u|_2 <= l2

with u the gradient, or what training changed of the weights; whoever cannot is left out of the sum.
It guards the *server against clients* (one upload cannot outweigh the others), and makes a norm
bound that formal privacy at the server stands on an enforced one.

**Emulated**: there are no commitments and no proofs.  An oracle looks at the upload in the clear,
says yes or no, and a trusted sum (``trusted_sum.py``) adds what passed.  What the server learns is
what it would: the sum, who is in it, who was turned away.  What the protocol costs in time and
bytes is neither spent nor told: the authors' prototype is Rust, and no model of its cost is at
hand.

**What it does not promise**: privacy beyond a sum's.  A server that reads sums (imprints, traps)
reads this one; an attack that turns gradients up to survive rounding runs into the bound.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from pydantic import Field

from fedsim import registry
from fedsim.channel import Channel
from fedsim.models import is_buffer
from fedsim.population import Population
from fedsim.registry import register
from strategies.channels.trusted_sum import TrustedSumGrid, refuse_alone

ROUNDING = 1 + 1e-5  # what was clipped to the bound in single precision is within it


@register("channel", "emulated-rofl")
@dataclass(frozen=True, kw_only=True)
class EmulatedRofl(Channel):
    """Emulated: a trusted sum of the uploads whose norms an oracle finds within bounds.

    Parameters
    ----------
    l2 : float or None
        Bound on the Euclidean norm of all that is uploaded.
    linf : float or None
        Bound on each of its values.
    """

    l2: Annotated[float, Field(gt=0)] | None = None
    linf: Annotated[float, Field(gt=0)] | None = None

    #: What the oracle saw: for the auditor, who alone is told norms.
    seen: "Seen" = field(default_factory=lambda: Seen(), init=False, repr=False, compare=False)

    strengths: ClassVar[tuple[str, ...]] = (
        "emulated-rofl(l2=1000.0)",
        "emulated-rofl(l2=5.0)",
        "emulated-rofl(l2=1.0)",
    )
    adversary: ClassVar[str] = "robbing-the-fed(units=256, gain=1.0)"
    aggregates = True

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: ARG002
        """Refuse a cohort of one, and bounds that bind nobody."""
        refuse_alone(clients)
        if self.l2 is None and self.linf is None:
            raise ValueError("without a bound it is trusted-sum; write l2=1.0, or linf=, or both")

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:
        """Return a grid that looks at each upload before it is added."""
        local = str(context.run_config["federation.local"])
        kind = str(registry.build("local", local, "federation.local").kind)
        return RoflGrid(inner, timeout, self, kind)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass the message on: proofs are emulated."""
        return call_next(msg, context)

    def rejects(self, l2: float, linf: float) -> str | None:
        """Say which bound an upload of these norms is over, if any."""
        found = (("L2", l2, self.l2), ("L-infinity", linf, self.linf))
        over = [name for name, norm, most in found if most and not norm <= most * ROUNDING]
        return f"its upload is over the {' and the '.join(over)} bound" if over else None

    def figures(self) -> dict[str, Any]:
        """Return how many were turned away, and the largest norms that the oracle saw."""
        return {"emulated": "no commitments, no proofs, no cost", **vars(self.seen)}


@dataclass
class Seen:
    """How many uploads were turned away so far, and the largest norms of any."""

    rejected: int = 0
    largest_l2: float = 0.0
    largest_linf: float = 0.0


@dataclass
class RoflGrid(TrustedSumGrid):
    """Answers a round of training with the mean of the uploads within the bounds."""

    settings: EmulatedRofl
    kind: str

    def take(self, reply: Message, asked: Message) -> str | None:
        """Add an upload that is within the bounds."""
        upload, seen = reply.content.array_records.get("arrays", ArrayRecord()), self.settings.seen
        l2, linf = norms(upload, asked.content.array_records["arrays"], self.kind)
        if reason := self.settings.rejects(l2, linf):
            seen.rejected += 1
        seen.largest_l2 = float(np.fmax(seen.largest_l2, l2))
        seen.largest_linf = float(np.fmax(seen.largest_linf, linf))
        return reason or super().take(reply, asked)


def norms(upload: ArrayRecord, sent: ArrayRecord, kind: str) -> tuple[float, float]:
    """Return the L2 and the L-infinity norm of a gradient (of buffers the change), or a change."""
    squared = largest = 0.0
    for name, array in upload.items():
        values = array.numpy().astype(np.float64)
        if (kind != "gradient" or is_buffer(name)) and name in sent:
            start = sent[name].numpy()
            values = values - start if values.shape == start.shape else values
        squared += float((values**2).sum())
        largest = float(np.maximum(largest, np.abs(values).max(initial=0.0)))  # NaN stays
    return squared**0.5, largest
