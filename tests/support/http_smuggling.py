"""The stage of the request smuggling tests: what is sent, and what may come of it.

What is smuggled asks for ``/evil``, which the policy denies: it has no other way in.
"""

from __future__ import annotations

import re

from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.support.http_filter import Seen, policy_of, rig

POLICY = policy_of(
    Intention(
        source_name="web",
        destination_name="db",
        permissions=(Permission("deny", HTTPMatch(path_prefix="/evil")), Permission("allow", HTTPMatch())),
    )
)
EVIL = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SLICE_BYTES = 16 * 1024
"""What is parsed at a time: of what is longer the app may have been sent a part when the rest is refused."""


async def is_refused(data: bytes, pieces: int) -> None:
    """It is refused and the connection closed, with one answer; no whole request reached the app.

    ``pieces``: 1 sends it octet by octet, or in pieces where it is long; 0 at once.
    """
    async with rig(policy=POLICY) as r:
        answer = await r.exchange(data, pieces=997 if pieces and len(data) > 3000 else pieces)
        statuses = re.findall(rb"HTTP/1\.1 (\d+) ", answer)
        assert len(statuses) == 1, answer
        assert statuses[0] in (b"400", b"405", b"431", b"501", b"505"), answer
        assert b"connection: close" in answer
        assert r.app.seen == []
        if not pieces and len(data) <= SLICE_BYTES:
            assert r.app.connections == 0, "the whole of it was at hand, so nothing had to be sent"


async def is_harmless(data: bytes, wanted: list[tuple[str, bytes]], pieces: int) -> list[Seen]:
    """The app sees these targets and bodies and nothing else, each with one framing; return what it saw."""
    async with rig(policy=POLICY) as r:
        await r.exchange(data, pieces=pieces)
        assert [(seen.target, seen.body) for seen in r.app.seen] == wanted
        raw = bytes(r.app.raw)
        assert raw.count(b" HTTP/1.1\r\n") == len(wanted)
        assert b"evil" not in raw.replace(EVIL, b"")
        for seen in r.app.seen:
            assert seen.header("host") in (["a"], ["A"])
            assert len(seen.header("content-length")) + len(seen.header("transfer-encoding")) <= 1
        return r.app.seen
