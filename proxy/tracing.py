"""W3C trace context: whose span a request belongs to, and what is said of it to whoever gets the request next.

A sidecar that exports spans takes part in the traces that its requests bring: it makes a span of its own for each
sampled request and sends the request on as that span's child. One that exports nothing passes all of it on untouched.

Source: W3C Trace Context, levels 1 and 2 (https://www.w3.org/TR/trace-context-2/). Pure: randomness
and clock are handed in.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from raftstate.model.sidecar import Key

Field = tuple[bytes, bytes]

SAMPLED = 0x01
_KNOWN_FLAGS = 0x03
"""``sampled`` and ``random``; all others are sent as zero (section 3.2.2.5 of the specification)."""
_RANDOM = 0x02
_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE_BYTES_MAX = 512
"""What a ``tracestate`` may at least be long (section 3.3.1.5); a longer one is passed on and not exported."""
_THRESHOLD_BITS = 56
"""The part of a trace id that is random by level 2, by which all who sample at a ratio decide alike."""


class TraceParent(NamedTuple):
    """A ``traceparent`` that was understood."""

    trace_id: str
    parent_id: str
    flags: int

    @property
    def sampled(self) -> bool:
        """Whether the caller may have recorded its span."""
        return bool(self.flags & SAMPLED)


def read_traceparent(value: bytes) -> TraceParent | None:
    """Parse a ``traceparent``; None when it is not one.

    A later version may have more fields behind a dash; version 00 has none, and version ff is invalid.
    """
    found = _TRACEPARENT.fullmatch(value)
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if more is not None and version == b"00":
        return None
    return TraceParent(trace_id.decode(), parent_id.decode(), int(flags, 16))


def trace_id_of(fields: Iterable[Field]) -> str:
    """Return the trace that header fields, with names in lower case, say a request belongs to; ``""``: none."""
    found: TraceParent | None = None
    count = 0
    for name, value in fields:
        if name == b"traceparent":
            found = read_traceparent(value)
            count += 1
    return found.trace_id if found is not None and count == 1 else ""


class RequestTrace:
    """What a sidecar makes of one request's trace context, and what its span will tell beside the access log."""

    __slots__ = (
        "attempts", "began_ns", "flags", "grpc", "grpc_status", "host", "parent_id", "peer", "span_id", "state",
        "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        trace_id: str = "",
        parent_id: str = "",
        span_id: str = "",
        flags: int = 0,
        *,
        began_ns: int = 0,
        state: bytes = b"",
        host: bytes = b"",
    ) -> None:
        self.trace_id = trace_id
        """Empty: the request belongs to none, and is sent on without any context."""
        self.parent_id = parent_id
        """The caller's span; empty for a trace that begins here."""
        self.span_id = span_id
        """Of our own span, which the request is sent on as a child of."""
        self.flags = flags
        self.began_ns = began_ns
        """When the request came, in nanoseconds of Unix time: loops' clocks may tick in milliseconds."""
        self.state = state
        """``tracestate`` as it came, for the span."""
        self.host = host
        """``Host``, or ``:authority``."""
        self.attempts = 0
        """How often the request was given to an instance."""
        self.peer: tuple[str, int] | None = None
        """Address and port that the request came from, by the mesh, or was sent to last."""
        self.grpc = False
        self.grpc_status = b""
        """Empty: none came."""

    @property
    def recorded(self) -> bool:
        """Whether there is to be a span."""
        return bool(self.flags & SAMPLED)

    def sent_to(self, key: object) -> None:
        """The request is given to the instance with this key: the first one, or another one after that."""
        self.attempts += 1
        if isinstance(key, Key):  # else our own app, without the mesh between
            self.peer = (key.address, key.port)

    def traceparent(self) -> bytes:
        """Return the header that is sent on; empty: none."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}".encode() if self.trace_id else b""

    def fields(self, fields: Iterable[Field]) -> list[Field]:
        """Return header fields as they are sent on."""
        kept = [field for field in fields if not self._drops(field[0])]
        if self.trace_id:
            kept.append((b"traceparent", self.traceparent()))
        return kept

    def lines(self, fields: Sequence[Field], lines: Sequence[bytes]) -> list[bytes]:
        """Return the lines that belong to header fields, one each, as they are sent on."""
        kept = [line for (name, _), line in zip(fields, lines, strict=True) if not self._drops(name)]
        if self.trace_id:
            kept.append(b"traceparent: " + self.traceparent())
        return kept

    def _drops(self, name: bytes) -> bool:
        # What stands in tracestate is about the parent that traceparent names.
        return name == b"traceparent" or (name == b"tracestate" and not self.parent_id)


class Tracer:
    """Decides what becomes of each request's trace context, in a sidecar that exports spans."""

    def __init__(
        self,
        ratio: float = 0.0,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """``ratio``: of the requests that belong to no trace, begin one for each, and record so many of them, 0 to 1;
        0: begin none. ``random`` returns so many random bytes, ``clock`` nanoseconds of Unix time."""
        self._begins = ratio > 0
        self._threshold = round((1 - ratio) * (1 << _THRESHOLD_BITS))
        self._random = random
        self._clock = clock

    def begin(self, fields: Iterable[Field], host: bytes = b"") -> RequestTrace | None:
        """Return what is to be made of a request with these header fields, names in lower case; None: nothing.

        ``host`` is where it was sent to, unless a field says so. A request that is not sampled is sent on as it came.
        """
        value = state = b""
        parents = 0
        stated = False
        for name, content in fields:
            if name == b"traceparent":
                value = content
                parents += 1
            elif name == b"tracestate":
                state = state + b"," + content if stated else content
                stated = True
            elif name == b"host":
                host = content
        parent = read_traceparent(value) if parents == 1 else None
        if parent is not None:
            if not parent.sampled:
                return None
            if len(state) > _STATE_BYTES_MAX:
                state = b""
            return RequestTrace(
                parent.trace_id,
                parent.parent_id,
                self._id(8),
                parent.flags & _KNOWN_FLAGS,
                began_ns=self._clock(),
                state=state,
                host=host,
            )
        if self._begins:
            trace_id = self._id(16)
            sampled = int(trace_id[-_THRESHOLD_BITS // 4 :], 16) >= self._threshold
            flags = _RANDOM | (SAMPLED if sampled else 0)
            return RequestTrace(trace_id, "", self._id(8), flags, began_ns=self._clock(), host=host)
        return RequestTrace() if parents or stated else None

    def _id(self, size: int) -> str:
        while True:
            made = self._random(size)
            if any(made):
                return made.hex()
