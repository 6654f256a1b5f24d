"""Trace context against a reading of the specification word by word, and what is sent on against its own parser."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from proxy.http.errors import BadRequest
from proxy.http.head import read_request_head
from proxy.tracing import TraceParent, Tracer, read_traceparent, trace_id_of

LOWER_HEX = "0123456789abcdef"
hexes = st.text(LOWER_HEX, min_size=1, max_size=40)
flags = st.integers(0, 255)
pieces = st.one_of(
    st.text(LOWER_HEX, min_size=2, max_size=2),
    st.text(LOWER_HEX, min_size=32, max_size=32),
    st.text(LOWER_HEX, min_size=16, max_size=16),
    st.sampled_from(["00", "01", "ff", "cc", "0" * 32, "0" * 16, "A" * 32, "", " ", "."]),
    hexes,
)
nearly = st.lists(pieces, min_size=3, max_size=6).map(lambda words: "-".join(words).encode())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid value with one byte changed, put in or taken out."""
    value = bytearray(draw(valid())[0])
    at = draw(st.integers(0, len(value) - 1))
    match draw(st.integers(0, 2)):
        case 0:
            value[at] = draw(st.integers(0, 255))
        case 1:
            value.insert(at, draw(st.integers(0, 255)))
        case _:
            del value[at]
    return bytes(value)


@st.composite
def valid(draw: st.DrawFn) -> tuple[bytes, TraceParent]:
    version = draw(st.integers(0, 254))
    trace_id = f"{draw(st.integers(1, 2**128 - 1)):032x}"
    parent_id = f"{draw(st.integers(1, 2**64 - 1)):016x}"
    flag = draw(flags)
    value = f"{version:02x}-{trace_id}-{parent_id}-{flag:02x}".encode()
    if version and draw(st.booleans()):
        value += b"-" + draw(st.binary(max_size=30)).replace(b"\n", b"")
    return value, TraceParent(trace_id, parent_id, flag)


def by_the_word(value: bytes) -> TraceParent | None:
    """Section "Versioning of traceparent", step by step."""
    lower_hex = re.compile(rb"[0-9a-f]+")
    version = value[:2]
    if len(version) != 2 or not lower_hex.fullmatch(version) or value[2:3] != b"-" or version == b"ff":
        return None
    if len(value) < 55 or (version == b"00" and len(value) != 55):
        return None
    trace_id, parent_id, flag = value[3:35], value[36:52], value[53:55]
    for part in (trace_id, parent_id, flag):
        if not lower_hex.fullmatch(part):
            return None
    if value[35:36] != b"-" or value[52:53] != b"-" or (len(value) > 55 and value[55:56] != b"-"):
        return None
    if trace_id == b"0" * 32 or parent_id == b"0" * 16:
        return None
    return TraceParent(trace_id.decode(), parent_id.decode(), int(flag, 16))


@given(st.one_of(st.binary(max_size=80), nearly, mutated()).filter(lambda value: b"\n" not in value))
def test_a_value_is_read_as_the_specification_says(value: bytes) -> None:
    assert read_traceparent(value) == by_the_word(value)


@given(valid())
def test_what_is_valid_is_read(made: tuple[bytes, TraceParent]) -> None:
    value, meaning = made
    assert read_traceparent(value) == meaning
    assert trace_id_of([(b"traceparent", value)]) == meaning.trace_id


names = st.sampled_from([b"traceparent", b"tracestate", b"host", b"x-one", b"accept"])
values = st.one_of(st.binary(max_size=20), valid().map(lambda made: made[0]), mutated())
heads = st.lists(st.tuples(names, values), max_size=8)


@given(heads, st.sampled_from([0.0, 0.3, 1.0]))
def test_what_is_sent_on_is_one_valid_context_or_none(fields: list[tuple[bytes, bytes]], ratio: float) -> None:
    trace = Tracer(ratio).begin(fields)
    parents = [value for name, value in fields if name == b"traceparent"]
    parent = read_traceparent(parents[0]) if len(parents) == 1 else None
    if trace is None:  # nothing is changed: nothing there is invalid
        assert parent is not None or not any(name.startswith(b"trace") for name, _ in fields)
        assert parent is None or not parent.sampled
        return
    sent = trace.fields(fields)
    others = [field for field in fields if not field[0].startswith(b"trace")]
    assert [field for field in sent if not field[0].startswith(b"trace")] == others, "nothing else is touched"
    given_on = [value for name, value in sent if name == b"traceparent"]
    states = [field for field in sent if field[0] == b"tracestate"]
    if parent is not None:
        (ours,) = given_on
        meaning = read_traceparent(ours)
        assert meaning is not None
        assert meaning.trace_id == parent.trace_id
        assert meaning.parent_id == trace.span_id != parent.parent_id
        assert meaning.flags == parent.flags & 3
        assert states == [field for field in fields if field[0] == b"tracestate"]
    else:
        assert states == []
        assert len(given_on) == (1 if ratio else 0)
        assert all(read_traceparent(value) is not None for value in given_on)
    lines = [name + b": " + value for name, value in fields]
    assert trace.lines(fields, lines) == [name + b": " + value for name, value in sent], "both forms agree"


any_names = st.sampled_from(
    [b"Host", b"TraceParent", b"tracestate", b"Connection", b"Keep-Alive", b"TE", b"Upgrade", b"Content-Length",
     b"x-forwarded-client-cert", b"Transfer-Encoding", b"X-One", b"x_forwarded_client_cert", b"Expect"]
)  # fmt: skip
any_values = st.one_of(
    st.sampled_from([b"traceparent", b"tracestate, x-one", b"close", b"chunked", b"5", b"a", b"websocket", b""]),
    valid().map(lambda made: made[0]),
)


@given(st.lists(st.tuples(any_names, any_values), max_size=10))
def test_a_heads_lines_stay_those_of_its_fields(raw: list[tuple[bytes, bytes]]) -> None:
    try:
        head = read_request_head(b"GET", b"/", "1.1", [(b"Host", b"b"), *raw], keep_alive=True)
    except BadRequest:
        return
    trace = Tracer(1.0).begin(head.fields)
    if trace is None:
        return
    sent = trace.lines(head.fields, head.lines)
    assert [line.partition(b":")[0].lower() for line in sent] == [name for name, _ in trace.fields(head.fields)]
    assert sum(line.lower().startswith(b"traceparent:") for line in sent) == 1
