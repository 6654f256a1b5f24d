"""A request as a span: names, attributes and status by OpenTelemetry's conventions."""

from __future__ import annotations

import msgspec
import pytest

from proxy.access import Entry
from proxy.spans import TEXT_MAX, encode_span, split_host
from proxy.tracing import RequestTrace
from raftstate.model.sidecar import Key
from tests.support.otlp import Span

TRACE, PARENT, OWN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "a" * 16
END_NS = 1_700_000_000_123_456_789
BEGAN_NS = END_NS - 1_500_000
INBOUND = Entry("inbound", "http/1.1", "web", "web-1", "db", "db-1", "GET", "/x", 200, "app", 12, 0.5)
OUTBOUND = INBOUND._replace(direction="outbound")
KEY = Key("10.9.8.7", 20000, "db", "db-1")


def trace(parent: str = PARENT, flags: int = 1, host: bytes = b"db:8080", state: bytes = b"") -> RequestTrace:
    made = RequestTrace(TRACE, parent, OWN, flags, began_ns=BEGAN_NS, host=host, state=state)
    made.peer = ("10.1.2.3", 4321)
    return made


def span(entry: Entry, of: RequestTrace | None = None) -> Span:
    found = msgspec.json.decode(encode_span(entry, of or trace(), END_NS), type=Span)
    found.check()
    return found


def test_a_server_span_says_what_the_conventions_ask() -> None:
    made = span(INBOUND, trace(state=b"a=1,b=2"))
    assert (made.trace_id, made.span_id, made.parent_span_id, made.kind) == (TRACE, OWN, PARENT, 2)
    assert (made.name, made.trace_state) == ("GET db", "a=1,b=2")
    assert int(made.end_time_unix_nano) == END_NS
    assert int(made.start_time_unix_nano) == BEGAN_NS
    assert made.flags == 0x301, "the flags of the context, and that the parent is in another process"
    assert made.values == {
        "http.request.method": "GET", "url.path": "/x", "url.scheme": "http", "http.response.status_code": 200,
        "server.address": "db", "server.port": 8080, "client.address": "10.1.2.3",
        "network.peer.address": "10.1.2.3", "network.peer.port": 4321,
        "network.protocol.name": "http", "network.protocol.version": "1.1",
        "lictor.source": "web", "lictor.destination": "db", "lictor.instance": "db-1", "lictor.origin": "app",
    }  # fmt: skip


def test_a_client_span_says_what_the_conventions_ask() -> None:
    of = trace()
    of.sent_to(KEY)
    made = span(OUTBOUND._replace(protocol="h2"), of)
    assert (made.name, made.kind) == ("GET db", 3)
    expected = {
        "url.full": "http://db:8080/x", "network.peer.address": "10.9.8.7", "network.peer.port": 20000,
        "network.protocol.version": "2",
    }  # fmt: skip
    assert expected.items() <= made.values.items()
    assert "client.address" not in made.values
    assert "http.request.resend_count" not in made.values
    of.sent_to(KEY._replace(port=20001))
    of.sent_to(KEY._replace(port=20002))
    values = span(OUTBOUND, of).values
    assert (values["http.request.resend_count"], values["network.peer.port"]) == (2, 20002)


def test_a_span_without_a_parent_is_a_root() -> None:
    made = span(INBOUND, trace(parent="", flags=3))
    assert (made.parent_span_id, made.flags) == ("", 0x103)


def test_what_is_not_known_is_not_said() -> None:
    of = trace(host=b"")
    of.peer = None
    of.sent_to(("loopback", 80))
    made = span(INBOUND, of)
    assert made.values["server.address"] == "db"
    for key in ("server.port", "network.peer.address", "client.address", "error.type"):
        assert key not in made.values


@pytest.mark.parametrize(
    ("code", "origin", "server", "client"),
    [
        (200, "app", "", ""), (101, "app", "", ""), (304, "app", "", ""), (404, "app", "", "404"),
        (500, "app", "500", "500"), (503, "app", "503", "503"), (403, "denied", "", "denied"),
        (503, "app-down", "app-down", "app-down"), (504, "timeout", "timeout", "timeout"), (0, "cut", "cut", "cut"),
    ],
)  # fmt: skip
def test_what_is_an_error_depends_on_whose_span_it_is(code: int, origin: str, server: str, client: str) -> None:
    for entry, error in ((INBOUND, server), (OUTBOUND, client)):
        made = span(entry._replace(code=code, origin=origin))
        assert made.status.code == (2 if error else 0)
        assert made.values.get("error.type", "") == error
        assert made.values.get("http.response.status_code", 0) == code


def test_a_method_that_nobody_knows_is_no_name() -> None:
    made = span(INBOUND._replace(method="BREW"))
    assert made.name == "HTTP db"
    assert made.values["http.request.method"] == "_OTHER"
    assert made.values["http.request.method_original"] == "BREW"


@pytest.mark.parametrize(
    ("status", "name", "server", "client"),
    [(b"0", "OK", "", ""), (b"1", "CANCELLED", "", "CANCELLED"), (b"5", "NOT_FOUND", "", "NOT_FOUND"),
     (b"2", "UNKNOWN", "UNKNOWN", "UNKNOWN"), (b"4", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
     (b"7", "PERMISSION_DENIED", "", "PERMISSION_DENIED"), (b"12", "UNIMPLEMENTED", "UNIMPLEMENTED", "UNIMPLEMENTED"),
     (b"13", "INTERNAL", "INTERNAL", "INTERNAL"), (b"14", "UNAVAILABLE", "UNAVAILABLE", "UNAVAILABLE"),
     (b"15", "DATA_LOSS", "DATA_LOSS", "DATA_LOSS"), (b"16", "UNAUTHENTICATED", "", "UNAUTHENTICATED"),
     (b"99", "99", "", "99")],
)  # fmt: skip
def test_a_grpc_call_is_told_as_one(status: bytes, name: str, server: str, client: str) -> None:
    of = trace()
    of.grpc, of.grpc_status = True, status
    for entry, error in ((INBOUND, server), (OUTBOUND, client)):
        made = span(entry._replace(protocol="h2", method="POST", path="/test.Echo/Unary"), of)
        assert made.name == "test.Echo/Unary"
        expected = {"rpc.system.name": "grpc", "rpc.method": "test.Echo/Unary", "rpc.response.status_code": name}
        assert expected.items() <= made.values.items()
        assert made.values.get("error.type", "") == error


@pytest.mark.parametrize("status", [b"", b"x", b"\xff", b"9" * 5000])
def test_a_grpc_call_without_a_status_has_failed(status: bytes) -> None:
    of = trace()
    of.grpc, of.grpc_status = True, status
    made = span(INBOUND._replace(protocol="h2", path="/test.Echo/Unary", code=0, origin="cut"), of)
    assert made.values["error.type"] == "cut"
    assert "rpc.response.status_code" not in made.values
    assert span(INBOUND._replace(protocol="h2", path="/test.Echo/Unary"), of).values["error.type"] == "200"


def test_a_clock_that_is_set_back_makes_no_span_end_before_it_begins() -> None:
    made = msgspec.json.decode(encode_span(INBOUND, trace(), BEGAN_NS - 10), type=Span)
    made.check()
    assert made.start_time_unix_nano == made.end_time_unix_nano == str(BEGAN_NS)


def test_a_span_always_has_a_name() -> None:
    of = trace()
    of.grpc, of.grpc_status = True, b"12"
    assert span(INBOUND._replace(path="/"), of).name == "_OTHER"


def test_what_a_caller_chooses_is_bounded() -> None:
    long = "x" * 70_000
    of = trace(host=long.encode())
    for entry in (INBOUND._replace(method=long, path="/" + long), OUTBOUND._replace(path="/" + long)):
        assert len(encode_span(entry, of, END_NS)) < 8 * TEXT_MAX
    of.grpc = True
    assert len(span(INBOUND._replace(path="/" + long), of).name) == TEXT_MAX


@pytest.mark.parametrize(
    ("host", "address", "port"),
    [(b"db", "db", 0), (b"db:80", "db", 80), (b"10.0.0.1:8080", "10.0.0.1", 8080), (b"[::1]:9", "::1", 9),
     (b"[::1]", "::1", 0), (b"", "", 0), (b"a:b:c", "", 0), (b"::1", "", 0), (b":80", "", 0)],
)  # fmt: skip
def test_a_host_is_an_address_and_a_port(host: bytes, address: str, port: int) -> None:
    assert split_host(host) == (address, port)
