"""One Envoy's stream at its end: what gRPC is doing at that moment is not cut short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from node.xds.server import _Stream
from tests.support.promises import PATIENCE_S


class Context:
    """A stream of gRPC that takes a message when it is let."""

    def __init__(self) -> None:
        self.begun, self.may_leave = asyncio.Event(), asyncio.Event()
        self.sent: list[str] = []

    async def write(self, response: str) -> None:
        self.begun.set()
        await self.may_leave.wait()
        self.sent.append(response)


class Session:
    """A session with one message to send."""

    settle_at = None
    callers: tuple[list[str], bool] = ([], False)
    trouble = ""

    def request(self, request: Any) -> None: ...

    def settle(self) -> None: ...

    def know(self, *_: Any) -> None: ...

    def responses(self) -> list[str]:
        return ["clusters"]


class Known:
    def follow(self, *_: Any, everyone: bool) -> None: ...

    def instances(self) -> None: ...

    def services(self) -> None: ...


class Feed:
    async def updates(self) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


async def nothing() -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


class First:
    class node:
        id = "web-sidecar-proxy"


async def test_a_message_that_is_on_its_way_leaves_before_the_stream_ends() -> None:
    context, over = Context(), asyncio.Event()

    async def withdrawn() -> str:
        await over.wait()
        return "its token was deleted"

    stream = _Stream(
        First, nothing(), context, cast(Any, Feed()), cast(Any, Session()), lambda: False, cast(Any, withdrawn)
    )
    running = asyncio.ensure_future(stream.run(cast(Any, Known())))
    stream.look_anew()
    await asyncio.wait_for(context.begun.wait(), PATIENCE_S)
    over.set()
    done, _ = await asyncio.wait([running], timeout=0.1)
    assert not done, "gRPC refuses to end a stream on which it is sending"
    context.may_leave.set()
    await asyncio.wait_for(running, PATIENCE_S)
    assert context.sent == ["clusters"]
