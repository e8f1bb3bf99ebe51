"""PPFL, emulated: layers that are trained and aggregated where nobody looks.

PPFL (Mo, Haddadi, Katevas, Marin, Perino, Kourtellis, MobiSys 2021) trains layers inside the
clients' trusted execution environment (TrustZone) and averages them inside the server's (SGX).
What is inside is invisible to the devices' owners and to the server's: weights sent, updates, and
what goes into the average.

**Emulated**: there is no enclave.  The uploads of a round are averaged by somebody trusted
(``trusted_sum.py``), and of the layers ``start`` to ``end`` the server's view holds nothing:
neither what came back nor what was sent (zeros of their shapes stand for it, so that attack code
can build the model).  The federation's own strategy, which would run in the enclave too, goes on
with all of them.  Clients train all layers at once; the paper trains one after the other, for the
enclave's memory is small, and releases each when it is done.

**What it does not promise**: anything about layers outside, which leak as a sum does.  Side
channels of real enclaves are out of scope.  A server that manipulates what it sends is refused here
(``fedsim validate``): what runs in an enclave is attested.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from pydantic import Field

from fedsim.channel import HIDDEN, Channel
from fedsim.population import Population
from fedsim.registry import register
from strategies.channels.trusted_sum import TrustedSumGrid, refuse_alone


@register("channel", "emulated-ppfl")
@dataclass(frozen=True, kw_only=True)
class EmulatedPpfl(Channel):
    """Emulated: a trusted sum of which the server sees some layers only.

    Parameters
    ----------
    start : int
        The first layer inside, counting those that hold arrays from 0.
    end : int
        The last layer inside; negative counts from the last.
    """

    start: Annotated[int, Field(ge=0)] = 0
    end: int = 0
    #: Which arrays were inside in the last round.
    kept: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    strengths: ClassVar[tuple[str, ...]] = (
        "emulated-ppfl(start=1, end=1)",
        "emulated-ppfl(start=0, end=0)",
        "emulated-ppfl(start=0, end=1)",
    )
    adversary: ClassVar[str] = "inverting-gradients(iterations=200, tv=1e-2)"
    aggregates = True

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: ARG002
        """Refuse a cohort of one."""
        refuse_alone(clients)

    def check_model(self, names: Sequence[str], *, active: bool) -> None:
        """Refuse layers that do not exist, an enclave around all, a server that manipulates."""
        layers, inside = layers_of(names), self.inside(names)
        if not inside:
            raise ValueError(
                f"layers {self.start} to {self.end} are none of {len(layers)}: "
                f"{', '.join(layers)}; write start=0, end=0"
            )
        if len(inside) == len(names):
            raise ValueError(
                "with every layer inside the server sees nothing, and no attack could be judged; "
                "leave one outside"
            )
        if active:
            raise ValueError(
                "an enclave runs the model that was attested; an attack that changes it, or the "
                "protocol, needs another channel (trusted-sum)"
            )

    def inside(self, names: Sequence[str]) -> list[str]:
        """Return the arrays of the layers inside."""
        layers = layers_of(names)
        end = self.end + len(layers) if self.end < 0 else self.end
        hidden = set(layers[self.start : end + 1]) if end < len(layers) else set()
        return [name for name in names if name.rpartition(".")[0] in hidden]

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:  # noqa: ARG002
        """Return a grid whose answer says which arrays nobody sees."""
        return PpflGrid(inner, timeout, self)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass the message on: the enclave is emulated."""
        return call_next(msg, context)

    def figures(self) -> dict[str, Any]:
        """Return which arrays were inside."""
        return {"emulated": "no enclave, no cost", "hidden": ", ".join(self.kept)}


@dataclass
class PpflGrid(TrustedSumGrid):
    """Answers a round of training with the mean, and says what of it is the enclave's."""

    settings: EmulatedPpfl

    def release(self, asked: list[Message]) -> list[Message]:
        """Mark what the server does not see."""
        answers = super().release(asked)
        for answer in answers:
            hidden = self.settings.inside(list(asked[0].content.array_records["arrays"]))
            answer.content[HIDDEN] = ConfigRecord({"arrays": hidden})
            self.settings.kept[:] = hidden
        return answers


def layers_of(names: Sequence[str]) -> list[str]:
    """Return the layers that hold arrays, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
