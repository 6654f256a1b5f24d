"""Stale reads that are asked again: the same bytes are sent again as long as the rows are the same.

A whole run of the handler leaves a note on its request (:func:`note`): which query it asked and what it found. The
body follows from the head and these rows alone, so a later request with the same head needs only the query, and is
sent the same body if the rows are the ones of then. Only reads that do not wait and promise nothing but age
(`?stale`) are noted: all else in such an answer depends on the head alone and, where tokens are asked for, on what
the head's token may do. There a note is kept with the means to ask whether that is still the same (`Body.holds`),
and only with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

from node.backend import QueryResult
from node.errors import NodeError
from node.http.front.heads import Head
from node.http.respond import JSON_TYPE, query_headers

BODY_BYTES_MAX = 64 * 1024
"""Of an answer's body that is kept for a head."""

Ask = Callable[[str, Mapping[str, Any]], QueryResult | None]
"""A stale read that is answered at once, or not at all."""


class Body:
    """A request's whole body, in the ways in which handlers read one, and their note."""

    __slots__ = ("_data", "holds", "noted", "waits")

    def __init__(self, data: bytes, *, waits: bool = True) -> None:
        self._data = data
        self.waits = waits
        """False: a blocking query's time is up, and it is answered as things stand."""
        self.noted: tuple[str, Mapping[str, Any], Any] | None = None
        self.holds: Callable[[], bool] | None = None
        """Whether the one who asked may do now what was allowed then."""

    def is_eof(self) -> bool:
        return not self._data

    def whole(self) -> bytes:
        data, self._data = self._data, b""
        return data

    async def iter_any(self) -> AsyncIterator[bytes]:
        if self._data:
            yield self.whole()

    async def readany(self) -> bytes:
        return self.whole()


class Parked(Exception):
    """No error: raised by a handler that only reads, when its query has nothing newer than the request's index."""

    def __init__(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float, *, stale: bool) -> None:
        super().__init__(name)
        self.name, self.params, self.min_index, self.wait_s = name, params, min_index, wait_s
        self.stale = stale
        """The read promises nothing but age: whether it has to wait can be told from what this node holds."""


class Memo:
    """What a handler made of a query's rows."""

    __slots__ = ("body", "holds", "name", "params", "raw", "tail")

    def __init__(
        self,
        name: str,
        params: Mapping[str, Any],
        raw: Any,
        body: bytes,
        holds: Callable[[], bool] | None = None,
        marks: str = "",
    ) -> None:
        self.name, self.params, self.raw, self.body, self.holds = name, params, raw, body, holds
        self.tail = f"{marks}Content-Type: {JSON_TYPE}\r\nContent-Length: {len(body)}\r\nDate: "


def note(request: web.Request, name: str, params: Mapping[str, Any], raw: Any) -> None:
    """Note that the answer to ``request``, a stale read, follows from its head and what this query found."""
    content: Any = request.content
    if isinstance(content, Body):
        content.noted = (name, params, raw)


MARKS = ("X-Consul-Results-Filtered-By-ACLs", "X-Consul-Default-ACL-Policy")
"""Headers of an answer that say how its token was judged."""


def keep(head: Head, body: Body, response: web.Response, *, guarded: bool) -> None:
    """Keep what the handler noted, for the next request with this head. ``guarded``: tokens are asked for."""
    made = response.body
    if body.noted is None or (guarded and body.holds is None):
        return
    if response.status == 200 and isinstance(made, bytes) and len(made) <= BODY_BYTES_MAX:
        marks = "".join([f"{name}: {response.headers[name]}\r\n" for name in MARKS if name in response.headers])
        head.memo = Memo(*body.noted, made, body.holds, marks)


_SERVER = f"\r\nServer: {SERVER_SOFTWARE}\r\n\r\n"


def again(memo: Memo, ask: Ask) -> bytes | None:
    """Return the answer if it can be given at once, its rows are those of before, and so is what may be seen."""
    try:
        if memo.holds is not None and not memo.holds():
            return None
        result = ask(memo.name, memo.params)
    except NodeError:
        return None  # the handler will meet it too, and the guard around it has the words
    if result is None or not (result.raw is memo.raw or result.raw == memo.raw):
        return None
    headers = query_headers(result.index, result.known_leader, result.last_contact_ms, "stale")
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"HTTP/1.1 200 OK\r\n{lines}{memo.tail}{rfc822_formatted_time()}{_SERVER}".encode() + memo.body
