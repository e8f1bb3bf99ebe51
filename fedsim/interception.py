"""What an attack on a channel's protocol is: a server that breaks the rules of its own channel.

The model that clients get is the honest one.  What is not honest is the protocol: the attack sits
between the server's side of it and the network, and holds what passes there, nothing else.
"""

from abc import abstractmethod
from dataclasses import dataclass

from flwr.app import Message
from torch import Tensor

from fedsim.attack import Active
from fedsim.threat import Knowledge


@dataclass(frozen=True)
class Upload:
    """One client's own upload, which the protocol should have hidden.

    ``received`` is as in a :class:`~fedsim.view.ServerView`; ``num_examples`` is its weight.
    """

    received: dict[str, Tensor]
    num_examples: int


class RoundTap:
    """One round's: what passes between the server's side of a protocol and the network.

    Both methods see a stage's messages of all clients at once; by default they change nothing.
    What is changed is a new message, so that the range can count to whom the server lied.
    """

    def outgoing(self, messages: list[Message]) -> list[Message]:
        """Return what clients are sent instead of what the protocol would send."""
        return messages

    def incoming(self, replies: list[Message]) -> list[Message]:
        """Return what the server's side of the protocol is told clients answered."""
        return replies

    def uploads(self) -> dict[int, Upload]:
        """Return, by client, the uploads that the round gave away; called when it is over."""
        return {}


class Interception(Active):
    """Active against the channel's protocol; ``needs`` must hold ``Capability.MANIPULATION``."""

    @abstractmethod
    def intercept(self, server_round: int, knowledge: Knowledge) -> RoundTap:
        """Return what sits on the line in this round."""
