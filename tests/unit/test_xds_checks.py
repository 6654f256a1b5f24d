"""Instances that are withdrawn from an Envoy: their checks fail, and once Envoy has acted they are taken out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

from node.xds import messages, types
from node.xds.checks import HEAD_BYTES_MAX, Checks
from node.xds.clusters import EJECTED_AFTER
from node.xds.door import XdsDoor
from node.xds.leaving import CHECKED_MAX, PATIENCE_S, Checked, Leaving, label
from node.xds.session import Session
from raftstate.chain import check_entry, compile_plan
from raftstate.model.connect import Revocation
from raftstate.model.sidecar import Endpoint, SidecarUpdate, SidecarUpstream, key_of
from tests.support.both_loops import both_loops
from tests.support.sidecars import hang_up, until
from tests.support.xds import make_snapshot, upstream

ENVOY = "backend-1-sidecar-proxy"
WAY = "upstream:db"
ONE, TWO = "db-1", "db-2"


class Asking:
    """A session of an Envoy that checks its instances, on a clock that is set by hand."""

    def __init__(self, checks: Checks | None = None) -> None:
        self.checks = checks or Checks()
        self.now = 100.0
        self.version = 1
        self.session = Session(ENVOY, self.checks, Checked("127.0.0.1", 8502, ENVOY), lambda: self.now)
        self.connection: Any = object()
        self.upstream = upstream("db", "tcp", ONE, TWO)
        self.revoked: tuple[Revocation, ...] = ()
        self.generation()

    def put(self, **changes: Any) -> None:
        self.upstream = msgspec.structs.replace(self.upstream, **changes)
        self.tell()

    def revoke(self, *revoked: Revocation) -> None:
        self.revoked = revoked
        self.tell()

    def tell(self) -> None:
        self.version += 1
        snapshot = make_snapshot(upstreams=(self.upstream,), revocations=self.revoked)
        self.session.update(SidecarUpdate(version=self.version, **msgspec.structs.asdict(snapshot)))

    def generation(self) -> int:
        """Return how often all calls through the upstream were ended."""
        self.tell()
        chains = self.resource(types.LISTENER)["filter_chains"]
        return int(chains[0]["name"].rpartition("#")[2])

    def resource(self, url: str) -> dict[str, Any]:
        return self.session._resources[url][WAY]

    def instances(self) -> dict[str, str]:
        """Return the instances of the cluster, with what their transport socket is chosen by."""
        found = {}
        for row in self.resource(types.ENDPOINTS).get("endpoints", ()):
            for one in row["lb_endpoints"]:
                data = one["metadata"]["filter_metadata"]
                found[data["lictor"]["instance"]] = next(iter(data["envoy.transport_socket_match"]))
        return found

    def name(self, instance: str) -> tuple[str, str]:
        endpoints = upstream("db", "tcp", ONE, TWO).endpoints
        return ENVOY, label(WAY, key_of(next(one for one in endpoints if one.service_id == instance)))

    def fails(self, instance: str) -> bool:
        """Let Envoy make a check."""
        return self.checks.fails(self.name(instance), self.connection)

    def without(self, instance: str) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
        rows = self.upstream.endpoints
        stay = tuple(one for one in rows if one.service_id != instance)
        return stay, tuple(one for one in rows if one.service_id == instance)


def test_a_revoked_instance_fails_its_check_and_leaves_once_it_was_asked_again() -> None:
    asking = Asking()
    cluster = asking.resource(types.CLUSTER)
    assert cluster["close_connections_on_host_health_failure"]
    ejection = cluster["outlier_detection"]
    assert ejection["consecutive_local_origin_failure"] == EJECTED_AFTER, "it ends calls, too"
    assert not ejection["successful_active_health_check_uneject_host"]
    assert asking.instances() == {ONE: "service", TWO: "service"}
    assert not asking.fails(ONE)
    asking.revoke(Revocation("instance", ONE, service="db"))
    assert asking.instances() == {ONE: "withdrawn", TWO: "service"}, "nobody can be called there any more"
    rows = asking.resource(types.ENDPOINTS)["endpoints"][0]["lb_endpoints"]
    assert [one["health_status"] for one in rows] == ["HEALTHY", "UNHEALTHY"], "nor is it chosen while others can be"
    assert asking.fails(ONE)
    assert not asking.fails(TWO)
    asking.session.settle()
    assert ONE in asking.instances(), "Envoy may not have read it yet"
    assert asking.fails(ONE)
    asking.session.settle()
    assert asking.instances() == {TWO: "service"}
    assert asking.session.settle_at is None
    assert asking.generation() == 0
    asking.revoke()
    assert asking.instances() == {ONE: "service", TWO: "service"}
    assert not asking.fails(ONE)


def test_a_deregistered_instance_is_withdrawn_and_one_that_merely_left_is_not() -> None:
    asking = Asking()
    stay, gone = asking.without(ONE)
    asking.put(endpoints=stay)
    assert asking.instances() == {TWO: "service"}
    assert not asking.fails(ONE)
    asking = Asking()
    asking.put(endpoints=stay, deregistered=gone)
    assert asking.instances() == {ONE: "withdrawn", TWO: "service"}
    assert asking.fails(ONE)
    asking.put(endpoints=(*gone, *stay), deregistered=())
    assert asking.instances() == {ONE: "withdrawn", TWO: "service"}, "it is there again, and its calls have not ended"
    assert asking.fails(ONE)
    asking.session.settle()
    assert asking.instances() == {ONE: "service", TWO: "service"}
    assert not asking.fails(ONE)


def test_the_calls_to_an_instance_that_came_back_at_once_end_though_no_check_was_made() -> None:
    asking = Asking()
    stay, gone = asking.without(ONE)
    asking.put(endpoints=stay, deregistered=gone)
    asking.put(endpoints=(*gone, *stay), deregistered=())
    asking.now += PATIENCE_S
    asking.session.settle()
    assert asking.instances() == {ONE: "service", TWO: "service"}
    assert asking.generation() == 1, "all calls of the upstream are ended"


def test_where_no_check_comes_all_calls_of_the_upstream_are_ended_in_time() -> None:
    asking = Asking()
    asking.revoke(Revocation("instance", ONE))
    assert asking.session.settle_at == asking.now + PATIENCE_S
    asking.now += PATIENCE_S
    asking.session.settle()
    assert asking.instances() == {TWO: "service"}
    assert asking.generation() == 1


def test_calls_from_before_a_change_of_the_cluster_are_not_left_to_checks() -> None:
    asking = Asking()
    asking.put(config={"connect_timeout_ms": 1234})
    assert asking.generation() == 0
    asking.revoke(Revocation("instance", ONE))
    assert asking.generation() == 1
    asking.revoke()
    asking.revoke(Revocation("instance", TWO))
    assert asking.generation() == 1, "all calls are younger than the cluster now"


def test_a_call_may_be_on_an_instance_that_left_before_it_was_revoked() -> None:
    asking = Asking()
    stay, _ = asking.without(ONE)
    asking.put(endpoints=stay)
    asking.revoke(Revocation("service", "db"))
    assert asking.generation() == 1


def test_another_stream_knows_whether_checks_end_all_calls() -> None:
    for mixed in (False, True):
        asking = Asking()
        if mixed:
            asking.put(config={"connect_timeout_ms": 1234})
        versions = {url: dict(rows) for url, rows in asking.session._versions.items()}
        for changed in (False, True):
            again = Asking()
            again.upstream = asking.upstream
            if changed:
                versions[types.ENDPOINTS][WAY] = "another"
            for url in (types.CLUSTER, types.ENDPOINTS, types.LISTENER):
                again.session.request(
                    messages.DeltaRequest(type_url=url, initial_resource_versions=versions.get(url, {}))
                )
            again.tell()
            again.revoke(Revocation("instance", ONE))
            assert again.generation() == int(mixed or changed), (mixed, changed)


def test_http_and_upstreams_of_too_many_instances_are_not_checked() -> None:
    many = SidecarUpstream(
        "many",
        "many",
        "127.0.0.1",
        21001,
        endpoints=tuple(Endpoint("n", "10.0.0.9", n, "many", f"many-{n}") for n in range(1, CHECKED_MAX)),
    )
    leaving = Leaving()
    leaving.follow(
        make_snapshot(upstreams=(upstream("api", "http", "a"), many, upstream("db", "tcp", ONE, TWO))), 0.0
    )
    assert leaving.checked == {"upstream:many"}
    fewer = msgspec.structs.replace(many, endpoints=many.endpoints[:9])
    leaving.follow(make_snapshot(upstreams=(fewer, upstream("db", "tcp", ONE, TWO))), 0.0)
    assert leaving.checked == {"upstream:many"}, "what was too much stays out"


class Envoy:
    """A connection for checks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def ask(self, name: tuple[str, str]) -> None:
        self.writer.write(f"GET /{name[0]} HTTP/1.1\r\nhost: {name[1]}\r\nuser-agent: Envoy/HC\r\n\r\n".encode())

    async def answer(self) -> int:
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1])


@both_loops
async def test_a_check_is_held_until_its_instance_is_withdrawn() -> None:
    async def make() -> Any:
        raise AssertionError("checks need no gRPC")

    checks = Checks()
    door = XdsDoor(make, checks)
    port = await door.start("127.0.0.1", 0)
    changed = asyncio.Event()
    checks.follow("e", changed.set)
    try:
        async with asyncio.timeout(20):
            envoy = Envoy(*await asyncio.open_connection("127.0.0.1", port))
            envoy.ask(("e", "one"))
            assert await envoy.answer() == 200
            envoy.ask(("e", "one"))
            await until(lambda: bool(checks._held))
            checks.withdraw("e", ["two"])
            checks.withdraw("other", ["one"])
            assert checks._held
            checks.withdraw("e", ["one"])
            assert await envoy.answer() == 503
            assert checks.acknowledged("e") == set()
            envoy.ask(("e", "one"))
            assert await envoy.answer() == 503
            assert checks.acknowledged("e") == {"one"}
            await changed.wait()
            checks.withdraw("e", [])
            envoy.ask(("e", "one"))
            assert await envoy.answer() == 200, "after a failure the next one is told at once"
            assert not checks._held
            await hang_up(envoy.writer)
            await until(lambda: not checks.connections)
    finally:
        await door.stop()


@both_loops
async def test_nobody_can_acknowledge_a_withdrawal_in_an_envoys_place() -> None:
    async def make() -> Any:
        raise AssertionError("checks need no gRPC")

    checks = Checks()
    door = XdsDoor(make, checks)
    port = await door.start("127.0.0.1", 0)
    try:
        async with asyncio.timeout(20):
            envoy, other = [Envoy(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(2)]
            envoy.ask(("e", "one"))
            assert await envoy.answer() == 200
            envoy.ask(("e", "one"))
            await until(lambda: bool(checks._held))
            checks.withdraw("e", ["one"])
            for _ in range(3):
                other.ask(("e", "one"))
                assert await other.answer() == 503
            assert checks.acknowledged("e") == set()
            assert await envoy.answer() == 503
            await hang_up(envoy.writer)
            await until(lambda: checks.acknowledged("e") == {"one"})
            checks.forget("e")
            assert not checks._told
            assert not checks._owing
            await hang_up(other.writer)
    finally:
        await door.stop()


@both_loops
async def test_what_is_no_check_is_dropped_and_nothing_is_held_for_it() -> None:
    checks = Checks()

    async def make() -> Any:
        raise OSError("not here")

    door = XdsDoor(make, checks)
    port = await door.start("127.0.0.1", 0)
    junk = (
        b"GET / HTTP/1.1\r\nx: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n",
        b"GET \0\0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 3,
        b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\nPRI",
    )
    try:
        async with asyncio.timeout(20):
            for data in junk:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(data)
                try:
                    await reader.read(-1)
                except ConnectionError:
                    pass
                await hang_up(writer)
            assert not checks._held
            assert not checks.connections
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTT")
            await until(lambda: bool(checks.connections))
    finally:
        await door.stop()
        await hang_up(writer)
    assert not checks.connections


@both_loops
async def test_a_check_that_does_not_come_whole_or_is_not_made_again_frees_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("node.xds.checks.ASK_S", 0.05)
    checks = Checks()
    door = XdsDoor(no_grpc, checks)
    port = await door.start("127.0.0.1", 0)
    try:
        async with asyncio.timeout(20):
            good, silent, slow = [Envoy(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(3)]
            good.writer.write(b"GET /e HTTP/1.1\r\nhost: one\r\n\r\n")
            assert await good.answer() == 200
            good.ask(("e", "one"))
            await until(lambda: bool(checks._held))
            silent.ask(("e", "two"))
            assert await silent.answer() == 200
            slow.writer.write(b"GET / HTT")
            for one in (silent, slow):
                with contextlib.suppress(ConnectionError):
                    assert await one.reader.read() == b""
            await until(lambda: len(checks.connections) == 1)
            assert checks._held, "what is held is not idle"
            for one in (good, silent, slow):
                await hang_up(one.writer)
    finally:
        await door.stop()


@both_loops
async def test_checks_beyond_those_that_are_taken_do_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An Envoy makes a check that was dropped again after half a second, each of them."""
    monkeypatch.setattr("node.xds.checks.CHECKS_MAX", 0)
    checks = Checks()
    door = XdsDoor(no_grpc, checks)
    port = await door.start("127.0.0.1", 0)
    try:
        async with asyncio.timeout(20):
            for _ in range(5):
                envoy = Envoy(*await asyncio.open_connection("127.0.0.1", port))
                envoy.ask(("e", "one"))
                with contextlib.suppress(ConnectionError):
                    assert await envoy.reader.read() == b""
                await hang_up(envoy.writer)
    finally:
        await door.stop()
    assert caplog.text.count("one is dropped") == 1


async def no_grpc() -> Any:
    raise AssertionError("checks need no gRPC")


def test_an_instance_that_takes_over_is_withdrawn_from_its_own_group() -> None:
    """With a plan: a failover's instance keeps its priority until its calls have ended."""
    entries = {("service-resolver", "db"): {"Failover": {"*": {"Service": "spare"}}}}
    checked = {key: check_entry(*key, entry) for key, entry in entries.items()}
    plan = compile_plan("db", lambda kind, name: checked.get((kind, name)), "dc1")
    asking = Asking()
    targets = {
        one.id: (Endpoint("n", "10.0.0.1", 20000 + i, one.service, f"{one.service}-1"),)
        for i, one in enumerate(plan.targets.values())
    }
    asking.put(plan=plan, endpoints=(), targets=targets)
    (cluster,) = asking.session._resources[types.ENDPOINTS]

    def rows() -> list[tuple[int, str, str]]:
        found = asking.session._resources[types.ENDPOINTS][cluster].get("endpoints", ())
        return [
            (row["priority"], one["metadata"]["filter_metadata"]["lictor"]["instance"], one["health_status"])
            for row in found
            for one in row["lb_endpoints"]
        ]

    assert rows() == [(0, "db-1", "HEALTHY"), (1, "spare-1", "HEALTHY")]
    asking.revoke(Revocation("service", "spare"))
    assert rows() == [(0, "db-1", "HEALTHY"), (1, "spare-1", "UNHEALTHY")]
    (spare,) = next(group for group in targets.values() if group[0].service == "spare")
    name = (ENVOY, label(cluster, key_of(spare)))
    assert asking.checks.fails(name, asking.connection)
    assert asking.checks.fails(name, asking.connection)
    asking.session.settle()
    assert rows() == [(0, "db-1", "HEALTHY")]
    gone = {id: group for id, group in targets.items() if group[0].service != "db"}
    asking.revoked = ()
    asking.put(targets=gone, deregistered=next(group for group in targets.values() if group[0].service == "db"))
    assert rows() == [(0, "db-1", "UNHEALTHY"), (1, "spare-1", "HEALTHY")]
