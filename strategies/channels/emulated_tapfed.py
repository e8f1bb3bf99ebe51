"""TAPFed, emulated: several aggregators of whom t must ask for the same weighted sum.

TAPFed (Xu, Li, Joshi et al., IEEE TDSC 2024) encrypts uploads for threshold multi-client functional
encryption of inner products: each of several aggregators can compute a share of ``sum_i w_i x_i``
for the weights w that it asks for, t shares for the same w give the sum, and fewer, or for other
weights, nothing.  No aggregator sees an upload or an intermediate sum.

**Emulated**: what is here is the ideal functionality, without any encryption.  Somebody trusted
holds the uploads of a round and answers once, to ::

    released  if  t or more of the aggregators ask for one and the same w,
                  n_min or more clients have a positive weight, none a negative one,
                  no client has more than largest_share of all weight
    nothing   otherwise

The last two keep single uploads in: weights like ``(1, 0, 0, ...)`` are the disaggregation that an
inner product alone would answer.  A round is answered once, so that two requests cannot be
subtracted from each other.  Aggregators ask for the federation's weights, the numbers of examples;
so many as ``dishonest`` says ask for one client alone instead.  Cost in time and bytes is not
emulated (the paper's abstract tells of 29 to 45 % less traffic than its baselines).

**What it does not promise**: privacy beyond a sum's, and nothing once t aggregators collude with
whoever lets sums of one through.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from pydantic import Field

from fedsim.channel import Channel
from fedsim.population import Population, client_of
from fedsim.registry import register
from strategies.channels.trusted_sum import SUMS, TrustedSumGrid, refuse_alone

Weights = Mapping[int, float]  # by client


class NotReleased(Exception):  # noqa: N818 - the functionality's answer, not its error
    """What is said instead of a sum."""


@register("channel", "emulated-tapfed")
@dataclass(frozen=True, kw_only=True)
class EmulatedTapfed(Channel):
    """Emulated: a trusted sum that enough aggregators ask for, of enough clients.

    Parameters
    ----------
    aggregators : int
        How many there are.
    threshold : int
        How many must ask for the same weights: more than half.
    dishonest : int
        How many ask for one client's upload instead.
    min_cohort : int
        Among how many a client wants to be summed.
    largest_share : float
        The most of all weight that one client may have.
    """

    aggregators: Annotated[int, Field(ge=2)] = 5
    threshold: Annotated[int, Field(ge=2)] = 3
    dishonest: Annotated[int, Field(ge=0)] = 0
    min_cohort: Annotated[int, Field(ge=2)] = 3
    largest_share: Annotated[float, Field(gt=0, lt=1)] = 0.9

    strengths: ClassVar[tuple[str, ...]] = (
        "emulated-tapfed(min_cohort=2)",
        "emulated-tapfed(min_cohort=3)",
        "emulated-tapfed(min_cohort=4)",
    )
    adversary: ClassVar[str] = SUMS
    aggregates = True

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: ARG002
        """Refuse cohorts that are too small, and thresholds that two groups could reach."""
        refuse_alone(clients)
        if clients < self.min_cohort:
            raise ValueError(
                f"{clients} clients train in a round and min_cohort={self.min_cohort}: nothing "
                f"would be released; use more clients, or a lower min_cohort"
            )
        if self.largest_share < 1 / clients:
            raise ValueError(
                f"of {clients} clients one has at least {1 / clients:.3g} of all weight, and "
                f"largest_share={self.largest_share:g}: nothing would be released; let it be more"
            )
        if not self.aggregators < 2 * self.threshold <= 2 * self.aggregators:
            raise ValueError(
                f"threshold={self.threshold} of {self.aggregators} aggregators; let it be more "
                f"than half, {self.aggregators // 2 + 1} to {self.aggregators}"
            )
        if self.dishonest > self.aggregators:
            raise ValueError(f"of {self.aggregators} aggregators {self.dishonest} are dishonest")

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:  # noqa: ARG002
        """Return a grid that releases what aggregators may have."""
        return TapfedGrid(inner, timeout, self)

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass the message on: encryption is emulated."""
        return call_next(msg, context)

    def released(self, requests: Sequence[Weights]) -> Weights:
        """Return the weights that are answered.

        Raises
        ------
        NotReleased
            Saying why none are.
        """
        asked, agreeing = Counter(tuple(sorted(one.items())) for one in requests).most_common(1)[0]
        if agreeing < self.threshold:
            raise NotReleased(
                f"{agreeing} of {len(requests)} aggregators agree on the weights, "
                f"{self.threshold} must"
            )
        weights = dict(asked)
        if not all(weight >= 0 for weight in weights.values()):
            raise NotReleased("a weight is negative, or no number")
        if (positive := sum(weight > 0 for weight in weights.values())) < self.min_cohort:
            raise NotReleased(f"the weights are of {positive} clients, {self.min_cohort} must be")
        if (share := max(weights.values()) / sum(weights.values())) > self.largest_share:
            raise NotReleased(f"one client has {share:.3g} of all weight")
        return weights

    def figures(self) -> dict[str, Any]:
        """Return who must agree."""
        return {
            "emulated": "the ideal functionality: no encryption, no cost",
            "aggregators": self.aggregators,
            "threshold": self.threshold,
            "dishonest": self.dishonest,
        }


@dataclass
class TapfedGrid(TrustedSumGrid):
    """Answers a round of training with the mean, where aggregators may have it."""

    settings: EmulatedTapfed

    def begin(self, messages: list[Message]) -> list[Message]:
        """Start from nothing."""
        self.weights: dict[int, float] = {}
        return super().begin(messages)

    def take(self, reply: Message, asked: Message) -> str | None:
        """Add one upload, and remember its weight."""
        reason = super().take(reply, asked)
        if reason is None:
            told = reply.content.metric_records["metrics"]["num-examples"]
            self.weights[client_of(reply.metadata.src_node_id)] = float(cast(int, told))
        return reason

    def release(self, asked: list[Message]) -> list[Message]:
        """Let the aggregators ask, and return what is released."""
        if not self.weights:
            return []
        honest = self.settings.aggregators - self.settings.dishonest
        alone = {client: float(client == min(self.weights)) for client in self.weights}
        try:
            self.settings.released([self.weights] * honest + [alone] * self.settings.dishonest)
        except NotReleased as refusal:
            self.inner.ledger.fail(None, f"TAPFed released nothing: {refusal}")
            return []
        return super().release(asked)
