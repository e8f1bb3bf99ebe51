"""What a channel is: it decides what of the uploads any strategy, honest or not, can read."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid

from fedsim.population import Population

#: The record of an answer that names the arrays nobody sees (``arrays``): the federation's own
#: strategy goes on with them where they are, and no server's view holds them.
HIDDEN = "hidden"


class Channel(ABC):
    """A pair: a ``Grid`` around the server's, and a mod around the client's training."""

    name: ClassVar[str]
    #: Whether a reply is one client's, or an aggregate of all of a round.
    aggregates: ClassVar[bool] = False
    #: Whether a reply is single, and still of several clients: then a client is in several.
    mixes: ClassVar[bool] = False
    #: Whether clients mask what they upload: then all upload one shape, and only the auditor can
    #: say what the sum lost.
    masks: ClassVar[bool] = False

    #: Whether values are rounded to a grid of the protocol's own, far coarser than their type's.
    quantizes: ClassVar[bool] = False

    #: As of a :class:`fedsim.defense.Defense`.
    strengths: ClassVar[tuple[str, ...]] = ()
    adversary: ClassVar[str] = ""
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {}

    def check(self, clients: int, largest_weight: int) -> None:  # noqa: B027 - most carry any
        """Refuse what the protocol cannot carry (``ValueError``).

        Parameters
        ----------
        clients : int
            How many train in a round.
        largest_weight : int
            The most examples that any of them will weigh in with.
        """

    def check_lightest(self, weight: int) -> None:  # noqa: B027 - most carry any
        """Refuse a federation whose lightest client's weight the protocol loses (``ValueError``).

        ``weight`` is how many examples that client will weigh in with.
        """

    def check_model(self, names: Sequence[str], *, active: bool) -> None:  # noqa: B027
        """Refuse a model, by the arrays that travel, or a server (``ValueError``).

        ``active`` says whether the server changes what clients get, or the protocol.
        """

    def carries(self, weight: int) -> float:  # noqa: ARG002 - most carry any
        """Return the largest magnitude of a value that is not cut off, in an upload's own units.

        ``weight`` is of how many examples the upload is.
        """
        return math.inf

    def shared(self) -> list[Path]:
        """Return the folders in which clients tell each other what the server must not touch.

        As :meth:`fedsim.defense.Defense.shared`: a run's clients write to ``<folder>/<run id>``,
        attack code is walled off from it, and what a run left there goes when it ends.
        """
        return []

    @abstractmethod
    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:
        """Return the grid through which the strategy sends and receives."""

    @abstractmethod
    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Act as a Flower mod around one client's training."""

    def figures(self) -> dict[str, Any]:
        """Return what the channel did so far, for the report."""
        return {}
