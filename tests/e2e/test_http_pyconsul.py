"""py-consul, unmodified, as a client of the API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import consul
import pytest

from tests.support.http_api import eventually, serving
from tests.support.promises import PATIENCE_S


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """A blocking client; the node runs on a loop of its own in another thread."""
    loop, port = asyncio.new_event_loop(), 0
    ready, leave = threading.Event(), asyncio.Event()

    async def serve() -> None:
        nonlocal port
        async with serving(tmp_path) as node:
            port = urlsplit(node.url).port or 0
            await eventually(lambda: node.agent.sync.pending == 0)
            ready.set()
            await leave.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(PATIENCE_S)
    made = consul.Consul(host="127.0.0.1", port=port)
    yield made
    made.http.session.close()
    loop.call_soon_threadsafe(leave.set)
    thread.join(PATIENCE_S)
    loop.close()


def test_services_and_health(client: Any) -> None:
    assert client.agent.service.register(
        "web", service_id="web-1", port=80, tags=["a"], check=consul.Check.ttl("30s")
    )
    assert client.agent.check.ttl_pass("service:web-1", "fine")
    index, nodes = client.health.service("web", passing=True)
    assert [entry["Service"]["ID"] for entry in nodes] == ["web-1"]
    assert int(index) > 0
    assert "web" in client.catalog.services()[1]
    assert client.catalog.service("web")[1][0]["ServicePort"] == 80
    assert "web-1" in client.agent.services()
    assert client.agent.service.maintenance("web-1", True, "tea")
    assert client.health.service("web", passing=True)[1] == []
    assert client.agent.service.deregister("web-1")
    assert client.catalog.service("web")[1] == []


def test_blocking_query_sees_the_change(client: Any) -> None:
    index, _ = client.health.service("web")
    seen: list[Any] = []
    waiter = threading.Thread(target=lambda: seen.append(client.health.service("web", index=index, wait="50s")))
    waiter.start()
    assert client.agent.service.register("web", port=80)
    waiter.join(PATIENCE_S)
    assert [entry["Service"]["Service"] for entry in seen[0][1]] == ["web"]


def test_kv_sessions_and_locks(client: Any) -> None:
    assert client.kv.put("a/b", "1", flags=7)
    _, entry = client.kv.get("a/b")
    assert (entry["Value"], entry["Flags"]) == (b"1", 7)
    assert client.kv.put("a/b", "2", cas=entry["ModifyIndex"])
    assert not client.kv.put("a/b", "3", cas=entry["ModifyIndex"])
    assert client.kv.get("a/", keys=True)[1] == ["a/b"]
    assert client.kv.get("none")[1] is None
    one, two = client.session.create(name="one", ttl=20), client.session.create(name="two", lock_delay=0)
    assert client.kv.put("leader", "one", acquire=one)
    assert not client.kv.put("leader", "two", acquire=two)
    assert client.session.renew(one)["ID"] == one
    assert client.kv.put("leader", "", release=one)
    assert client.kv.put("leader", "two", acquire=two)
    assert client.session.destroy(two)
    assert client.kv.delete("a/", recurse=True)
    assert client.kv.get("a/b")[1] is None
    with pytest.raises(consul.ConsulException):
        client.kv.put("x", "1", acquire="no-such-session")


def test_status_agent_catalog_events(client: Any) -> None:
    assert client.status.leader() == "127.0.0.1:8300"
    assert client.status.peers() == ["127.0.0.1:8300"]
    me = client.agent.self()
    assert me["Member"] in client.agent.members()
    assert client.catalog.datacenters() == ["dc1"]
    assert client.catalog.register("ext", "10.0.0.1", service={"Service": "old", "Port": 1})
    assert {row["Node"] for row in client.catalog.nodes()[1]} == {"ext", "n1"}
    assert client.catalog.deregister("ext")
    fired = client.event.fire("deploy", "v2")
    assert [event["ID"] for event in client.event.list("deploy")[1]] == [fired["ID"]]
    with pytest.raises(consul.ConsulException):
        client.catalog.nodes(dc="mars")


def test_connect_roots_and_leaf(client: Any) -> None:
    roots = client.connect.ca.roots()
    assert roots["ActiveRootID"]
    leaf = client.agent.connect.ca.leaf("web")
    assert leaf is not None
