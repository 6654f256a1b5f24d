"""What comes from outside as bytes or texts: DNS messages, query strings, Envoys' requests. All of it is answered or
refused in words; nothing else is ever raised."""

from __future__ import annotations

import asyncio
import json
import random
import string
from typing import Any

from dnslib import DNSRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, MultiDict

from node.agent.definitions import BadDefinition
from node.dns import REQUEST_MAX, DnsServer
from node.dns_zone import UDP_PLAIN_MAX, Zone
from node.errors import NodeError
from node.http.errors import BadRequest
from node.http.options import MAX_WAIT_S, ReadOptions, read_options, wait_of
from node.nearness import Place
from node.xds import messages, types
from node.xds.server import XdsServer
from node.xds.session import Session
from raftstate.model.catalog import Check, InstanceHealth, Node, ServiceInstance
from raftstate.model.sidecar import SidecarUpdate
from tests.support.xds import make_snapshot

WORDS = st.text(string.ascii_letters + string.digits + ".-_:/%=\u00fc\x00 ", max_size=24)


class _Directory:
    """One service on one node, whatever is asked for."""

    row = InstanceHealth(
        Node("n1", "10.0.0.1", meta={"rfc1035-x": "\u00fc" * 300}),
        ServiceInstance("n1", "web-1", "web", port=80, tags=("a",)),
        (Check("n1", "c", status="passing"),),
    )

    async def service_name(self, name: str) -> str | None:
        return name

    async def instances(self, service: str, *, connect: bool) -> list[InstanceHealth]:
        return [self.row] * 200

    async def node(self, name: str) -> Node | None:
        return self.row.node

    async def node_at(self, address: str) -> Node | None:
        return self.row.node


def respond(data: bytes, *, udp: bool) -> bytes | None:
    server = DnsServer.__new__(DnsServer)  # its sockets are not what this is about
    directory: Any = _Directory()
    server._zone = Zone(directory, "dc1", ["consul"], here=Place("n1"), rng=random.Random(0))
    return asyncio.run(server.respond(data, udp=udp))


def judge(data: bytes, *, udp: bool) -> None:
    reply = respond(data, udp=udp)
    if reply is None:
        return
    assert reply[:2] == data[:2], "the id of the question"
    assert reply[2] & 0x80, "a reply says that it is one, or two servers could go on for ever"
    DNSRecord.parse(reply)
    assert len(reply) <= (UDP_PLAIN_MAX if udp and not _has_edns(data) else 65535)


def _has_edns(data: bytes) -> bool:
    try:
        return any(one.rtype == 41 for one in DNSRecord.parse(data).ar)
    except Exception:  # noqa: BLE001  what dnslib raises at junk is its own affair
        return False


@given(st.binary(max_size=REQUEST_MAX), st.booleans())
@example(b"\x00" * 12, True)
@example(b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01", True)  # a name that is itself
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_no_more_than_a_bad_dns_message(data: bytes, udp: bool) -> None:
    judge(data, udp=udp)


QUESTIONS = [
    bytes(DNSRecord.question(name, kind).pack())
    for name in ("web.service.consul", "_web._a.service.consul", "n1.node.consul", "1.0.0.10.in-addr.arpa")
    for kind in ("A", "AAAA", "SRV", "ANY", "TXT", "SOA", "NS", "PTR")
]


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A question with some of its bytes changed, cut short, or with something behind it."""
    data = bytearray(draw(st.sampled_from(QUESTIONS)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    keep = draw(st.just(len(data)) | st.integers(0, len(data)))
    return bytes(data[:keep]) + draw(st.sampled_from([b"", bytes(data), b"\xff" * 20]))


@given(mangled(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_mangled_question_is_answered_or_refused(data: bytes, udp: bool) -> None:
    judge(data, udp=udp)


NAMES = st.sampled_from(
    [
        "index",
        "wait",
        "stale",
        "consistent",
        "leader",
        "cached",
        "filter",
        "near",
        "node-meta",
        "max_stale",
        "dc",
        "x",
    ]
)
VALUES = st.one_of(
    WORDS,
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["10s", "-1s", "1h1ms", "9" * 400, "1e308s", "\u0661", "0x10", "+5", " 5", "5 ", "1_000"]),
)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.one_of(WORDS, st.sampled_from(["max-age=1", "max-age=x"])))
@example([("max_stale", "-1s")], "")
@settings(max_examples=200, deadline=None)
def test_any_query_string_is_options_within_bounds_or_a_bad_request(
    pairs: list[tuple[str, str]], cache_control: str
) -> None:
    query, headers = MultiDict(pairs), CIMultiDict({"Cache-Control": cache_control})
    refused = ""
    try:
        options = read_options(query, headers, random.Random(0))
        waits = wait_of(query, random.Random(0))
    except BadRequest as error:
        refused = error.text
    if refused:
        assert len(refused) < 300, "an error does not repeat whatever came"
        return
    assert isinstance(options, ReadOptions)
    assert 0 <= options.min_index < 2**64
    assert 0.0 <= options.wait_s <= MAX_WAIT_S * 17 / 16
    assert 0.0 <= waits <= MAX_WAIT_S * 17 / 16
    assert options.wait_s == 0.0 or options.min_index > 0
    assert options.mode in ("default", "stale", "consistent")
    assert options.max_stale_s is None or options.max_stale_s >= 0


class _Local:
    services: dict[str, Any] = {}


class _Agent:
    local = _Local()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        ["ID", "Name", "Kind", "Port", "Proxy", "Connect", "Check", "Checks", "Tags", "Meta", "Locality"]
    ),
    JSON,
    max_size=5,
)


@given(WORDS, st.one_of(JSON, FIELDS.map(json.dumps), WORDS))
@settings(max_examples=150, deadline=None)
def test_any_metadata_of_an_envoy_is_a_registration_or_an_error_in_words(node_id: str, brought: Any) -> None:
    agent: Any = _Agent()
    request = messages.DeltaRequest(type_url=types.CLUSTER)
    request.node.id = node_id.replace("\x00", "")
    request.node.metadata.update({"lictor.definition": _finite(brought)})
    refused = ""
    try:
        definition = XdsServer(agent)._definition(request)
    except (BadDefinition, NodeError) as error:
        refused = str(error)
    assert refused or definition.service_id() == request.node.id, "an Envoy speaks for the sidecar that it names"


def _finite(value: Any) -> Any:
    """Protobuf's Struct has no integers: what it cannot hold is not what is tried here."""
    return json.loads(json.dumps(value), parse_int=float)


REQUESTS: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    type_url=st.sampled_from([*types.PUSH_ORDER, "", "type.googleapis.com/unknown"]),
    resource_names_subscribe=st.lists(st.sampled_from(["*", "public", "leaf", "upstream:db", "", "x"]), max_size=3),
    resource_names_unsubscribe=st.lists(st.sampled_from(["*", "public", "leaf", "", "y"]), max_size=3),
    initial_resource_versions=st.dictionaries(
        st.sampled_from(["public", "leaf", "z"]),
        st.sampled_from(["", "1", "1.2.3", "..", "-1.x", "9" * 5000 + ".a"]),
        max_size=2,
    ),
    response_nonce=st.sampled_from(["", "1", "2", "999", "x"]),
)


@given(st.lists(REQUESTS, max_size=6))
@example([{"type_url": types.LISTENER, "initial_resource_versions": {types.PUBLIC_LISTENER: "9" * 5000 + ".a"}}])
@example([{"type_url": types.LISTENER, "initial_resource_versions": {types.PUBLIC_LISTENER: "\u0661.a.b"}}])
@settings(max_examples=150, deadline=None)
def test_any_requests_of_an_envoy_leave_its_stream_in_order(requests: list[dict[str, Any]]) -> None:
    session = Session("web-1-sidecar-proxy")
    snapshot = make_snapshot()
    session.update(SidecarUpdate(version=1, **{name: getattr(snapshot, name) for name in snapshot.__struct_fields__}))
    for fields in requests:
        session.request(messages.DeltaRequest(**fields))
        session.responses()
    session.request(messages.DeltaRequest(type_url=types.SECRET, resource_names_subscribe=["trust"]))
    sent = [one.name for response in session.responses() for one in response.resources]
    asked_before = any(
        fields["type_url"] == types.SECRET and not fields.get("resource_names_subscribe") for fields in requests
    )
    assert "trust" in sent or asked_before, "a stream goes on whatever came on it"
