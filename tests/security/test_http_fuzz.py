"""Every endpoint against junk: whatever comes, the answer is a status and a text of ours, never an internal error."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from node.http.app import all_routes
from node.http.context import Route
from tests.support.http_api import serving

SKIPPED = ("/v1/agent/leave", "/v1/agent/monitor", "/v1/agent/connect/proxy/{id}/stream")
KEYS = (
    "Name", "ID", "Port", "Tags", "Meta", "Check", "Checks", "Kind", "Proxy", "Connect", "SidecarService", "Weights",
    "Node", "Address", "Service", "TTL", "HTTP", "Interval", "Status", "SourceName", "DestinationName", "Action",
    "Permissions", "Verb", "Key", "Value", "KV", "Behavior", "LockDelay", "NodeChecks", "Upstreams", "Header",
    "Config",
    "TaggedAddresses", "Target", "ClientCertURI", "Provider", "Value", "Reason", "Args", "CheckID", "Locality",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 80, 2**63, 2**70, 1e308, 0.5, "", "x", "passing", "allow", "10s", "-5s", "set",
    "a" * 300,
    "\x00", "\u202e", "*", "a:b", "a/b", "\ud7ff", "127.0.0.1:1", "http://127.0.0.1:1/", "not base64!", "consul",
)  # fmt: skip
QUERIES = (
    "", "index=1&wait=1ms", "index=18446744073709551615&wait=1ms", "index=99999999999999999999999", "wait=1x",
    "stale", "consistent", "cached", "filter=", "filter=a", 'filter=Node=="x"', "near=_agent", "passing=x",
    "tag=a&tag=b", "dc=dc1", "pretty", "recurse", "keys", "raw", "cas=-1", "cas=1", "flags=x", "acquire=",
    "release=x", "source=a&destination=b", "source=a/b/c/d&destination=", "by=source&name=*", "enable=maybe",
    "enable=true", "node-meta=", "kind=x&value=y", "max_stale=x", "hash=x&wait=1ms", "format=text", "name=%00",
)  # fmt: skip
IDS = ("x", "a%2Fb", "%00", "*", "a:b", "..", "%C3%BC", "a%20b", "11111111-2222-3333-4444-555555555555", "%25", "any")


def junk(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.random()
    if depth > 4 or choice < 0.3:
        return rng.choice(SCALARS)
    if choice < 0.45:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(KEYS): junk(rng, depth + 1) for _ in range(rng.randrange(6))}


def bodies(rng: random.Random) -> list[bytes]:
    made = [json.dumps(junk(rng)).encode() for _ in range(12)]
    return [*made, b"", b"{", b"\xff\xfe", b"[" * 2000, b"null", b'{"a":' * 500 + b"1" + b"}" * 500]


def path_of(route: Route, rng: random.Random) -> str:
    return re.sub(r"\{(\w+)(?::[^{}]*)?\}", lambda match: rng.choice(IDS), route.path)


ROUTES = [route for route in all_routes() if route.path not in SKIPPED and "family" not in route.path]


@pytest.mark.parametrize("seed", [1, 2])
async def test_junk_never_ends_in_an_internal_error(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with serving(tmp_path, register_wait_s=0.2) as node:
        for route in ROUTES:
            for method in route.methods:
                writes = method in ("PUT", "POST")
                for body in bodies(rng) if writes else [b""] * 8:
                    url = f"{node.url}{path_of(route, rng)}?{rng.choice(QUERIES)}"
                    async with node.http.request(method, url, data=body) as answer:
                        said = await answer.text(errors="replace")
                    told = (method, url, body[:200], answer.status, said)
                    assert answer.status < 500 or "internal error" not in said, told
                    assert answer.status < 500 or "unexpected shape" not in said, told
        assert node.agent.sync is not None
        assert (await node.get("/v1/agent/self"))["Config"]["NodeName"] == "n1"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", f"/v1/kv/a?cas={'9' * 5000}", b"v"),
        ("PUT", f"/v1/kv/a?flags={'9' * 5000}", b"v"),
        ("DELETE", f"/v1/kv/a?cas={'9' * 5000}", b""),
        ("GET", f"/v1/kv/a?index={'9' * 5000}", b""),
        ("PUT", f"/v1/config?cas={'9' * 5000}", b'{"Kind": "service-defaults", "Name": "a"}'),
        ("PUT", "/v1/agent/check/register", b'{"Name": "c", "TCP": "h:%s", "Interval": "1s"}' % (b"9" * 5000)),
        ("PUT", "/v1/agent/check/register", b'{"Name": "c", "TTL": "%ss"}' % (b"9" * 5000)),
    ],
)
async def test_numbers_of_thousands_of_digits_are_bad_requests(
    tmp_path: Path, method: str, path: str, body: bytes
) -> None:
    """Python refuses to read them, which is no error of the agent's."""
    async with serving(tmp_path) as node:
        async with node.http.request(method, node.url + path, data=body) as answer:
            assert answer.status == 400, (answer.status, (await answer.text())[:200])
            assert len(await answer.text()) < 500


@pytest.mark.parametrize("kind", ["TCP", "UDP", "GRPC", "H2PING"])
@pytest.mark.parametrize("target", ["nohost", "h:", "h:0", "h:65536", "h:x", ":", "/x"])
async def test_a_check_of_no_address_is_refused_and_not_kept(tmp_path: Path, kind: str, target: str) -> None:
    check = {"Name": "c", kind: target, "Interval": "1s"}
    async with serving(tmp_path) as node:
        for path, body in (
            ("/v1/agent/check/register", check),
            ("/v1/agent/service/register", {"Name": "s", "Check": check}),
        ):
            said = await node.put(path, body, status=400)
            assert f"{kind}: " in said, said
            assert "is not HOST:PORT" in said
        assert await node.get("/v1/agent/checks") == {}
        assert await node.get("/v1/agent/services") == {}
    async with serving(tmp_path) as node:  # nothing was saved that a next start would stumble over
        assert await node.get("/v1/agent/checks") == {}
