"""Which links to an instance are opened, and which are not."""

from __future__ import annotations

import asyncio
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.errors import ConnectFailed
from proxy.http2.frames import frame
from proxy.outbound_http2 import Http2Fleet, InstanceLease
from proxy.stream import Channel
from tests.security.test_http2_floods import Far


class Named:
    """An instance's key."""

    service, instance = "db", "db-1"


DB = Named()


class Session:
    """A session to an instance, whose links end nowhere."""

    def __init__(self) -> None:
        self.core = self
        self.opened: list[Far] = []

    def open(self, service: str, peer: Channel, fate: object) -> Far:
        far = Far()
        far.peer = peer
        self.opened.append(far)
        return far


async def test_an_instance_that_takes_no_streams_gets_no_link_for_each_request() -> None:
    session = Session()
    service: Any = SimpleNamespace(
        http_options=SimpleNamespace(http=SimpleNamespace(linger_s=0.01)),
        pool=SimpleNamespace(ready=lambda key: session),
        balancers={},
    )
    instance: Any = SimpleNamespace(key=DB, active=0)
    fleet = Http2Fleet(service)
    assert InstanceLease(fleet, instance).link() is not None
    (far,) = session.opened
    far.peer.write(frame(4, 0, 0, struct.pack(">HL", 3, 0)))
    lease = InstanceLease(fleet, instance)
    for _ in range(10):
        assert lease.link() is None
        with pytest.raises(ConnectFailed, match="takes no requests"):
            await asyncio.wait_for(lease.connect(), 5)
    assert len(session.opened) == 1
    far.peer.write(frame(4, 0, 0, struct.pack(">HL", 3, 1)))
    assert lease.link() is not None
    assert len(session.opened) == 1
