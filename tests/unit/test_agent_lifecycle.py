"""The agent's promises: registrations survive, the catalog follows, one stream per sidecar, leaves are renewed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from node.errors import NoLeader
from raftstate.model.catalog import Check, Node, ServiceInstance
from raftstate.state import commands
from tests.support.http_api import SigningBackend, TestCa, eventually, serving
from tests.support.promises import PATIENCE_S, promptly
from tests.unit.test_http_walkthrough import CLIENT_SIDECAR, SERVER_SIDECAR, open_stream, register


async def backend() -> SigningBackend:
    made = SigningBackend(TestCa())
    await made.use_root()
    return made


async def services_of(made: SigningBackend, node: str = "n1") -> dict[str, Any]:
    found = (await made.query("catalog.node", {"node": node})).value
    return dict(found["Services"]) if found else {}


async def statuses(made: SigningBackend, node: str = "n1") -> dict[str, str]:
    return {row["CheckID"]: row["Status"] for row in (await made.query("health.node", {"node": node})).value}


async def until(condition: Any, timeout_s: float = PATIENCE_S) -> None:
    """Await an awaitable condition."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the condition may be on anything
            await asyncio.sleep(0.01)


async def test_registration_survives_a_restart_and_a_lost_catalog(tmp_path: Path) -> None:
    first = await backend()
    async with serving(tmp_path, backend=first) as node:
        await register(node)
        await node.put("/v1/agent/check/register", {"Name": "disk", "TTL": "60s"})
        node_id = node.agent.node_id
    await first.close()
    second = await backend()
    async with serving(tmp_path, backend=second) as node:
        assert node.agent.node_id == node_id

        async def there() -> bool:
            held = await services_of(second)
            return set(held) == {"echo-server-1", "echo-client-1"} and "disk" in await statuses(second)

        await until(there)
        assert (await second.query("catalog.node", {"node": "n1"})).value["Node"]["ID"] == node_id
    await second.close()


async def test_catalog_is_healed_in_both_directions(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await register(node)
        stranger = ServiceInstance(node="n1", id="stranger", service="stranger")
        await made.apply(commands.RegisterService(stranger))
        await made.apply(commands.RegisterCheck(Check(node="n1", check_id="ghost")))
        await made.apply(commands.DeregisterService("n1", "echo-server-1"))

        async def healed() -> bool:
            return set(await services_of(made)) == {
                "echo-server-1",
                "echo-client-1",
            } and "ghost" not in await statuses(made)

        await until(healed)
        await made.apply(commands.DeregisterNode("n1"))
        await until(healed)
        changed = ServiceInstance(node="n1", id="echo-server-1", service="echo-server", port=1)
        await made.apply(commands.RegisterService(changed))

        async def port_is_back() -> bool:
            return (await services_of(made))["echo-server-1"]["Port"] == 8080

        await until(port_is_back)
        assert (await statuses(made))["serfHealth"] == "passing"
    await made.close()


async def test_a_settled_agent_writes_nothing(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made, sync_interval_s=0.05) as node:
        await register(node)
        await eventually(lambda: node.agent.sync.pending == 0)
        await asyncio.sleep(0.3)  # several periods: what is counted is that nothing comes
        count = len(made.applied)
        await asyncio.sleep(0.3)
        assert len(made.applied) == count
    await made.close()


async def test_registered_while_the_servers_are_away(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made, register_wait_s=0.05) as node:
        await eventually(lambda: node.agent.sync.pending == 0)
        made.away = NoLeader()
        await register(node)
        assert set(await node.get("/v1/agent/services")) == {"echo-server-1", "echo-client-1"}
        assert await services_of(made) == {}
        made.away = None

        async def there() -> bool:
            return set(await services_of(made)) == {"echo-server-1", "echo-client-1"}

        await until(there)
    await made.close()


async def test_enable_tag_override_takes_the_catalogs_tags(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Tags": ["a"], "EnableTagOverride": True})
        row = ServiceInstance(node="n1", id="web", service="web", tags=("b",), enable_tag_override=True)
        await made.apply(commands.RegisterService(row))
        await eventually(lambda: node.agent.local.services["web"].row.tags == ("b",))
    await made.close()


async def test_one_stream_per_sidecar_and_critical_at_its_end(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await register(node)
        stream = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR, pid="4711")
        await stream.until(lambda known: known.get("Leaf"))
        check = "service:echo-server-1-sidecar-proxy"
        assert (await statuses(made))[check] == "passing"
        url = node.url + "/v1/agent/connect/proxy/echo-server-1-sidecar-proxy/stream"
        async with node.http.post(url, json=SERVER_SIDECAR) as second:
            assert second.status == 409
            assert "4711" in await second.text()
        assert (await statuses(made))[check] == "passing"
        stream.response.close()

        async def critical() -> bool:
            return (await statuses(made))[check] == "critical"

        async with promptly(2.0, "noticing that the sidecar is gone"):
            await until(critical, PATIENCE_S)
        assert "echo-server-1-sidecar-proxy" in await services_of(made)
        again = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        await again.until(lambda known: known.get("Leaf"))
        assert (await statuses(made))[check] == "passing"
        again.response.close()
    await made.close()


async def test_what_an_instance_says_of_itself_anew_its_running_sidecar_says_too(tmp_path: Path) -> None:
    sidecar = "echo-server-1-sidecar-proxy"
    app = {"Name": "echo-server", "Port": 8080, "ID": "echo-server-1"}
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", {**app, "Meta": {"version": "v1"}, "Tags": ["a"]})
        stream = await open_stream(node, sidecar, SERVER_SIDECAR)
        await stream.until(lambda known: known.get("Leaf"))

        async def row() -> tuple[Any, ...]:
            (found,) = await node.get("/v1/health/connect/echo-server")
            service = found["Service"]
            checks = {check["CheckID"]: check["Status"] for check in found["Checks"]}
            return service["ID"], service["Meta"], service["Tags"], checks[f"service:{sidecar}"], len(checks)

        before = await row()
        assert before[:4] == (sidecar, {"version": "v1"}, ["a"], "passing")
        await node.put("/v1/agent/service/register", {**app, "Meta": {"version": "v2"}, "Tags": ["b"]})
        assert await row() == (sidecar, {"version": "v2"}, ["b"], "passing", before[4])
        kept = node.agent.local.services[sidecar]
        await node.put("/v1/agent/service/register", {**app, "Meta": {"version": "v2"}, "Tags": ["b"]})
        assert node.agent.local.services[sidecar] is kept, "nothing was registered that had not changed"
        # Of another service, for which the sidecar does not stand.
        await node.put("/v1/agent/service/register", {**app, "Name": "other", "Meta": {"version": "v3"}})
        assert node.agent.local.services[sidecar] is kept
        stream.response.close()


async def test_stream_needs_its_service_and_ends_with_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        url = node.url + "/v1/agent/connect/proxy/x-sidecar-proxy/stream"
        async with node.http.post(url, json=SERVER_SIDECAR) as refused:
            assert refused.status == 404
            assert "echo-server-1" in await refused.text()
        await register(node)
        stream = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        await stream.until(lambda known: known.get("Leaf"))
        await node.put("/v1/agent/service/deregister/echo-server-1")
        async with asyncio.timeout(PATIENCE_S):
            while await stream.response.content.readline():
                pass
        assert set(await node.get("/v1/agent/services")) == {"echo-client-1"}


async def test_sidecar_outlives_the_agent(tmp_path: Path) -> None:
    made = await backend()
    check = "service:echo-server-1-sidecar-proxy"
    async with serving(tmp_path, backend=made) as node:
        await register(node)
        stream = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        await stream.until(lambda known: known.get("Leaf"))
    stream.response.close()
    assert (await statuses(made))[check] == "passing"
    async with serving(tmp_path, backend=made, sidecar_grace_s=0.3) as node:
        assert node.agent.local.checks[check].row.status == "passing"

        async def critical() -> bool:
            return (await statuses(made))[check] == "critical"

        await until(critical)
    await made.close()


async def test_failing_app_makes_its_endpoint_unhealthy(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await node.put(
            "/v1/agent/service/register",
            {
                "Name": "echo-server",
                "ID": "echo-server-1",
                "Port": 8080,
                "Check": {"TTL": "60s", "Status": "passing"},
            },
        )
        await node.put("/v1/agent/service/register", {"Name": "echo-client", "ID": "echo-client-1"})
        named = json.loads(json.dumps(CLIENT_SIDECAR))
        named["Proxy"]["Upstreams"] = [{"DestinationName": "echo-server", "LocalBindPort": 21000}]
        server = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        client = await open_stream(node, "echo-client-1-sidecar-proxy", named)

        def healthy(known: dict[str, Any], wanted: bool) -> bool:
            endpoints = (known.get("Upstreams") or [{}])[0].get("Endpoints") or []
            return bool(endpoints) and endpoints[0]["Healthy"] is wanted

        await client.until(lambda known: healthy(known, True))
        await node.put("/v1/agent/check/fail/service:echo-server-1")
        await client.until(lambda known: healthy(known, False))
        server.response.close()
        client.response.close()


async def test_leaf_is_renewed_and_follows_the_root(tmp_path: Path) -> None:
    made = SigningBackend(TestCa(lifetime_s=1.5))
    await made.use_root()
    async with serving(tmp_path, backend=made) as node:
        leaf = await node.get("/v1/agent/connect/ca/leaf/web")
        renewed = await node.get(f"/v1/agent/connect/ca/leaf/web?index={leaf['ModifyIndex']}&wait=5s")
        assert renewed["ModifyIndex"] > leaf["ModifyIndex"]
        assert renewed["PrivateKeyPEM"] != leaf["PrivateKeyPEM"]
        made.ca.lifetime_s = 3600.0
        entry = node.agent.leaves.entry("web")
        await eventually(lambda: entry.leaf is not None and entry.leaf.valid_before > renewed["ValidBefore"])
        assert entry.leaf is not None
        index = entry.leaf.modify_index
        made.ca.new_root()
        await made.apply(commands.AddCARoot(made.ca.root(), sealed_key=b"sealed"))
        rotated = await node.get(f"/v1/agent/connect/ca/leaf/web?index={index}&wait=8s")
        assert rotated["ModifyIndex"] > index
    await made.close()


async def test_leaf_survives_a_restart_without_being_signed_again(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        leaf = await node.get("/v1/agent/connect/ca/leaf/web")
    files = list((tmp_path / "agent" / "leaves").glob("*.json"))
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600]
    async with serving(tmp_path, backend=made) as node:
        assert await node.get("/v1/agent/connect/ca/leaf/web") == leaf
    assert made.ca.signed == [("web", "")]
    await made.close()


async def test_restart_fails_no_check(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Check": {"TTL": "60s"}})
        await node.put("/v1/agent/service/register", {"Name": "near", "Check": {"AliasService": "web"}})
        await node.put("/v1/agent/check/pass/service:web?note=well")
        await eventually(lambda: node.agent.sync.pending == 0)
    made.applied.clear()
    async with serving(tmp_path, backend=made) as node:
        await eventually(lambda: node.agent.local.checks["service:web"].row.status == "passing")
        assert node.agent.local.checks["service:web"].row.output == "well"
        assert node.agent.local.checks["service:near"].row.status == "passing"
        await node.put("/v1/agent/check/warn/service:web")
    written = [row.status for command in made.applied for row in getattr(command, "checks", ())]
    assert "critical" not in written
    assert "warning" in written
    await made.close()


async def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Port": 1})

        def full(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("node.agent.store.write_private", full)
        assert "No space left" in await node.put("/v1/agent/service/register", {"Name": "web", "Port": 2}, status=500)
        assert "No space left" in await node.put("/v1/agent/service/register", {"Name": "db", "Port": 3}, status=500)

        async def as_before() -> bool:
            return {row["ID"]: row["Port"] for row in (await services_of(made)).values()} == {"web": 1}

        await until(as_before)
        assert {key: row["Port"] for key, row in (await node.get("/v1/agent/services")).items()} == {"web": 1}
    await made.close()


async def test_damaged_file_is_set_aside(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await register(node)
    files = sorted((tmp_path / "agent" / "services").glob("*.json"))
    files[0].write_text("{torn")
    async with serving(tmp_path) as node:
        assert len(await node.get("/v1/agent/services")) == 1
    assert len(list((tmp_path / "agent" / "services").glob("*.damaged"))) == 1


async def test_node_row_is_corrected(tmp_path: Path) -> None:
    made = await backend()
    async with serving(tmp_path, backend=made) as node:
        await eventually(lambda: node.agent.sync.pending == 0)
        await made.apply(commands.RegisterNode(Node(node="n1", address="10.9.9.9", id=node.agent.node_id)))

        async def corrected() -> bool:
            return (await made.query("catalog.node", {"node": "n1"})).value["Node"]["Address"] == "127.0.0.1"

        await until(corrected)
    await made.close()
