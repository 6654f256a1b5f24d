"""The address at the other end of a channel, for whoever tells of it."""

from __future__ import annotations

from proxy.mux.core import MuxStream
from proxy.relay import SocketChannel
from proxy.stream import Channel


def peername_of(channel: Channel) -> tuple[str, int] | None:
    """Return address and port that the channel's connection came from; None when they are not known."""
    name: object = None
    if isinstance(channel, MuxStream):
        name = channel.peername()
    elif isinstance(channel, SocketChannel):
        name = channel.transport.get_extra_info("peername")
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) > 1 else None
