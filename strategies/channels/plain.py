"""The plain channel: the server reads each upload as it was sent."""

from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid

from fedsim.channel import Channel
from fedsim.population import Population
from fedsim.registry import register


@register("channel", "plain")
@dataclass(frozen=True, kw_only=True)
class Plain(Channel):
    """Nothing stands between a client and the server."""

    def grid(self, inner: Population, context: Context, timeout: float) -> Grid:  # noqa: ARG002
        """Return the grid as it is."""
        return inner

    def client(self, msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Pass the message on."""
        return call_next(msg, context)
