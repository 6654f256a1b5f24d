"""One connection on which requests are sent and responses come back: to the app, or to another sidecar.

It parses responses and writes them anew, in the form the asking client can take. One request at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from proxy.http.errors import BadResponse, TooMuchHeld, UnwantedStatus
from proxy.http.head import Field, RequestHead, ResponseHead, read_response_head, trailer_lines
from proxy.http.known_heads import TRIALS, known_response, remember_response
from proxy.http.options import HttpOptions
from proxy.http.parser import FIELD_BYTES
from proxy.mux.core import NOBODY
from proxy.mux.flow import MemoryBudget
from proxy.stream import Channel, Data

SLICE_BYTES = 64 * 1024
"""How much is parsed at a time."""
_JOIN_BYTES = 64 * 1024


class Owner(Protocol):
    """Who sends the requests. Each call names the connection, as one may come after it was given up."""

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        """Bytes for the client. ``upstream.head`` is the final response's head once it is among them."""

    def response_complete(self, upstream: Upstream) -> None:
        """The response has ended; ``upstream.reusable`` says whether another request may be sent."""

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        """The connection speaks the protocol that was asked for from here on; ``rest`` are its first bytes."""

    def upstream_lost(self, upstream: Upstream, error: Exception | None) -> None:
        """The connection ended or was unusable; if a request was under way, its response is not complete."""

    def upstream_full(self, upstream: Upstream, full: bool) -> None:
        """The connection takes no more for now, or takes more again."""


class Upstream:
    """The peer of the channel that leads to the app: dial with it, then set :attr:`channel`."""

    __slots__ = (
        "_bad", "_barren_bytes", "_chunks", "_closer", "_fields", "_held_bytes", "_informational", "_interim",
        "_memory", "_options", "_out", "_owner", "_parser", "_read", "_reason", "_switched", "_unknown", "_until_eof",
        "busy", "channel", "edit", "head", "heard", "keep_client", "lost", "peer", "request", "reusable", "screen",
        "served",
    )  # fmt: skip

    request: RequestHead
    """The request under way, or the last one."""

    def __init__(self, owner: Owner, options: HttpOptions, memory: MemoryBudget) -> None:
        self.channel: Channel = NOBODY
        self.peer: Channel = NOBODY
        self.head: ResponseHead | None = None
        """The final response's head, once it is there."""
        self.busy = False
        """A request is under way."""
        self.heard = False
        """Bytes of an answer to it have come."""
        self.lost = False
        self.served = 0
        """Requests sent, the one under way included."""
        self.reusable = True
        self.keep_client = True
        """Whether the client's connection can stay open after this response; settled with the head."""
        self.edit: Callable[[ResponseHead], None] | None = None
        """Changes a final response's head before it is sent on."""
        self.screen: Callable[[int], bool] | None = None
        """Says of a final response's status that it is not wanted: the request will be sent elsewhere."""
        self._owner = owner
        self._options = options
        self._memory = memory
        self._held_bytes = 0
        """What is counted there, of a head or trailers in the making."""
        self._fields: list[Field] = []
        self._reason = b""
        self._out: list[bytes] = []
        self._bad: BadResponse | None = None
        self._read: tuple[list[Field], list[bytes], int] | None = None
        """Of a response that may be known next time: fields and lines before any edit, and how many headers came."""
        self._unknown = 0
        """Heads in a row that were not known; where all differ, few are kept."""
        self._barren_bytes = 0
        self._chunks = self._until_eof = self._switched = self._informational = self._interim = False
        self._closer: asyncio.TimerHandle | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        """It refers to this, as this does to it: whatever ends the connection lets go of it."""

    def attach(self, owner: Owner) -> None:
        """From here on it is ``owner`` who is told."""
        self._owner = owner

    def begin(self, request: RequestHead, *, keep_client: bool) -> None:
        """The next response is ``request``'s; ``keep_client`` says whether its connection may stay open after it."""
        self.request = request
        self.head = None
        self.heard = False
        self.busy = True
        self.keep_client = keep_client
        self.served += 1
        self._chunks = self._until_eof = self._interim = False

    def close(self) -> None:
        """End the connection in good order; a request under way is cut off."""
        if self.lost:
            return
        self._lose()
        if self.busy:
            self.channel.abort()
        elif self.channel is not NOBODY:
            self.channel.write_eof()
            self._closer = asyncio.get_running_loop().call_later(self._options.linger_s, self.channel.abort)

    def _lose(self) -> None:
        self.lost = True
        self.reusable = False
        self._parser = None
        self._fields = []
        self._hold(0)

    def _hold(self, size: int) -> bool:
        """Count so many bytes as held; return False if it is too much."""
        before, self._held_bytes = self._held_bytes, size
        return before == size or self._memory.recount(before, size)

    def _held_too_much(self, data: Data) -> BadResponse | None:
        """Count what is there of a head or trailers in the making, after ``data``; return the problem with it."""
        if self._out:
            self._barren_bytes = 0
            if self.busy and self.head is not None and self.head.chunked:
                self._barren_bytes = max(0, len(data) - sum(map(len, self._out)))  # trailers may have begun
        elif self.busy:
            self._barren_bytes += len(data)
            if self._barren_bytes > self._options.head_bytes_max + SLICE_BYTES:
                return BadResponse("the app's response headers are too large")
        else:
            self._barren_bytes = 0
        count = len(self._fields)
        if self.busy and count > self._options.header_count_max:
            return BadResponse("the app's response has too many headers or trailers")
        if not self._hold(self._barren_bytes + FIELD_BYTES * count if self._barren_bytes else 0):
            return TooMuchHeld("the sidecar holds too many responses that are not whole")
        return None

    # Channel: what the connection calls

    def write(self, data: Data) -> None:
        """Response bytes."""
        if self.lost:
            return
        if not self.busy:
            self._give_up(BadResponse("the app sent bytes that nobody asked for"))
            return
        if not self.heard:
            self.heard = True
            if isinstance(data, bytes) and len(data) <= SLICE_BYTES:
                if not self._take_known(data):
                    self._feed(data, first=True)
                return
        if len(data) <= SLICE_BYTES:
            self._feed(data)
            return
        view = memoryview(data)
        for at in range(0, len(data), SLICE_BYTES):
            if not self._feed(view[at : at + SLICE_BYTES], view[at + SLICE_BYTES :]):
                return

    def _take_known(self, data: bytes) -> bool:
        """Take a whole response whose head was read before; return whether ``data`` is one that may be taken."""
        request, options = self.request, self._options
        if self.screen is not None or request.method == b"HEAD":
            return False
        found = known_response(data, options.head_bytes_max, options.header_count_max)
        if found is None:
            return False
        self._unknown = 0
        head, end = found
        self.head = head
        if self.edit is not None:
            self.edit(head)
        extra = b""
        if not self.keep_client:
            extra = b"connection: close\r\n"
        elif request.http10:
            extra = b"connection: keep-alive\r\n"
        self.busy = False
        self._owner.response_output(self, [head.wire(extra=extra, body=data[end:])])
        if not self.lost:
            self._owner.response_complete(self)
        return True

    def _feed(self, data: Data, later: Data = b"", *, first: bool = False) -> bool:
        """Parse ``data``; ``later`` is what follows it at once. Return whether that is still to be parsed.

        ``first``: these are a response's first bytes; if they are all of it, it will be known the next time.
        """
        parser = self._parser
        if parser is None:
            return False
        if first:
            self._read = None
        problem: BadResponse | None = None
        try:
            parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            rest = bytes(data[upgrade.args[0] :]) + bytes(later)
            self._flush()
            self._switched = True
            self._parser = None
            self._hold(0)
            self._owner.response_switched(self, rest)
            return False
        except HttpParserError as error:
            problem = self._bad or BadResponse(f"the app's response is malformed: {error}")
        if self.busy or self._held_bytes:
            problem = problem or self._held_too_much(data)
        if self._out:
            self._flush()
        if not self.busy:
            if problem is not None or later:
                self.reusable = False  # the response was whole; what follows it is junk
            elif first and self.reusable and self._read is not None and self.head is not None:
                self._unknown += 1
                if self._unknown <= TRIALS or self._unknown % TRIALS == 0:
                    remember_response(bytes(data), self.head, *self._read)
            if self.request.method == b"HEAD" and not self.lost:
                self._parser = HttpResponseParser(self)  # the old one may wait for a body
                self._fields = []
            if not self.lost:
                self._owner.response_complete(self)
            return False
        if problem is not None:
            self._give_up(problem)
            return False
        return True

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._owner.response_output(self, out)

    def write_eof(self) -> None:
        """The connection's last byte has come."""
        if self._closer is not None:
            self._closer.cancel()
        if self.lost:
            return
        if self.busy and self._until_eof and self.head is not None:
            self.busy = False
            self.reusable = False
            if self._chunks:
                self._owner.response_output(self, [b"0\r\n\r\n"])
            self._owner.response_complete(self)
        else:
            self._give_up(None)

    def abort(self, error: Exception | None = None) -> None:
        """The connection was cut."""
        if self._closer is not None:
            self._closer.cancel()
        self._give_up(error)

    def pause_reading(self) -> None:
        self._owner.upstream_full(self, True)

    def resume_reading(self) -> None:
        self._owner.upstream_full(self, False)

    def _give_up(self, error: Exception | None) -> None:
        if self.lost:
            return
        self._lose()
        if error is None and not self.busy:
            self.channel.write_eof()
        else:
            self.channel.abort(error)
        self._owner.upstream_lost(self, error)

    # httptools' callbacks: they only collect

    def on_message_begin(self) -> None:
        if not self.busy:
            raise BadResponse("the app sent a response that nobody asked for")

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        fields, self._fields = self._fields, []
        reason, self._reason = self._reason, b""
        try:
            if len(fields) > self._options.header_count_max:
                raise BadResponse("the app's response has too many headers")
            parser = self._parser
            assert parser is not None
            self._read_head(parser, read_response_head(parser.get_status_code(), reason, fields), len(fields))
        except BadResponse as error:
            self._bad = error
            raise

    def _read_head(self, parser: HttpResponseParser, head: ResponseHead, count: int) -> None:
        request, status = self.request, head.status
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadResponse("the app does not speak HTTP/1.1")
        if status < 200:
            if status < 100:
                raise BadResponse("the app's response has no status of three digits")
            if status == 101:
                if not request.upgrade or head.upgrade.lower() != request.upgrade.encode():
                    raise BadResponse("the app switched protocols without being asked to")
                if not parser.should_upgrade():
                    raise BadResponse("the app switched protocols without saying so in Connection")
                self._out.append(head.wire(extra=b"connection: upgrade\r\nupgrade: " + head.upgrade + b"\r\n"))
                return
            self._informational = True
            self._interim = True
            if not request.http10:
                self._out.append(head.wire())
            return
        if self.screen is not None and self.screen(status):
            raise UnwantedStatus(f"it answered {status}")
        self.head = head
        if version == "1.1" and request.method != b"HEAD" and not self._interim:
            self._read = (head.fields, head.lines, count)
        if self.edit is not None:
            self.edit(head)
        if not parser.should_keep_alive():
            self.reusable = False
        extra = b""
        if request.method == b"HEAD" or status in (204, 304):
            if head.chunked and status != 204 and not request.http10:
                extra = b"transfer-encoding: chunked\r\n"
        elif head.length is None:
            self._until_eof = not head.chunked
            if request.http10:
                self.keep_client = False
            else:
                self._chunks = True
                extra = b"transfer-encoding: chunked\r\n"
        if not self.keep_client:
            extra += b"connection: close\r\n"
        elif request.http10:
            extra += b"connection: keep-alive\r\n"
        self._out.append(head.wire(extra=extra))
        if request.method == b"HEAD":
            self.busy = False

    def on_chunk_header(self) -> None:
        if not self.busy:
            raise BadResponse("the app sent a body where there is none")

    def on_body(self, body: bytes) -> None:
        if not self.busy:
            raise BadResponse("the app sent a body where there is none")
        if self._chunks:
            self._out += (b"%x\r\n" % len(body), body, b"\r\n")
        else:
            self._out.append(body)

    def on_message_complete(self) -> None:
        if self._informational:
            self._informational = False
        elif self.busy and self.head is not None:
            self.busy = False
            if self._chunks:
                fields, self._fields = self._fields, []
                self._out.append(b"0\r\n" + trailer_lines(fields) + b"\r\n")
            self._fields = []


def joined(pieces: list[bytes]) -> list[bytes]:
    """Return ``pieces`` in as few as is cheap: long ones are not copied."""
    if len(pieces) == 1:
        return pieces
    if sum(map(len, pieces)) <= _JOIN_BYTES:
        return [b"".join(pieces)]
    return pieces
