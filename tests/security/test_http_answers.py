"""Each answer of a catalog that has something of everything is what ``/v1/openapi.json`` says of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.security.test_http_schema import LEFT_OUT, TIMEOUT_S, Node

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jsonschema_rs

LEAF = "spiffe://x/ns/default/dc/dc1/svc/api"
WRITES: list[tuple[str, str, Any]] = [
    ("PUT", "/v1/agent/service/register", {
        "ID": "web-1", "Name": "web", "Port": 80, "Tags": ["v1"], "Meta": {"version": "1"},
        "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 80}},
        "Weights": {"Passing": 3, "Warning": 1}, "Locality": {"Region": "r", "Zone": "z"},
        "Checks": [{"TTL": "1h", "Status": "passing"}, {"CheckID": "warns", "TTL": "1h", "Status": "warning"}],
        "Connect": {"SidecarService": {"Proxy": {
            "Config": {"a": 1},
            "Upstreams": [{"DestinationName": "api", "LocalBindPort": 9000, "Config": {"b": 2}}],
        }}},
    }),
    ("PUT", "/v1/agent/service/register", {"Name": "native", "Port": 81, "Connect": {"Native": True}}),
    ("PUT", "/v1/agent/service/register", {"Name": "ill", "Port": 82, "Check": {"TTL": "1h", "Status": "critical"}}),
    ("PUT", "/v1/agent/check/register", {"Name": "own", "TTL": "1h", "Notes": "n"}),
    ("PUT", "/v1/agent/check/pass/own?note=well", None),
    ("PUT", "/v1/agent/check/warn/own", None),
    ("PUT", "/v1/agent/check/fail/own", None),
    ("PUT", "/v1/agent/check/update/own", {"Status": "passing", "Output": "o"}),
    ("PUT", "/v1/agent/maintenance?enable=true&reason=r", None),
    ("PUT", "/v1/agent/maintenance?enable=false", None),
    ("PUT", "/v1/agent/service/maintenance/native?enable=true", None),
    ("PUT", "/v1/agent/reload", None),
    ("PUT", "/v1/agent/join/10.0.0.1", None),
    ("PUT", "/v1/coordinate/update", {}),
    ("PUT", "/v1/catalog/register", {
        "Node": "ext", "Address": "10.0.0.9", "NodeMeta": {"m": "1"}, "TaggedAddresses": {"lan": "10.0.0.9"},
        "Service": {"ID": "db-1", "Service": "db", "Port": 5432, "Tags": ["x"]},
        "Check": {"CheckID": "c", "Name": "c", "ServiceID": "db-1", "Status": "passing",
            "Definition": {"TCP": "a:1"}},
    }),
    ("PUT", "/v1/connect/intentions/exact?source=web&destination=api", {"Action": "allow", "Meta": {"a": "b"}}),
    ("PUT", "/v1/connect/intentions/exact?source=api&destination=web", {"Permissions": [
        {"Action": "allow", "HTTP": {
            "PathPrefix": "/a", "Methods": ["GET"], "Header": [{"Name": "x", "Exact": "y"}]}},
        {"Action": "deny", "HTTP": {"Header": [{"Name": "x", "Present": True, "Invert": True}]}},
    ]}),
    ("POST", "/v1/connect/intentions", {"SourceName": "*", "DestinationName": "db", "Action": "deny"}),
    ("PUT", "/v1/config", {"Kind": "service-defaults", "Name": "api", "Protocol": "http"}),
    ("PUT", "/v1/config", {"Kind": "service-resolver", "Name": "api", "DefaultSubset": "v1", "RequestTimeout": "5s",
        "Subsets": {"v1": {"Filter": "Service.Meta.version == 1", "OnlyPassing": True}, "v2": {}},
        "Failover": {"v1": {"Service": "api", "ServiceSubset": "v2"}},
        "LoadBalancer": {"Policy": "maglev", "HashPolicies": [{"Field": "header", "FieldValue": "x"}]}}),
    ("PUT", "/v1/config", {"Kind": "service-splitter", "Name": "api", "Splits": [
        {"Weight": 90, "ServiceSubset": "v1", "RequestHeaders": {"Add": {"a": "b"}}},
        {"Weight": 10, "ServiceSubset": "v2"}]}),
    ("PUT", "/v1/config", {"Kind": "service-router", "Name": "api", "Routes": [
        {"Match": {"HTTP": {"PathPrefix": "/x"}}, "Destination": {"Service": "api", "RequestTimeout": "1s"}}]}),
    ("PUT", "/v1/config?cas=0", {"Kind": "service-defaults", "Name": "gone", "Protocol": "tcp"}),
    ("DELETE", "/v1/config/service-defaults/gone", None),
    ("DELETE", "/v1/config/service-defaults/gone?cas=1", None),
    ("PUT", "/v1/session/create", {"Name": "s", "TTL": "60s"}),
    ("PUT", "/v1/kv/a/b?flags=3", b"value"),
    ("PUT", "/v1/kv/a/empty", b""),
    ("DELETE", "/v1/kv/a/none", None),
    ("PUT", "/v1/txn", [{"KV": {"Verb": "set", "Key": "t", "Value": "dg=="}}, {"KV": {"Verb": "get", "Key": "a/b"}},
        {"Node": {"Verb": "get", "Node": {"Node": "ext"}}},
        {"Service": {"Verb": "get", "Node": "ext", "Service": {"ID": "db-1"}}},
        {"Check": {"Verb": "get", "Check": {"Node": "ext", "CheckID": "c"}}}]),
    ("PUT", "/v1/event/fire/deploy?node=.*", b"payload"),
    ("PUT", "/v1/connect/revocations", {"Kind": "service", "Value": "old", "Reason": "r"}),
    ("PUT", "/v1/connect/ca/configuration", {"Provider": "consul", "Config": {"LeafCertTTL": "72h"}}),
    ("PUT", "/v1/operator/autopilot/configuration", {"CleanupDeadServers": True}),
    ("PUT", "/v1/connect/ca/rotate", None),
    ("POST", "/v1/agent/connect/authorize", {"Target": "api", "ClientCertURI": LEAF, "ClientCertSerial": "01"}),
    ("POST", "/v1/operator/raft/transfer-leader?id=server-1", None),
]  # fmt: skip
OTHER_STATUSES: list[tuple[str, str, Any, int]] = [
    ("PUT", "/v1/txn", [{"KV": {"Verb": "check-index", "Key": "t", "Index": 1}}], 409),
    ("GET", "/v1/agent/health/service/id/web-1", None, 429),
    ("GET", "/v1/agent/health/service/name/ill", None, 503),
]  # fmt: skip
READS = [
    "/v1/agent/self", "/v1/agent/host", "/v1/agent/version", "/v1/agent/members", "/v1/agent/metrics",
    "/v1/agent/metrics?format=prometheus", "/v1/agent/services", "/v1/agent/service/web-1",
    "/v1/agent/service/web-1-sidecar-proxy", "/v1/agent/checks", "/v1/agent/connect/ca/roots",
    "/v1/agent/connect/ca/roots?pem=true", "/v1/agent/connect/ca/leaf/web", "/v1/catalog/datacenters",
    "/v1/catalog/nodes", "/v1/catalog/services", "/v1/catalog/service/web", "/v1/catalog/service/web?cached",
    "/v1/catalog/service/web-sidecar-proxy", "/v1/catalog/connect/web", "/v1/catalog/connect/native",
    "/v1/catalog/node/server-1", "/v1/catalog/node/ext", "/v1/catalog/node-services/server-1",
    "/v1/catalog/node-services/none", "/v1/health/service/web", "/v1/health/service/web?cached",
    "/v1/health/service/web-sidecar-proxy", "/v1/health/connect/web", "/v1/health/node/server-1",
    "/v1/health/checks/web", "/v1/health/state/any", "/v1/connect/intentions", "/v1/connect/ca/roots",
    "/v1/connect/intentions/exact?source=web&destination=api",
    "/v1/connect/intentions/exact?source=api&destination=web",
    "/v1/connect/intentions/match?by=destination&name=web", "/v1/connect/intentions/{intention}",
    "/v1/connect/intentions/check?source=web&destination=api", "/v1/connect/ca/configuration",
    "/v1/connect/revocations", "/v1/coordinate/datacenters", "/v1/coordinate/nodes", "/v1/coordinate/node/ext",
    "/v1/config/service-router", "/v1/config/service-router/api", "/v1/discovery-chain/api", "/v1/kv/a/b",
    "/v1/kv/a/b?raw", "/v1/kv/a?recurse", "/v1/kv/a?keys", "/v1/session/info/{session}", "/v1/session/list",
    "/v1/session/node/server-1", "/v1/event/list", "/v1/discovery/prometheus", "/v1/internal/ui/services",
    "/v1/internal/ui/service-topology/web", "/v1/operator/raft/configuration", "/v1/operator/autopilot/health",
    "/v1/operator/autopilot/state", "/v1/operator/autopilot/configuration", "/v1/operator/usage",
    "/v1/status/leader", "/v1/status/peers", "/v1/openapi.json",
]  # fmt: skip
EMPTY = ["/v1/catalog/gateway-services/g", "/v1/health/ingress/web", "/v1/catalog/node/none", "/v1/session/info/00"]
"""Reads whose answer is empty, and is meant to be."""
NOT_READ = {"/v1/snapshot", "/v1/acl/{path}", "/v1/{family}{rest}"} | LEFT_OUT


class Described:
    """The API's description."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, str]] = set()
        self._patterns = [
            (path, re.compile(re.sub(r"\\\{\w+\\\}", within, re.escape(path))))
            for within in ("[^/]+", ".*")
            for path in sorted(document["paths"], key=lambda path: path.count("{"))
        ]

    def operation(self, method: str, path: str) -> dict[str, Any]:
        """Return what is said of a request: of the path that fits it most closely."""
        best = next(
            known
            for known, pattern in self._patterns
            if pattern.fullmatch(path) and method.lower() in self.document["paths"][known]
        )
        self.seen.add((method, best))
        operation: dict[str, Any] = self.document["paths"][best][method.lower()]
        return operation

    def judge(self, method: str, path: str, answer: requests.Response) -> Any:
        """Fail unless the answer is as described; return its JSON, or its text."""
        responses = self.operation(method, path.partition("?")[0])["responses"]
        where = f"{method} {path}: {answer.status_code} {answer.text[:300]}"
        assert str(answer.status_code) in responses, where
        content = responses[str(answer.status_code)].get("content")
        if content is None:
            assert answer.content == b"", f"{where}: the description knows no body"
            return None
        media = answer.headers["Content-Type"].partition(";")[0]
        assert media in content, f"{where}: {media}"
        if media != "application/json":
            return answer.text
        schema = content[media]["schema"] | {"components": self.document["components"]}
        assert schema.keys() > {"components"}, f"{where}: any JSON would do"
        problems = [
            f"{error.instance_path}: {error.message}" for error in jsonschema_rs.iter_errors(schema, answer.json())
        ]
        assert not problems, f"{where}\n" + "\n".join(problems)
        return answer.json()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Node(tmp_path_factory.mktemp("answers")) as one:
        yield one


def test_every_answer_is_as_described(node: Node) -> None:
    base = f"http://127.0.0.1:{node.port}"
    with requests.Session() as session:

        def ask(method: str, path: str, body: Any = None) -> requests.Response:
            data = {"data": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
            return session.request(method, base + path, timeout=TIMEOUT_S, **data)

        described = Described(ask("GET", "/v1/openapi.json").json())
        known: dict[str, str] = {}
        for method, path, body in WRITES:
            answer = ask(method, path, body)
            assert answer.status_code == 200, f"{method} {path}: {answer.status_code} {answer.text}"
            value = described.judge(method, path, answer)
            if path.startswith("/v1/session/create"):
                known["session"] = value["ID"]
            elif (method, path) == ("POST", "/v1/connect/intentions"):
                known["intention"] = value["ID"]
        ask("PUT", f"/v1/kv/a/b?acquire={known['session']}", b"held")
        for method, path, body, status in OTHER_STATUSES:
            answer = ask(method, path, body)
            assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
            assert described.judge(method, path, answer)
        for path in READS + EMPTY:
            path = path.format(**known)
            answer = ask("GET", path)
            assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
            value = described.judge("GET", path, answer)
            assert bool(value) != (path in EMPTY), f"{path}: {value}"
        for method, path, body in (
            ("PUT", f"/v1/session/renew/{known['session']}", None),
            ("PUT", f"/v1/session/destroy/{known['session']}", None),
            ("PUT", f"/v1/connect/intentions/{known['intention']}", {"Action": "allow"}),
            ("DELETE", f"/v1/connect/intentions/{known['intention']}", None),
            ("DELETE", "/v1/connect/intentions/exact?source=web&destination=api", None),
            ("DELETE", "/v1/connect/revocations?kind=service&value=old", None),
            ("PUT", "/v1/catalog/deregister", {"Node": "ext"}),
            ("PUT", "/v1/agent/check/deregister/own", None),
            ("PUT", "/v1/agent/service/deregister/native", None),
        ):
            answer = ask(method, path, body)
            assert answer.status_code == 200, f"{method} {path}: {answer.status_code} {answer.text}"
            described.judge(method, path, answer)
    reads = {(method.upper(), path) for path, methods in described.document["paths"].items() for method in methods}
    reads = {(method, path) for method, path in reads if not path.startswith("/v1/acl/")}
    left = {path for method, path in reads - described.seen if method == "GET"} - NOT_READ
    assert not left, f"reads that are judged by nothing: {sorted(left)}"
    writes = {(method, path) for method, path in reads - described.seen if method != "GET" and path not in NOT_READ}
    assert writes <= WRITES_ELSEWHERE, f"writes that are judged by nothing: {sorted(writes - WRITES_ELSEWHERE)}"


WRITES_ELSEWHERE = {
    ("PUT", "/v1/agent/connect/answer/{id}"),  # of a sidecar that holds its stream
    ("PUT", "/v1/agent/token/{kind}"),
    ("PUT", "/v1/agent/connect/authorize"),  # as POST
    ("PUT", "/v1/operator/raft/transfer-leader"),
    ("POST", "/v1/discovery-chain/{service}"),
}


def test_an_answer_that_is_not_as_described_is_noticed(node: Node) -> None:
    described = Described(requests.get(f"http://127.0.0.1:{node.port}/v1/openapi.json", timeout=TIMEOUT_S).json())
    answer = requests.get(f"http://127.0.0.1:{node.port}/v1/catalog/nodes", timeout=TIMEOUT_S)
    described.judge("GET", "/v1/catalog/nodes", answer)
    for planted in (b'[{"Node": "a"}]', answer.content.replace(b'"Meta"', b'"Mate"'), b"{}"):
        answer._content = planted
        with pytest.raises(AssertionError):
            described.judge("GET", "/v1/catalog/nodes", answer)


POLICY = {"Name": "p", "Rules": 'key_prefix "a" { policy = "read" }', "Datacenters": ["dc1"]}
ROLE = {
    "Name": "r", "Policies": [{"Name": "p"}], "ServiceIdentities": [{"ServiceName": "web", "Datacenters": ["dc1"]}],
    "NodeIdentities": [{"NodeName": "n", "Datacenter": "dc1"}],
}  # fmt: skip
TOKEN = {
    "Policies": [{"Name": "p"}], "Roles": [{"Name": "r"}], "ServiceIdentities": [{"ServiceName": "web"}],
    "NodeIdentities": [{"NodeName": "n", "Datacenter": "dc1"}], "ExpirationTTL": "1h",
}  # fmt: skip


def test_access_control_answers_as_described(tmp_path: Path) -> None:
    with Node(tmp_path, "[cluster]\nacl_enabled = true\n") as node, requests.Session() as session:
        base = f"http://127.0.0.1:{node.port}"
        first = session.put(f"{base}/v1/acl/bootstrap", timeout=TIMEOUT_S)
        session.headers["X-Consul-Token"] = first.json()["SecretID"]
        described = Described(session.get(f"{base}/v1/openapi.json", timeout=TIMEOUT_S).json())
        described.judge("PUT", "/v1/acl/bootstrap", first)

        def ask(method: str, path: str, body: Any = None, *, empty: bool = False) -> Any:
            answer = session.request(method, base + path, json=body, timeout=TIMEOUT_S)
            assert answer.status_code == 200, f"{method} {path}: {answer.status_code} {answer.text}"
            value = described.judge(method, path, answer)
            assert bool(value) != empty, f"{method} {path}: {value}"
            return value

        policy = ask("PUT", "/v1/acl/policy", POLICY)["ID"]
        role = ask("PUT", "/v1/acl/role", ROLE)["ID"]
        token = ask("PUT", "/v1/acl/token", TOKEN)["AccessorID"]
        ask("PUT", f"/v1/acl/policy/{policy}", POLICY | {"Description": "d"})
        ask("PUT", f"/v1/acl/role/{role}", ROLE | {"Description": "d"})
        ask("PUT", f"/v1/acl/token/{token}", {key: value for key, value in TOKEN.items() if key != "ExpirationTTL"})
        ask("PUT", f"/v1/acl/token/{token}/clone", {"Description": "d"})
        for path in (
            "policies", "roles", "tokens", f"policy/{policy}", "policy/name/p", f"role/{role}", "role/name/r",
            f"token/{token}", f"token/{token}?expanded", "token/self", "replication",
        ):  # fmt: skip
            ask("GET", f"/v1/acl/{path}")
        for path in ("auth-methods", "binding-rules", "templated-policies"):
            ask("GET", f"/v1/acl/{path}", empty=True)
        for path in (f"token/{token}", f"role/{role}", f"policy/{policy}"):
            ask("DELETE", f"/v1/acl/{path}")
    known = {(method.upper(), path) for path, of in described.document["paths"].items() for method in of}
    left = {(method, path) for method, path in known if path.startswith("/v1/acl/")} - described.seen
    assert {path for _, path in left} == {"/v1/acl/{path}"}, f"judged by nothing: {sorted(left)}"
