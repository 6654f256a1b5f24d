"""Trace context: what is one, what a sidecar makes of it, and by what it decides to record."""

from __future__ import annotations

import pytest

from proxy.tracing import Tracer, read_traceparent, trace_id_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01".encode()


class Dice:
    """Gives the numbers 1, 2, 3 … as random bytes."""

    def __init__(self, first: int = 1) -> None:
        self.next = first

    def __call__(self, size: int) -> bytes:
        given, self.next = self.next, self.next + 1
        return given.to_bytes(size, "big")


@pytest.mark.parametrize(
    "value",
    [
        b"", b"x", b"-", b"00", b"00-", f"ff-{TRACE}-{PARENT}-01".encode(), f"fg-{TRACE}-{PARENT}-01".encode(),
        f"0-{TRACE}-{PARENT}-01".encode(), f"000-{TRACE}-{PARENT}-01".encode(), f".0-{TRACE}-{PARENT}-01".encode(),
        f"00-{'0' * 32}-{PARENT}-01".encode(), f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"00-{TRACE.upper()}-{PARENT}-01".encode(), f"00-{TRACE}-{PARENT.upper()}-01".encode(),
        f"00-{TRACE}0-{PARENT}-01".encode(), f"00-{TRACE[1:]}-{PARENT}-01".encode(),
        f"00-{TRACE}-{PARENT}0-01".encode(), f"00-{TRACE}-{PARENT[1:]}-01".encode(),
        f"00-{TRACE}-{PARENT}-1".encode(), f"00-{TRACE}-{PARENT}-001".encode(), f"00-{TRACE}-{PARENT}-0A".encode(),
        f"00-{TRACE}-{PARENT}".encode(), f"00-{TRACE}-{PARENT}-".encode(), f"00-{TRACE}-{PARENT}-.0".encode(),
        VALID + b"\n", VALID + b" ", b" " + VALID, VALID + b".", VALID + b"-", VALID + b"-what-comes-later",
        f"cc-{TRACE}-{PARENT}-01.later".encode(), f"cc-{TRACE}-{PARENT}-0".encode(), VALID * 100,
    ],
)  # fmt: skip
def test_what_is_no_trace_context_is_none(value: bytes) -> None:
    assert read_traceparent(value) is None
    assert trace_id_of([(b"traceparent", value)]) == ""


@pytest.mark.parametrize("version", ["00", "01", "cc", "fe"])
@pytest.mark.parametrize("flags", [0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0xFF])
def test_a_trace_context_is_read(version: str, flags: int) -> None:
    found = read_traceparent(f"{version}-{TRACE}-{PARENT}-{flags:02x}".encode())
    assert found is not None
    assert found == (TRACE, PARENT, flags)
    assert found.sampled is bool(flags & 1)


def test_a_later_version_may_say_more() -> None:
    assert read_traceparent(f"cc-{TRACE}-{PARENT}-01-what-comes-later".encode()) == (TRACE, PARENT, 1)


def test_which_trace_is_said_once_or_not_at_all() -> None:
    assert trace_id_of([(b"host", b"x"), (b"traceparent", VALID)]) == TRACE
    assert trace_id_of([(b"traceparent", VALID), (b"traceparent", VALID)]) == ""
    assert trace_id_of([]) == ""


# What a sidecar makes of it


FIELDS = [
    (b"host", b"db:80"),
    (b"traceparent", VALID),
    (b"tracestate", b"a=1"),
    (b"x", b"y"),
    (b"tracestate", b"b=2"),
]
LINES = [b"Host: db:80", b"TraceParent: " + VALID, b"tracestate: a=1", b"X: y", b"TraceState: b=2"]


def test_a_sampled_request_is_sent_on_as_our_spans_child() -> None:
    trace = Tracer(random=Dice()).begin(FIELDS)
    assert trace is not None
    assert trace.recorded
    assert (trace.trace_id, trace.parent_id, trace.span_id) == (TRACE, PARENT, "0000000000000001")
    assert (trace.host, trace.state) == (b"db:80", b"a=1,b=2")
    ours = f"00-{TRACE}-0000000000000001-01".encode()
    assert trace.fields(FIELDS) == [FIELDS[0], *FIELDS[2:], (b"traceparent", ours)]
    assert trace.lines(FIELDS, LINES) == [LINES[0], *LINES[2:], b"traceparent: " + ours]
    assert FIELDS[1] == (b"traceparent", VALID), "heads that were seen before are kept: nobody changes their lists"
    assert LINES[1] == b"TraceParent: " + VALID


@pytest.mark.parametrize(("came", "sent"), [("01", "01"), ("03", "03"), ("09", "01"), ("ff", "03")])
def test_flags_are_kept_as_far_as_they_are_known(came: str, sent: str) -> None:
    trace = Tracer(random=Dice()).begin([(b"traceparent", f"00-{TRACE}-{PARENT}-{came}".encode())])
    assert trace is not None
    assert trace.traceparent() == f"00-{TRACE}-0000000000000001-{sent}".encode()


def test_a_later_version_is_answered_in_the_version_that_we_know() -> None:
    trace = Tracer(random=Dice()).begin([(b"traceparent", f"cc-{TRACE}-{PARENT}-01-more".encode())])
    assert trace is not None
    assert trace.traceparent() == f"00-{TRACE}-0000000000000001-01".encode()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_request_that_is_not_sampled_is_sent_on_as_it_came(ratio: float) -> None:
    fields = [(b"traceparent", f"00-{TRACE}-{PARENT}-00".encode()), (b"tracestate", b"a=1")]
    assert Tracer(ratio).begin(fields) is None


def test_a_request_that_brings_nothing_is_sent_on_as_it_came() -> None:
    assert Tracer().begin([(b"host", b"db"), (b"x", b"y")]) is None


@pytest.mark.parametrize(
    "brought",
    [[(b"traceparent", b"00-abc-def-01")], [(b"traceparent", VALID)] * 2, [],
     [(b"traceparent", VALID), (b"traceparent", b"")]],
    ids=["malformed", "twice", "none", "one of two empty"],
)  # fmt: skip
def test_what_is_about_no_valid_parent_is_not_sent_on(brought: list[tuple[bytes, bytes]]) -> None:
    fields = [(b"host", b"db"), *brought, (b"tracestate", b"a=1")]
    trace = Tracer().begin(fields)
    assert trace is not None
    assert (trace.trace_id, trace.recorded) == ("", False)
    assert trace.fields(fields) == [(b"host", b"db")]
    assert trace.lines(fields, [name + b": " + value for name, value in fields]) == [b"host: db"]


def test_a_tracestate_that_is_too_long_is_passed_on_and_not_exported() -> None:
    fields = [(b"traceparent", VALID), (b"tracestate", b"a=" + b"x" * 600)]
    trace = Tracer().begin(fields)
    assert trace is not None
    assert trace.state == b""
    assert fields[1] in trace.fields(fields)


# Beginning traces


def test_a_trace_may_begin_here() -> None:
    trace = Tracer(1.0, Dice()).begin([(b"host", b"db"), (b"tracestate", b"a=1")])
    assert trace is not None
    assert trace.recorded
    assert (trace.trace_id, trace.parent_id) == (f"{1:032x}", "")
    assert trace.fields([(b"tracestate", b"a=1")]) == [
        (b"traceparent", f"00-{1:032x}-{2:016x}-03".encode())  # our ids are random, and say so
    ]


def test_an_invalid_context_begins_the_trace_anew() -> None:
    trace = Tracer(1.0, Dice()).begin([(b"traceparent", VALID), (b"traceparent", VALID)])
    assert trace is not None
    assert trace.trace_id == f"{1:032x}"


def test_that_a_request_is_not_recorded_is_said_to_those_who_get_it_next() -> None:
    half = Tracer(0.5, Dice(first=(1 << 55) - 1))
    below, above = half.begin([]), Tracer(0.5, Dice(first=1 << 55)).begin([])
    assert below is not None
    assert above is not None
    assert (below.recorded, above.recorded) == (False, True)
    assert below.traceparent().endswith(b"-02")


def test_ids_are_never_zero() -> None:
    trace = Tracer(1.0, Dice(first=0)).begin([])
    assert trace is not None
    assert trace.trace_id == f"{1:032x}"


def test_about_so_many_are_recorded() -> None:
    tracer = Tracer(0.1)
    recorded = sum(trace.recorded for _ in range(20_000) if (trace := tracer.begin([])) is not None)
    assert 1_700 < recorded < 2_300  # seven standard deviations
