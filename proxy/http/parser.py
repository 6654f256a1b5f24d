"""Requests out of bytes, with httptools (llhttp, strict); heads seen before are in :mod:`proxy.http.known_heads`.

Parsing only collects: what was parsed stands in :attr:`RequestParser.messages`, and acting on it is the caller's,
after :meth:`RequestParser.feed` has returned. So a request that turns out malformed in the bytes at hand is refused
before any of it was sent on.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from proxy.http.errors import BadRequest
from proxy.http.head import Field, RequestHead, read_request_head, without_upgrade
from proxy.http.known_heads import TRIALS, known_request, remember_request
from proxy.http.options import HttpOptions
from proxy.mux.flow import MemoryBudget
from proxy.stream import Data

SLICE_BYTES = 16 * 1024
"""How much is parsed at a time; bounds what pipelined requests and a head in the making can hold."""
FIELD_BYTES: Final = 128
"""What a field takes of memory beside its bytes."""
OVERLOADED: Final = 503
"""The status of a request for whose head there is no memory."""


class Message:
    """A request as far as it has been parsed, or the reason why it is refused."""

    __slots__ = ("body", "complete", "head", "keep_trailers", "refusal", "sent", "trailers")

    def __init__(self, head: RequestHead | None, refusal: BadRequest | None = None) -> None:
        self.head = head
        self.refusal = refusal
        """Set: answer with it, then close. On a message that has a head: its body turned out malformed."""
        self.body: list[bytes] = []
        """Parsed and not yet taken by the caller."""
        self.trailers: list[Field] = []
        self.keep_trailers = True
        """False when permissions decided on the headers: what came after the decision is not passed on."""
        self.complete = False
        self.sent = False
        """All of the body was taken by the caller."""


class RequestParser:
    """One connection's requests."""

    __slots__ = (
        "_bad", "_barren_bytes", "_count", "_fed", "_fields", "_held_bytes", "_memory", "_message", "_options",
        "_parser", "_unknown", "_url", "begun", "held", "messages", "stopped",
    )  # fmt: skip

    def __init__(self, options: HttpOptions, memory: MemoryBudget) -> None:
        self._options = options
        self._memory = memory
        self._held_bytes = 0
        """What is counted there, of a head, trailers or chunk extensions in the making."""
        self.messages: deque[Message] = deque()
        """Parsed and not yet taken by the caller, in order; the last may be incomplete."""
        self.begun = False
        """A head is partly there."""
        self.stopped = False
        """Nothing more is parsed: after a refusal, or a request that is the connection's last."""
        self.held: Data | None = None
        """What follows a request for an upgrade; raw bytes if it comes about, else to be parsed (:meth:`resume`)."""
        self._unknown = 0
        """Heads in a row that were not known; where all differ, few are kept."""
        self._restart()

    def _restart(self) -> None:
        self._parser: HttpRequestParser | None = HttpRequestParser(self)
        self._fields: list[Field] = []
        self._url = b""
        self._message: Message | None = None
        self._fed = 0
        self._count = 0
        """Headers of the request read last."""
        self._bad: BadRequest | None = None
        self._barren_bytes = 0
        """Fed since anything came of it: a head, trailers or chunk extensions in the making."""

    def release(self) -> None:
        """The connection is over: parse nothing more, and let go of llhttp's parser, which refers to this."""
        self.stopped = True
        self.held = self._parser = None
        self._url = b""
        self._fields = []
        self._hold(0)

    def _hold(self, size: int) -> bool:
        """Count so many bytes as held; return False if it is too much."""
        before, self._held_bytes = self._held_bytes, size
        return before == size or self._memory.recount(before, size)

    def feed(self, data: Data) -> None:
        """Parse ``data``, at most :data:`SLICE_BYTES` of it at best."""
        if self.stopped:
            return
        if self.held is not None:
            self.held = bytes(self.held) + bytes(data)
            return
        fresh = self._message is None and not self.begun and isinstance(data, bytes)
        if fresh and self._feed_known(bytes(data)):
            return
        before = len(self.messages)
        self._fed = len(data)
        parser = self._parser
        assert parser is not None
        try:
            parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._upgrade(parser, data[upgrade.args[0] :])
        except HttpParserError as error:
            self._refuse(self._bad or BadRequest(400, f"malformed request: {error}"))
        else:
            message = self._message
            if message.body if message is not None else not self.begun:
                self._barren_bytes = 0
                if message is not None and message.head is not None and message.head.chunked:
                    self._barren_bytes = max(0, self._fed - sum(map(len, message.body)))  # trailers may have begun
                if self._held_bytes or self._barren_bytes:
                    self._check_held()
                if fresh and message is None and len(self.messages) == before + 1:
                    self._unknown += 1
                    if self._unknown <= TRIALS or self._unknown % TRIALS == 0:
                        self._remember(bytes(data), self.messages[-1])
                return
            self._barren_bytes += self._fed
            if self._barren_bytes > self._options.head_bytes_max + SLICE_BYTES:
                self._refuse(BadRequest(431, "request headers, trailers or chunk extensions are too large"))
            else:
                self._check_held()

    def _check_held(self) -> None:
        """Count what is there of a head or trailers in the making; refuse what is too much."""
        count = len(self._fields)
        if count > self._options.header_count_max:
            self._refuse(BadRequest(431, "request has too many headers or trailers"))
        elif not self._hold(self._barren_bytes + FIELD_BYTES * count if self._barren_bytes else 0):
            self._refuse(BadRequest(OVERLOADED, "the sidecar holds too many requests that are not whole"))

    def _feed_known(self, data: bytes) -> bool:
        """Take one whole request whose head was read before; return whether ``data`` is one."""
        options = self._options
        found = known_request(data, options.head_bytes_max, options.header_count_max)
        if found is None:
            return False
        self._unknown = 0
        head, end = found
        message = Message(head)
        if end < len(data):
            message.body.append(data[end:])
        message.complete = True
        self.messages.append(message)
        self._barren_bytes = 0
        return True

    def _remember(self, data: bytes, message: Message) -> None:
        """``data`` was this message, from its first byte to its last."""
        if message.head is not None and message.refusal is None and not message.trailers and self.held is None:
            remember_request(data, message.head, self._count)

    def resume(self) -> None:
        """The upgrade did not come about: parse on."""
        held, self.held = self.held, None
        self._restart()
        if held:
            self.feed(held)

    def _refuse(self, refusal: BadRequest) -> None:
        self._hold(0)
        if self.stopped:
            return  # what follows the connection's last request is nobody's
        self.stopped = True
        self.begun = False
        self._url = b""
        self._fields = []
        self._parser = None  # it may hold the beginning of a field
        if self._message is not None:
            self._message.refusal = refusal
        else:
            self.messages.append(Message(None, refusal))

    def _upgrade(self, parser: HttpRequestParser, rest: Data) -> None:
        """The parser stopped behind a head that asks for an upgrade (or CONNECT), body unread."""
        method, version = parser.get_method(), parser.get_http_version()
        fields, url, refused = self._fields, self._url, self._bad
        if method == b"CONNECT":
            refused = BadRequest(405, "CONNECT is not served here")
        try:
            self._check_size(url, fields)
            head = read_request_head(method, url, version, fields, keep_alive=True)
        except BadRequest as error:
            refused = error
        self._message = None
        self._hold(0)
        if refused is not None:
            self._refuse(refused)
        elif head.upgrade in self._options.upgrades and not head.has_body and not head.http10:
            self.begun = False
            self.held = rest
            message = Message(head)
            message.complete = True
            self.messages.append(message)
        else:
            self._restart()
            self.feed(without_upgrade(method, url, version, fields))
            if rest:
                self.feed(rest)

    def _check_size(self, url: bytes, fields: list[Field]) -> None:
        if (
            self._barren_bytes + self._fed <= self._options.head_bytes_max
            and len(fields) <= self._options.header_count_max
        ):
            return  # not even all bytes that it can be in are too many
        if len(fields) > self._options.header_count_max:
            raise BadRequest(431, "request has too many headers or trailers")
        if sum([len(name) + len(value) + 4 for name, value in fields], len(url)) > self._options.head_bytes_max:
            raise BadRequest(431, "request headers or trailers are too large")

    # httptools' callbacks

    def on_message_begin(self) -> None:
        self.begun = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        if parser.should_upgrade():
            return  # feed() goes on with it
        fields, self._fields = self._fields, []
        try:
            self._check_size(self._url, fields)
            head = read_request_head(
                parser.get_method(),
                self._url,
                parser.get_http_version(),
                fields,
                keep_alive=parser.should_keep_alive(),
            )
        except BadRequest as error:
            self._bad = error
            raise
        self._url = b""
        self._count = len(fields)
        self._barren_bytes = 0
        self.begun = False
        self._message = message = Message(head)
        self.messages.append(message)

    def on_body(self, body: bytes) -> None:
        self._message.body.append(body)  # type: ignore[union-attr]

    def on_message_complete(self) -> None:
        message = self._message
        if message is None:
            return  # a request for an upgrade
        message.complete = True
        self._message = None
        if self._fields:
            fields, self._fields = self._fields, []
            try:
                self._check_size(b"", fields)
            except BadRequest as error:
                message.complete = False
                self._message = message
                self._bad = error
                raise
            message.trailers = fields
        if not message.head.keep_alive:  # type: ignore[union-attr]
            self.stopped = True
