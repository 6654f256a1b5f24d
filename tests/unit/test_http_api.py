"""Consul's HTTP API, family by family: shapes, statuses, headers, blocking."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from node.errors import Busy, NoLeader, UnknownOutcome
from node.http.context import HttpOptions
from tests.support.http_api import Node, eventually, serving
from tests.support.promises import PATIENCE_S

WEB = {"Name": "web", "ID": "web-1", "Port": 80, "Tags": ["a", "b"], "Meta": {"v": "1"}, "Check": {"TTL": "30s"}}


async def text(node: Node, method: str, path: str, **kwargs: Any) -> tuple[int, str]:
    async with node.http.request(method, node.url + path, **kwargs) as answer:
        return answer.status, await answer.text()


async def test_agent_register_shapes(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", WEB)
        service = (await node.get("/v1/agent/services"))["web-1"]
        assert service == {
            "ID": "web-1", "Service": "web", "Tags": ["a", "b"], "Meta": {"v": "1"}, "Port": 80, "Address": "",
            "TaggedAddresses": {}, "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": False,
            "Datacenter": "dc1",
        }  # fmt: skip
        check = (await node.get("/v1/agent/checks"))["service:web-1"]
        assert (check["Status"], check["Type"], check["ServiceName"]) == ("critical", "ttl", "web")
        await node.put("/v1/agent/check/pass/service:web-1?note=fine")
        health = await node.get("/v1/health/service/web?passing")
        assert [entry["Service"]["ID"] for entry in health] == ["web-1"]
        assert {check["CheckID"] for check in health[0]["Checks"]} == {"serfHealth", "service:web-1"}
        assert health[0]["Node"]["ID"] == node.agent.node_id
        await node.put("/v1/agent/service/deregister/web-1")
        assert await node.get("/v1/catalog/service/web") == []
        assert await node.get("/v1/agent/checks") == {}


async def test_loosely_spelled_registration(tmp_path: Path) -> None:
    body = {
        "name": "loose", "port": 9, "enabletagoverride": True, "tags": None, "connect": {"sidecar_service": {}},
        "checks": [{"http": "http://127.0.0.1:1/", "interval": "10s"}, {"ttl": 5_000_000_000}],
    }  # fmt: skip
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", body)
        services = await node.get("/v1/agent/services")
        assert set(services) == {"loose", "loose-sidecar-proxy"}
        proxy = services["loose-sidecar-proxy"]
        assert (proxy["Kind"], proxy["Port"]) == ("connect-proxy", 21000)
        assert proxy["Proxy"]["DestinationServiceID"] == "loose"
        assert proxy["Proxy"]["LocalServicePort"] == 9
        checks = await node.get("/v1/agent/checks")
        assert {"service:loose:1", "service:loose:2", "service:loose-sidecar-proxy:1"} < set(checks)
        await node.put("/v1/agent/service/deregister/loose")
        assert await node.get("/v1/agent/services") == {}


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "Missing service name"),
        ({"Name": "x", "Port": 70000}, "port"),
        ({"Name": "x", "Check": {"HTTP": "http://x"}}, "Interval"),
        ({"Name": "x", "Check": {"Args": ["true"], "Interval": "1s"}}, "Scripts are disabled"),
        ({"Name": "x", "Port": "eighty"}, "Port"),
        ({"Name": "x", "Kind": "connect-proxy", "Port": 1}, "DestinationServiceName"),
        ({"Name": "x", "Check": {"TTL": "soon"}}, "duration"),
    ],
)
async def test_bad_registration_is_400(tmp_path: Path, body: dict[str, Any], part: str) -> None:
    async with serving(tmp_path) as node:
        assert part in await node.put("/v1/agent/service/register", body, status=400)


async def test_refused_by_the_catalog_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        said = await node.put("/v1/agent/service/register", {"Name": "a:b"}, status=400)
        assert "':'" in said
        assert await node.get("/v1/agent/services") == {}
        assert not list((tmp_path / "agent" / "services").glob("*.json"))


async def test_blocking_read_wakes_on_change_and_times_out_unchanged(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        async with node.http.get(node.url + "/v1/health/service/web") as answer:
            index = answer.headers["X-Consul-Index"]
            assert answer.headers["X-Consul-KnownLeader"] == "true"
            assert answer.headers["X-Consul-LastContact"] == "0"
        parked = asyncio.create_task(node.get(f"/v1/health/service/web?index={index}&wait=10s"))
        await node.put("/v1/agent/service/register", WEB)
        assert [entry["Service"]["Service"] for entry in await parked] == ["web"]
        async with node.http.get(node.url + "/v1/health/service/other") as answer:
            index = answer.headers["X-Consul-Index"]
        async with node.http.get(node.url + f"/v1/health/service/other?index={index}&wait=50ms") as answer:
            assert answer.headers["X-Consul-Index"] == index


async def test_cached_reads_follow_and_say_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        async with node.http.get(node.url + "/v1/health/service/web?cached") as answer:
            assert (answer.headers["X-Cache"], await answer.json()) == ("MISS", [])
            index = answer.headers["X-Consul-Index"]
        parked = asyncio.create_task(node.get(f"/v1/health/service/web?cached&index={index}&wait=10s"))
        await node.put("/v1/agent/service/register", WEB)
        assert len(await parked) == 1
        async with node.http.get(node.url + "/v1/health/service/web?cached") as answer:
            assert answer.headers["X-Cache"] == "HIT"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("index=x", "Invalid index"), ("index=-1", "Invalid index"), ("wait=soon", "Invalid wait time"),
        ("stale&consistent", "Cannot specify ?stale with ?consistent"), ("passing=perhaps", "passing"),
        ("filter=Service.Port%20is", "boolean expression"),
    ],
)  # fmt: skip
async def test_bad_parameters_are_400(tmp_path: Path, query: str, said: str) -> None:
    async with serving(tmp_path) as node:
        status, body = await text(node, "GET", f"/v1/health/service/web?{query}")
        assert (status, said in body) == (400, True), body


async def test_cross_cutting_rules(tmp_path: Path) -> None:
    async with serving(tmp_path, http_options=HttpOptions(body_bytes_max=2000)) as node:
        assert await text(node, "GET", "/v1/catalog/nodes?dc=mars") == (500, "No path to datacenter")
        async with node.http.post(node.url + "/v1/agent/services") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        assert (await text(node, "GET", "/v1/nothing"))[0] == 404
        assert (await text(node, "GET", "/v1/query"))[0] == 501
        assert (await text(node, "PUT", "/v1/agent/service/register", data=b"x" * 3000))[0] == 413
        assert (await text(node, "PUT", "/v1/agent/service/register", data=b"{"))[0] == 400
        assert await text(node, "GET", "/v1/acl/tokens") == (401, "ACL support disabled")
        assert "\n    " in (await text(node, "GET", "/v1/agent/self?pretty"))[1]
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "http://6.6.6.6"}):
            status, said = await text(node, "PUT", "/v1/agent/service/register", json=WEB, headers=headers)
            assert status == 403, (headers, said)
        for headers in ({"Origin": "http://localhost:1"}, {"Host": "127.0.0.1:8500"}, {"Host": "[::1]:8500"}):
            assert (await text(node, "PUT", "/v1/agent/service/register", json=WEB, headers=headers))[0] == 200


async def test_backend_errors_have_their_texts(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        for error, status, part in (
            (NoLeader(), 500, "No cluster leader"),
            (UnknownOutcome(), 500, "same X-Lictor-Request-Id"),
            (Busy(), 429, "try again"),
        ):
            node.backend.away = error
            answer = await text(node, "PUT", "/v1/kv/a", data=b"1")
            assert answer[0] == status
            assert part in answer[1]
        node.backend.away = None
        assert (await text(node, "PUT", "/v1/kv/a", data=b"1", headers={"X-Lictor-Request-Id": "x"}))[0] == 400


async def test_request_id_makes_a_retry_safe(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        headers = {"X-Lictor-Request-Id": "0123456789abcdef"}
        for _ in range(2):
            answer = await text(node, "PUT", "/v1/kv/once?cas=0", data=b"1", headers=headers)
            assert answer == (200, "true")


async def test_intentions_by_pair_and_by_id(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        exact = "/v1/connect/intentions/exact?source=web&destination=default/db"
        assert (await text(node, "GET", exact))[0] == 404
        assert await node.put(exact, {"Action": "allow", "Description": "d"}) == "true"
        row = await node.get(exact)
        assert row["Precedence"] == 9
        assert (row["SourceName"], row["DestinationName"], row["SourceType"]) == ("web", "db", "consul")
        assert "SourceService" not in row
        by_id = f"/v1/connect/intentions/{row['ID']}"
        assert await node.get(by_id) == row
        check = "/v1/connect/intentions/check?source=web&destination=db"
        assert (await node.get(check))["Allowed"] is True
        await node.put(by_id, {"SourceName": "web", "DestinationName": "db", "Action": "deny"})
        assert (await node.get(check))["Allowed"] is False
        body = {"SourceName": "web", "DestinationName": "db", "Action": "allow"}
        status, said = await text(node, "POST", "/v1/connect/intentions", json=body)
        assert status >= 400
        assert "duplicate" in said
        match = await node.get("/v1/connect/intentions/match?by=destination&name=db")
        assert [one["ID"] for one in match["db"]] == [row["ID"]]
        assert await text(node, "DELETE", exact) == (200, "true")
        assert (await text(node, "GET", by_id))[0] == 404
        assert (await text(node, "GET", "/v1/connect/intentions/not-a-uuid"))[0] == 400
        assert (await text(node, "GET", "/v1/connect/intentions/match"))[0] == 500


async def test_l7_intention_counts_as_deny_for_check_and_authorize(tmp_path: Path) -> None:
    body = {"Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/", "Methods": ["GET"]}}]}
    async with serving(tmp_path) as node:
        await node.put("/v1/connect/intentions/exact?source=web&destination=db", body)
        row = await node.get("/v1/connect/intentions/exact?source=web&destination=db")
        assert row["Permissions"] == body["Permissions"]
        assert "Action" not in row
        assert not (await node.get("/v1/connect/intentions/check?source=web&destination=db"))["Allowed"]
        trust = (await node.get("/v1/agent/connect/ca/roots"))["TrustDomain"]
        ask = {
            "Target": "db",
            "ClientCertURI": f"spiffe://{trust}/ns/default/dc/dc1/svc/web",
            "ClientCertSerial": "1",
        }
        async with node.http.post(node.url + "/v1/agent/connect/authorize", json=ask) as answer:
            assert (await answer.json())["Authorized"] is False
        await node.put("/v1/connect/intentions/exact?source=web&destination=db", {"Action": "allow"})

        async def authorized() -> bool:
            async with node.http.post(node.url + "/v1/agent/connect/authorize", json=ask) as answer:
                return bool((await answer.json())["Authorized"])

        async with asyncio.timeout(PATIENCE_S):
            while not await authorized():
                pass
        await node.put("/v1/connect/revocations", {"Kind": "service", "Value": "web"})
        async with asyncio.timeout(PATIENCE_S):
            while await authorized():
                pass


async def test_roots_and_leaf(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        roots = await node.get("/v1/connect/ca/roots")
        assert roots["ActiveRootID"] == roots["Roots"][0]["ID"]
        async with node.http.get(node.url + "/v1/agent/connect/ca/leaf/web") as answer:
            leaf = await answer.json()
            index = int(answer.headers["X-Consul-Index"])
        assert leaf["ServiceURI"].endswith("/ns/default/dc/dc1/svc/web")
        assert "PRIVATE KEY" in leaf["PrivateKeyPEM"]
        assert leaf["ModifyIndex"] == index
        assert await node.get("/v1/agent/connect/ca/leaf/web") == leaf
        config = await node.get("/v1/connect/ca/configuration")
        assert await node.put("/v1/connect/ca/configuration", config) == "true"


async def test_kv_rules(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        async with node.http.get(node.url + "/v1/kv/a") as answer:
            assert (answer.status, await answer.read()) == (404, b"")
            assert int(answer.headers["X-Consul-Index"]) >= 1
        assert await text(node, "PUT", "/v1/kv/a/b?flags=42", data=b"hi") == (200, "true")
        row = (await node.get("/v1/kv/a/b"))[0]
        assert base64.b64decode(row["Value"]) == b"hi"
        assert (row["Flags"], row["LockIndex"], "Session" in row) == (42, 0, False)
        assert await text(node, "GET", "/v1/kv/a/b?raw") == (200, "hi")
        assert await text(node, "PUT", "/v1/kv/a/b?cas=1", data=b"no") == (200, "false")
        assert await text(node, "PUT", "/v1/kv/empty", data=b"") == (200, "true")
        assert (await node.get("/v1/kv/empty"))[0]["Value"] is None
        assert await node.get("/v1/kv/a?keys&separator=/") == ["a/"]
        assert [one["Key"] for one in await node.get("/v1/kv/?recurse")] == ["a/b", "empty"]
        assert (await text(node, "PUT", "/v1/kv/a?acquire=x&cas=1", data=b""))[0] == 400
        assert (await text(node, "GET", "/v1/kv/"))[0] == 400
        assert (await text(node, "PUT", "/v1/kv/a?acquire=nope", data=b""))[1].startswith('invalid session "nope"')
        assert await text(node, "DELETE", "/v1/kv/a?recurse") == (200, "true")
        assert (await text(node, "GET", "/v1/kv/a/b"))[0] == 404
        assert await text(node, "PUT", "/v1/kv/odd%2Fkey%20%C3%BC", data=b"1") == (200, "true")
        assert (await node.get("/v1/kv/odd/key%20%C3%BC"))[0]["Key"] == "odd/key ü"


async def test_sessions_and_locks(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await eventually(lambda: node.agent.sync.pending == 0)
        one = json.loads(await node.put("/v1/session/create"))["ID"]
        info = (await node.get(f"/v1/session/info/{one}"))[0]
        assert (info["Node"], info["LockDelay"], info["Behavior"]) == ("n1", 15_000_000_000, "release")
        assert await text(node, "PUT", f"/v1/kv/lock?acquire={one}", data=b"me") == (200, "true")
        assert (await node.get("/v1/kv/lock"))[0]["Session"] == one
        assert [row["ID"] for row in await node.get("/v1/session/node/n1")] == [one]
        assert json.loads(await node.put(f"/v1/session/renew/{one}"))[0]["ID"] == one
        assert await node.put(f"/v1/session/destroy/{one}") == "true"
        assert await node.get("/v1/session/list") == []
        assert (await text(node, "PUT", f"/v1/session/renew/{one}"))[0] == 404
        status, said = await text(node, "PUT", "/v1/session/create", json={"TTL": "1s"})
        assert (status, said.startswith("Invalid Session TTL")) == (500, True)


async def test_txn_commits_whole_or_not_at_all(tmp_path: Path) -> None:
    def kv(verb: str, key: str, value: bytes = b"", **more: Any) -> dict[str, Any]:
        return {"KV": {"Verb": verb, "Key": key, "Value": base64.b64encode(value).decode(), **more}}

    async with serving(tmp_path) as node:
        async with node.http.put(node.url + "/v1/txn", json=[kv("set", "x", b"1"), kv("get", "x")]) as answer:
            body = await answer.json()
            assert (answer.status, body["Errors"]) == (200, None)
            assert body["Results"][1]["KV"]["Value"] == base64.b64encode(b"1").decode()
        async with node.http.put(
            node.url + "/v1/txn", json=[kv("set", "y", b"1"), kv("cas", "x", b"2", Index=1)]
        ) as answer:
            body = await answer.json()
            assert (answer.status, body["Errors"][0]["OpIndex"]) == (409, 1)
        assert (await text(node, "GET", "/v1/kv/y"))[0] == 404
        assert (await text(node, "PUT", "/v1/txn", json=[kv("set", str(i)) for i in range(65)]))[0] == 413


async def test_config_events_snapshot(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        entry = {"Kind": "service-defaults", "Name": "web", "Protocol": "http"}
        assert await node.put("/v1/config", entry) == "true"
        assert (await node.get("/v1/config/service-defaults/web"))["Protocol"] == "http"
        assert (await node.get("/v1/discovery-chain/web"))["Chain"]["Protocol"] == "http"
        assert (await text(node, "GET", "/v1/config/service-defaults/none"))[0] == 404
        async with node.http.put(node.url + "/v1/event/fire/deploy", data=b"v2") as answer:
            fired = await answer.json()
        listed = await node.get("/v1/event/list?name=deploy")
        assert [(one["ID"], one["Payload"]) for one in listed] == [(fired["ID"], base64.b64encode(b"v2").decode())]
        async with node.http.get(node.url + "/v1/snapshot") as answer:
            saved = await answer.read()
        assert saved[:2] == b"\x1f\x8b"
        assert await text(node, "DELETE", "/v1/config/service-defaults/web") == (200, "{}")
        assert (await text(node, "PUT", "/v1/snapshot", data=b"junk"))[0] == 400
        assert (await text(node, "PUT", "/v1/snapshot", data=saved[:-4]))[0] == 400
        assert (await text(node, "PUT", "/v1/snapshot", data=saved))[0] == 200
        assert (node.backend.restored, node.backend.restored_foreign) == (gzip.decompress(saved), False)
        assert (await text(node, "PUT", "/v1/snapshot?foreign=perhaps", data=saved))[0] == 400
        assert (await text(node, "PUT", "/v1/snapshot?foreign=true", data=saved))[0] == 200
        assert node.backend.restored_foreign


async def test_catalog_by_hand(tmp_path: Path) -> None:
    body = {
        "Node": "ext", "Address": "10.0.0.9", "NodeMeta": {"rack": "r1"},
        "Service": {"Service": "legacy", "Port": 5000, "Tags": ["old"]},
        "Check": {"Name": "up", "Status": "passing", "ServiceID": "legacy"},
    }  # fmt: skip
    async with serving(tmp_path) as node:
        assert await node.put("/v1/catalog/register", body) == "true"
        row = (await node.get("/v1/catalog/service/legacy?node-meta=rack:r1&tag=old"))[0]
        assert (row["Node"], row["ServiceID"], row["ServicePort"]) == ("ext", "legacy", 5000)
        assert row["ServiceWeights"] == {"Passing": 1, "Warning": 1}
        assert await node.get("/v1/catalog/service/legacy?node-meta=rack:r2") == []
        assert await node.get('/v1/catalog/service/legacy?filter=ServicePort+==+5000+and+"old"+in+ServiceTags')
        assert set((await node.get("/v1/catalog/node/ext"))["Services"]) == {"legacy"}
        assert await node.get("/v1/catalog/node/none") is None
        assert (await node.get("/v1/catalog/services"))["legacy"] == ["old"]
        near = await node.get("/v1/catalog/nodes?near=n1")
        assert [one["Node"] for one in near] == ["n1", "ext"]
        assert [one["CheckID"] for one in await node.get("/v1/health/node/ext")] == ["up"]
        targets = await node.get("/v1/discovery/prometheus?service=legacy")
        assert targets[0]["targets"] == ["10.0.0.9:5000"]
        assert targets[0]["labels"]["__meta_consul_service"] == "legacy"
        assert await node.put("/v1/catalog/deregister", {"Node": "ext"}) == "true"
        assert await node.get("/v1/catalog/service/legacy") == []


async def test_agent_self_members_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await eventually(lambda: node.agent.sync.pending == 0)
        me = await node.get("/v1/agent/self")
        assert set(me["Config"]) >= {"Datacenter", "NodeName", "NodeID", "Server", "Version"}
        assert me["Member"] in await node.get("/v1/agent/members")
        assert me["Stats"]["consul"]["leader_addr"] == await node.get("/v1/status/leader")
        assert await node.get("/v1/status/peers") == ["127.0.0.1:8300"]
        page = (await text(node, "GET", "/v1/agent/metrics?format=prometheus"))[1]
        assert page.startswith("# HELP lictor_agent_services Services registered at this agent.\n# TYPE lictor_agent")
        assert page.count("# HELP ") == page.count("# TYPE ") == 9
        promtool = shutil.which("promtool")
        if promtool is not None:
            checked = await asyncio.to_thread(
                subprocess.run, [promtool, "check", "metrics"], input=page.encode(), capture_output=True, check=False
            )
            assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
        assert (await text(node, "GET", "/v1/agent/monitor?loglevel=loud"))[0] == 400


async def test_maintenance_and_hash_blocking(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Port": 80})
        assert (await text(node, "PUT", "/v1/agent/service/maintenance/web"))[0] == 400
        await node.put("/v1/agent/service/maintenance/web?enable=true&reason=tea")
        check = (await node.get("/v1/agent/checks"))["_service_maintenance:web"]
        assert (check["Status"], check["Notes"]) == ("critical", "tea")
        assert await node.get("/v1/health/service/web?passing=true") == []
        await node.put("/v1/agent/service/maintenance/web?enable=false")
        assert len(await node.get("/v1/health/service/web?passing=1")) == 1
        digest = (await node.get("/v1/agent/service/web"))["ContentHash"]
        parked = asyncio.create_task(node.get(f"/v1/agent/service/web?hash={digest}&wait=10s"))
        await asyncio.sleep(0)
        await node.put("/v1/agent/service/register", {"Name": "web", "Port": 81})
        assert (await parked)["Port"] == 81
        assert await text(node, "GET", "/v1/agent/service/nope") == (404, "unknown service ID: nope")


async def test_openapi_describes_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        document = await node.get("/v1/openapi.json")
        assert "put" in document["paths"]["/v1/agent/service/register"]
        assert all("{" not in path or ":" not in path for path in document["paths"])
        ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("http", "part"),
    [
        ({"PathRegex": "/api/("}, "regular expression"),
        ({"PathExact": "/a", "PathPrefix": "/b"}, "only one of"),
        ({"PathPrefix": "/a/../b"}, "can match nothing"),
        ({"Header": [{"Name": "x", "Regex": "[", "Present": False}]}, "regular expression"),
        ({"Header": [{"Name": "x"}]}, "exactly one of"),
    ],
)
async def test_a_permission_that_can_not_be_compiled_is_400(tmp_path: Path, http: dict[str, Any], part: str) -> None:
    async with serving(tmp_path) as node:
        pair = "/v1/connect/intentions/exact?source=web&destination=api"
        good = {"Permissions": [{"Action": "allow", "HTTP": {"PathRegex": "/api/.*"}}]}
        bad = {"Permissions": [*good["Permissions"], {"Action": "allow", "HTTP": http}]}
        said = await node.put(pair, bad, status=400)
        assert "Permissions[1]" in said
        assert part in said
        assert "Permissions[0]: action" in await node.put(pair, {"Permissions": [{"Action": "may"}]}, status=400)
        assert await node.get("/v1/connect/intentions") == []
        await node.put(pair, good)
        (stored,) = await node.get("/v1/connect/intentions")
        whole = {"SourceName": "web", "DestinationName": "api", **bad}
        await node.put(f"/v1/connect/intentions/{stored['ID']}", whole, status=400)
        assert (await node.get("/v1/connect/intentions"))[0]["Permissions"] == stored["Permissions"]
