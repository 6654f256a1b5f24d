"""Every endpoint with the least that its token needs: with it one gets through, without it one does not."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node.http.acl_access import BODY, COMMAND, FILTER, OPEN, PATH, TABLE
from node.http.acl_commands import _NEEDS
from node.http.app import all_routes, canonical
from node.http.context import HttpOptions
from node.protocol import ACL_COMMANDS, SERVERS_ONLY
from raftstate.state import commands as c
from tests.support.acl import ROOT, ask, guarded, token_with
from tests.support.http_api import Node

KEY = base64.b64encode(b"v").decode()
AGENT_R, AGENT_W = 'agent "n1" { policy = "read" }', 'agent "n1" { policy = "write" }'
NODE_W, WEB_R = 'node "n1" { policy = "write" }', 'service "web" { policy = "read" }'
WEB_W = 'service "web" { policy = "write" }'
ALL_R = 'node_prefix "" { policy = "read" } service_prefix "" { policy = "read" }'
CALL = {"Target": "web", "ClientCertURI": "spiffe://x/ns/default/dc/dc1/svc/a"}
OP_R, OP_W, ACL_R, ACL_W = 'operator = "read"', 'operator = "write"', 'acl = "read"', 'acl = "write"'
INTENT_W = 'service "web" { policy = "read" intentions = "write" }'
PROXY_W = 'service "web-sidecar-proxy" { policy = "write" }'
UUID = "00000000-0000-4000-8000-000000000001"
INTENTION = {"SourceName": "app", "DestinationName": "web", "Action": "allow"}
REVOKED = {"Kind": "service", "Value": "gone"}
TXN = [{"KV": {"Verb": "set", "Key": "k/1", "Value": KEY}}]
NEW_NODE = {"Node": "ext", "Address": "10.0.0.9", "Service": {"Service": "db"}}
EXT_W = 'node "ext" { policy = "write" } service "db" { policy = "write" }'

REFUSED: list[tuple[str, str, Any, str]] = [
    # (method and pattern, path and query, body, rules that are enough)
    ("GET /v1/agent/self", "", None, AGENT_R),
    ("GET /v1/agent/host", "", None, OP_R),
    ("GET /v1/agent/version", "", None, AGENT_R),
    ("PUT /v1/agent/reload", "", None, AGENT_W),
    ("PUT /v1/agent/leave", "", None, AGENT_W),
    ("PUT /v1/agent/join/{address}", "/v1/agent/join/10.0.0.1", None, AGENT_W),
    ("PUT /v1/agent/force-leave/{node}", "/v1/agent/force-leave/n9", None, OP_W),
    ("GET /v1/agent/metrics", "", None, AGENT_R),
    ("PUT /v1/agent/token/{kind}", "/v1/agent/token/dns", {"Token": UUID}, AGENT_W),
    ("GET /v1/agent/service/{id}", "/v1/agent/service/web-1", None, WEB_R),
    ("PUT /v1/agent/service/register", "", {"Name": "web", "ID": "web-2"}, WEB_W),
    ("PUT /v1/agent/service/deregister/{id}", "/v1/agent/service/deregister/web-1", None, WEB_W),
    ("PUT /v1/agent/service/maintenance/{id}", "/v1/agent/service/maintenance/web-1?enable=true", None, WEB_W),
    ("PUT /v1/agent/maintenance", "/v1/agent/maintenance?enable=true", None, NODE_W),
    ("GET /v1/agent/health/service/id/{id}", "/v1/agent/health/service/id/web-1", None, WEB_R),
    ("GET /v1/agent/health/service/name/{name}", "/v1/agent/health/service/name/web", None, WEB_R),
    ("PUT /v1/agent/check/register", "", {"Name": "c", "TTL": "30s", "ServiceID": "web-1"}, WEB_W),
    ("PUT /v1/agent/check/deregister/{id}", "/v1/agent/check/deregister/service:web-1", None, WEB_W),
    ("PUT /v1/agent/check/pass/{id}", "/v1/agent/check/pass/service:web-1", None, WEB_W),
    ("PUT /v1/agent/check/warn/{id}", "/v1/agent/check/warn/node-check", None, NODE_W),
    ("PUT /v1/agent/check/fail/{id}", "/v1/agent/check/fail/service:web-1", None, WEB_W),
    ("PUT /v1/agent/check/update/{id}", "/v1/agent/check/update/service:web-1", {"Status": "passing"}, WEB_W),
    ("GET /v1/agent/connect/ca/leaf/{service}", "/v1/agent/connect/ca/leaf/web", None, WEB_W),
    ("POST /v1/agent/connect/authorize", "", CALL, WEB_W),
    ("PUT /v1/agent/connect/authorize", "", CALL, WEB_W),
    ("PUT /v1/agent/connect/answer/{id}", "/v1/agent/connect/answer/web-1", None, WEB_W),
    ("PUT /v1/catalog/register", "", NEW_NODE, EXT_W),
    ("PUT /v1/catalog/deregister", "", {"Node": "n1", "ServiceID": "web-1"}, WEB_W),
    ("POST /v1/connect/intentions", "", INTENTION, INTENT_W),
    ("GET /v1/connect/intentions/exact", "?source=a&destination=web", None, WEB_R),
    ("PUT /v1/connect/intentions/exact", "?source=b&destination=web", {"Action": "deny"}, INTENT_W),
    ("DELETE /v1/connect/intentions/exact", "?source=a&destination=web", None, INTENT_W),
    ("GET /v1/connect/intentions/match", "?by=destination&name=web", None, WEB_R),
    ("GET /v1/connect/intentions/check", "?source=a&destination=web", None, WEB_R),
    ("GET /v1/connect/intentions/{id}", "/v1/connect/intentions/{intention}", None, WEB_R),
    ("PUT /v1/connect/intentions/{id}", "/v1/connect/intentions/{intention}", {"Action": "deny"}, INTENT_W),
    ("DELETE /v1/connect/intentions/{id}", "/v1/connect/intentions/{intention}", None, INTENT_W),
    ("GET /v1/connect/ca/configuration", "", None, OP_R),
    ("PUT /v1/connect/ca/configuration", "", {"Config": {"LeafCertTTL": "72h"}}, OP_W),
    ("PUT /v1/connect/ca/rotate", "", None, OP_W),
    ("GET /v1/connect/revocations", "", None, OP_R),
    ("PUT /v1/connect/revocations", "", REVOKED, OP_W),
    ("DELETE /v1/connect/revocations", "?kind=service&value=gone", None, OP_W),
    ("GET /v1/operator/raft/configuration", "", None, OP_R),
    ("DELETE /v1/operator/raft/peer", "?id=x", None, OP_W),
    ("PUT /v1/operator/raft/peer", "?id=x&address=10.0.0.1:8300", None, OP_W),
    ("POST /v1/operator/raft/transfer-leader", "", None, OP_W),
    ("PUT /v1/operator/raft/transfer-leader", "", None, OP_W),
    ("GET /v1/operator/autopilot/health", "", None, OP_R),
    ("GET /v1/operator/autopilot/state", "", None, OP_R),
    ("GET /v1/operator/autopilot/configuration", "", None, OP_R),
    ("PUT /v1/operator/autopilot/configuration", "", {}, OP_W),
    ("GET /v1/operator/usage", "", None, OP_R),
    ("PUT /v1/operator/debug/partition", "", {"Peers": []}, OP_W),
    ("GET /v1/kv/{key}", "/v1/kv/k/1", None, 'key "k/1" { policy = "read" }'),
    ("PUT /v1/kv/{key}", "/v1/kv/k/1", "v", 'key_prefix "k/" { policy = "write" }'),
    ("DELETE /v1/kv/{key}", "/v1/kv/k/1", None, 'key "k/1" { policy = "write" }'),
    ("PUT /v1/session/create", "", {}, 'session "n1" { policy = "write" }'),
    ("PUT /v1/session/destroy/{id}", "/v1/session/destroy/{session}", None, 'session "n1" { policy = "write" }'),
    ("PUT /v1/session/renew/{id}", "/v1/session/renew/{session}", None, 'session "n1" { policy = "write" }'),
    ("PUT /v1/event/fire/{name}", "/v1/event/fire/deploy", None, 'event "deploy" { policy = "write" }'),
    ("PUT /v1/config", "", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"}, WEB_W),
    ("PUT /v1/config", "", {"Kind": "proxy-defaults", "Name": "global"}, 'mesh = "write"'),
    ("PUT /v1/config", "", {"Kind": "service-intentions", "Name": "web", "Sources": []}, INTENT_W),
    ("GET /v1/config/{kind}/{name}", "/v1/config/service-defaults/web", None, WEB_R),
    ("DELETE /v1/config/{kind}/{name}", "/v1/config/service-defaults/web", None, WEB_W),
    ("GET /v1/discovery-chain/{service}", "/v1/discovery-chain/web", None, WEB_R),
    ("POST /v1/discovery-chain/{service}", "/v1/discovery-chain/web", None, WEB_R),
    ("GET /v1/coordinate/node/{node}", "/v1/coordinate/node/n1", None, 'node "n1" { policy = "read" }'),
    ("PUT /v1/coordinate/update", "", {}, NODE_W),
    ("GET /v1/snapshot", "", None, ACL_W),
    ("PUT /v1/snapshot", "", None, ACL_W),
    ("GET /v1/acl/replication", "", None, ACL_R),
    ("GET /v1/acl/tokens", "", None, ACL_R),
    ("PUT /v1/acl/token", "", {"Description": "x"}, ACL_W),
    ("PUT /v1/acl/token/{id}/clone", "/v1/acl/token/{token}/clone", {}, ACL_W),
    ("GET /v1/acl/token/{id}", "/v1/acl/token/{token}", None, ACL_R),
    ("PUT /v1/acl/token/{id}", "/v1/acl/token/{token}", {}, ACL_W),
    ("DELETE /v1/acl/token/{id}", "/v1/acl/token/{token}", None, ACL_W),
    ("GET /v1/acl/policies", "", None, ACL_R),
    ("PUT /v1/acl/policy", "", {"Name": "p"}, ACL_W),
    ("GET /v1/acl/policy/name/{name}", "/v1/acl/policy/name/global-management", None, ACL_R),
    ("GET /v1/acl/policy/{id}", f"/v1/acl/policy/{UUID}", None, ACL_R),
    ("PUT /v1/acl/policy/{id}", f"/v1/acl/policy/{UUID}", {"Name": "p"}, ACL_W),
    ("DELETE /v1/acl/policy/{id}", f"/v1/acl/policy/{UUID}", None, ACL_W),
    ("GET /v1/acl/roles", "", None, ACL_R),
    ("PUT /v1/acl/role", "", {"Name": "r"}, ACL_W),
    ("GET /v1/acl/role/name/{name}", "/v1/acl/role/name/r", None, ACL_R),
    ("GET /v1/acl/role/{id}", f"/v1/acl/role/{UUID}", None, ACL_R),
    ("PUT /v1/acl/role/{id}", f"/v1/acl/role/{UUID}", {"Name": "r"}, ACL_W),
    ("DELETE /v1/acl/role/{id}", f"/v1/acl/role/{UUID}", None, ACL_W),
    ("GET /v1/acl/auth-methods", "", None, ACL_R),
    ("GET /v1/acl/binding-rules", "", None, ACL_R),
    ("GET /v1/acl/templated-policies", "", None, ACL_R),
    ("GET /v1/internal/ui/service-topology/{service}", "/v1/internal/ui/service-topology/web", None, WEB_R),
]  # fmt: skip
"""Endpoints that refuse (403) who lacks something."""

NODE_R = 'node "n1" { policy = "read" }'
EMPTIED: list[tuple[str, str, str]] = [
    # (method and pattern, path, rules under which all there is is shown)
    ("GET /v1/agent/members", "", NODE_R),
    ("GET /v1/agent/services", "", WEB_R),
    ("GET /v1/agent/checks", "", NODE_R + WEB_R),
    ("GET /v1/catalog/nodes", "", NODE_R),
    ("GET /v1/catalog/services", "", WEB_R),
    ("GET /v1/catalog/service/{service}", "/v1/catalog/service/web", NODE_R + WEB_R),
    ("GET /v1/catalog/connect/{service}", "/v1/catalog/connect/nat", NODE_R + 'service "nat" { policy = "read" }'),
    ("GET /v1/catalog/node/{node}", "/v1/catalog/node/n1", ALL_R),
    ("GET /v1/catalog/node-services/{node}", "/v1/catalog/node-services/n1", ALL_R),
    ("GET /v1/health/service/{service}", "/v1/health/service/web", NODE_R + WEB_R),
    ("GET /v1/health/connect/{service}", "/v1/health/connect/nat", NODE_R + 'service "nat" { policy = "read" }'),
    ("GET /v1/health/node/{node}", "/v1/health/node/n1", NODE_R + WEB_R),
    ("GET /v1/health/checks/{service}", "/v1/health/checks/web", NODE_R + WEB_R),
    ("GET /v1/health/state/{state}", "/v1/health/state/any", NODE_R + WEB_R),
    ("GET /v1/connect/intentions", "", WEB_R),
    ("GET /v1/kv/{key}", "/v1/kv/k/?recurse", 'key_prefix "k/" { policy = "read" }'),
    ("GET /v1/kv/{key}", "/v1/kv/k/?keys", 'key "k/1" { policy = "read" }'),
    ("GET /v1/session/info/{id}", "/v1/session/info/{session}", 'session "n1" { policy = "read" }'),
    ("GET /v1/session/list", "", 'session_prefix "n" { policy = "read" }'),
    ("GET /v1/session/node/{node}", "/v1/session/node/n1", 'session "n1" { policy = "read" }'),
    ("GET /v1/event/list", "", 'event "seen" { policy = "read" }'),
    ("GET /v1/config/{kind}", "/v1/config/service-defaults", WEB_R),
    ("GET /v1/coordinate/nodes", "", NODE_R),
    ("GET /v1/internal/ui/services", "", NODE_R + WEB_R + 'service "nat" { policy = "read" }'),
    ("GET /v1/discovery/prometheus", "", NODE_R + WEB_R),
]  # fmt: skip
"""Endpoints that show to each what it may see."""

HELD = {"GET /v1/agent/monitor", "POST /v1/agent/connect/proxy/{id}/stream"}
"""Answers without an end: tried in test_acl_api."""
ELSEWHERE = {"PUT /v1/txn"}
"""Refused operation by operation: tried in test_acl_api."""


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with guarded(tmp_path, http_options=HttpOptions(on_leave=lambda: None)) as node:
        yield node


async def furnish(node: Node) -> dict[str, str]:
    """Make one of everything; return the ids."""

    async def put(path: str, body: Any = None, method: str = "PUT") -> Any:
        status, text, _ = await ask(node, method, path, ROOT, json=body)
        assert status == 200, (path, status, text)
        return json.loads(text) if text else None

    await put("/v1/agent/service/register", {"Name": "web", "ID": "web-1", "Port": 80, "Check": {"TTL": "1h"}})
    await put("/v1/agent/service/register", {"Name": "nat", "Port": 81, "Connect": {"Native": True}})
    await put("/v1/agent/check/register", {"Name": "node-check", "TTL": "1h"})
    await put("/v1/kv/k/1", "x")
    session = (await put("/v1/session/create", {"Node": "n1", "Checks": []}))["ID"]
    intention = (await put("/v1/connect/intentions", {**INTENTION, "SourceName": "a"}, "POST"))["ID"]
    await put("/v1/connect/revocations", REVOKED)
    await put("/v1/config", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"})
    await put("/v1/event/fire/seen")
    made = await put("/v1/acl/token", {"Description": "there"})
    return {"{session}": session, "{intention}": intention, "{token}": made["AccessorID"]}


def test_the_table_has_every_endpoint_and_nothing_else() -> None:
    routes = {f"{method} {canonical(route.path)}" for route in all_routes() for method in route.methods}
    assert routes - set(TABLE) == set(), "an endpoint without a rule is refused to everyone"
    assert set(TABLE) - routes == set()


def test_every_guarded_endpoint_is_tried_here() -> None:
    tried = {row[0] for row in REFUSED} | {row[0] for row in EMPTIED} | HELD | ELSEWHERE
    guarded_ones = {name for name, access in TABLE.items() if access.kind != OPEN}
    assert guarded_ones - tried == set()
    assert {access.kind for access in TABLE.values()} == {OPEN, PATH, COMMAND, BODY, FILTER}


def test_what_is_open_is_known() -> None:
    """Whatever is added here is for everyone who reaches the port."""
    assert {name for name, access in TABLE.items() if access.kind == OPEN} == {
        "GET /v1/status/leader", "GET /v1/status/peers",
        "GET /v1/agent/connect/ca/roots", "GET /v1/connect/ca/roots",
        "GET /v1/catalog/datacenters", "GET /v1/catalog/gateway-services/{gateway}",
        "GET /v1/health/ingress/{service}", "GET /v1/coordinate/datacenters", "GET /v1/openapi.json",
        "PUT /v1/acl/bootstrap", "GET /v1/acl/token/self",
        *(f"{method} /v1/acl/{{path}}" for method in ("GET", "PUT", "POST", "DELETE")),
        *(f"{method} /v1/{{family}}{{rest}}" for method in ("GET", "PUT", "POST", "DELETE")),
    }  # fmt: skip


def test_every_command_that_an_agent_may_write_has_its_rule() -> None:
    """Those of servers have no endpoint that writes them; those of access control are checked by the server."""
    kinds = set(c.Command.__args__)
    left = {kind.__name__ for kind in kinds - set(_NEEDS)}
    assert left - SERVERS_ONLY == set()
    assert left >= ACL_COMMANDS


def _path(row_path: str, pattern: str, ids: dict[str, str]) -> str:
    path = row_path if row_path.startswith("/") else pattern.partition(" ")[2] + row_path
    for name, value in ids.items():
        path = path.replace(name, value)
    return path


OTHER = 'key_prefix "" { policy = "write" } event_prefix "" { policy = "write" } query_prefix "" { policy = "write" }'


@pytest.mark.parametrize(("name", "path", "body", "rules"), REFUSED, ids=lambda value: str(value)[:60])
async def test_refused_without_its_rule(node: Node, name: str, path: str, body: Any, rules: str) -> None:
    ids = await furnish(node)
    method, target = name.partition(" ")[0], _path(path, name, ids)
    weak = await token_with(node.backend, "" if "key" in rules or "event" in rules else OTHER)
    for token in ("", weak):
        status, text, _ = await ask(node, method, target, token, json=body)
        assert status == 403, (status, text)
        assert text.startswith("Permission denied"), text
    if "write" in rules:
        weaker = await token_with(node.backend, rules.replace("write", "read"))
        rows_before = node.backend.machine.digest()
        status, text, _ = await ask(node, method, target, weaker, json=body)
        assert (status, text[:17]) == (403, "Permission denied"), text
        assert node.backend.machine.digest() == rows_before, "a refused write changes nothing"
    status, text, _ = await ask(node, method, target, await token_with(node.backend, rules), json=body)
    assert status != 403 or "Permission denied" not in text, text
    unfit = ("needs a cluster", "No node found", "AggregatedStatus")  # of these tests' single process; and a verdict
    assert status < 500 or any(words in text for words in unfit), (status, text)


@pytest.mark.parametrize(("name", "path", "rules"), EMPTIED, ids=lambda value: str(value)[:60])
async def test_emptied_without_its_rule(node: Node, name: str, path: str, rules: str) -> None:
    ids = await furnish(node)
    target = _path(path, name, ids)
    whole = json.loads((await ask(node, "GET", target, ROOT))[1])
    assert whole, "nothing there to be hidden"
    for token in ("", await token_with(node.backend, 'operator = "write" agent_prefix "" { policy = "write" }')):
        status, text, headers = await ask(node, "GET", target, token)
        if "{key}" in name:
            assert (status, text) == (404, "")
        else:
            assert status == 200, text
            assert json.loads(text) in ([], {}, None, {"Node": None, "Services": []}), text
        assert headers.get("X-Consul-Results-Filtered-By-ACLs") == "true"
    status, text, headers = await ask(node, "GET", target, await token_with(node.backend, rules))
    assert status == 200, text
    shown = json.loads(text)
    assert shown, text
    if "nat" not in str(whole) or "nat" in rules or "_prefix" in rules:
        assert shown == whole
        assert "X-Consul-Results-Filtered-By-ACLs" not in headers
