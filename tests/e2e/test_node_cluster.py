"""Three servers and agents in one loop, over real TLS and disks: what the backends promise."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from node.backend import READ_MODES, Backend, ViewEvent
from node.errors import BadRequest, NodeError, Refused
from node.pki import TlsFiles
from node.views import Rows, merge
from raftstate.model.catalog import CRITICAL, PASSING, SERF_HEALTH, Check, InstanceHealth, Node, ServiceInstance
from raftstate.model.connect import CARoot
from raftstate.model.identity import SpiffeId
from raftstate.model.kv import Session
from raftstate.state.commands import (
    AddCARoot,
    CatalogRegister,
    KVCas,
    KVLock,
    KVSet,
    RetireCARoot,
    Revoke,
    SessionCreate,
)
from raftstate.state.connect import active_root
from raftstate.state.snapshot import trust_domain_of
from tests.support.cluster import Cluster, cluster
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S, promptly
from tests.support.rpc import eventually

FAST_LIVENESS = '[liveness]\nheartbeat = "100ms"\nnode_ttl = "2s"\n'


async def register(backend: Backend, name: str, node: str, instance: str = "") -> int:
    """Register a node with an instance and a passing liveness check."""
    row = Node(node=node, address="127.0.0.1")
    service = ServiceInstance(node=node, id=instance or f"{name}-1", service=name, port=80)
    check = Check(node=node, check_id=SERF_HEALTH, name="Serf Health Status", status=PASSING)
    return (await backend.apply(CatalogRegister(row, service, (check,)))).index


def follow(backend: Backend, name: str, **params: Any) -> Any:
    return aclosing(cast("Any", backend.subscribe(name, params)))


async def step(events: Any) -> ViewEvent:
    async with asyncio.timeout(PATIENCE_S):
        return cast(ViewEvent, await anext(events))


def request(trust_domain: str, service: str, instance: str = "") -> str:
    """A CSR as an agent makes it."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, service)]
    if instance:
        names.append(x509.NameAttribute(NameOID.USER_ID, instance))
    uri = x509.UniformResourceIdentifier(SpiffeId(trust_domain=trust_domain, service=service).uri())
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(names))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


async def trust_domain(backend: Backend) -> str:
    return str((await backend.query("connect.roots")).value["TrustDomain"])


def backends(running: Cluster) -> list[Backend]:
    return [node.backend for node in (*running.servers.values(), *running.clients.values())]


async def test_a_write_through_any_node_is_read_on_every_node(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        await running.follower()
        for number, writer in enumerate(backends(running)):
            applied = await writer.apply(KVSet("a", str(number).encode()))
            assert applied.unwrap() is True
            for reader in backends(running):
                for mode in READ_MODES[::2]:
                    result = await reader.query("kv.get", {"key": "a"}, mode=mode)
                    assert result.value["Value"] == str(number).encode()
                    assert (result.known_leader, result.last_contact_ms) == (True, 0)
            own = await writer.query("kv.get", {"key": "a"}, mode="stale")
            assert own.value["Value"] == str(number).encode(), "a node never reads older than what it wrote"


async def test_a_retry_with_the_same_request_id_is_applied_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        follower = await running.follower()
        client = running.clients["client-1"].backend
        first = await client.apply(KVCas("n", b"1", 0), request_id="once")
        assert first.unwrap() is True
        again = await follower.backend.apply(KVCas("n", b"1", 0), request_id="once")
        assert (again.index, again.value) == (first.index, True)


async def test_refusals_and_bad_requests_keep_their_kind_over_rpc(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        follower = await running.follower()
        for backend in (running.clients["client-1"].backend, follower.backend):
            applied = await backend.apply(CatalogRegister(Node(node="", address="x")))
            assert applied.refusal is not None
            with pytest.raises(Refused):
                applied.unwrap()
            with pytest.raises(BadRequest, match="there is no query"):
                await backend.query("nope")
            with pytest.raises(Refused) as large:
                await backend.apply(KVSet("big", b"x" * 600_000))
            assert large.value.http_status == 413
            with pytest.raises(BadRequest, match="unknown operator verb"):
                await backend.operator("format.disk")
        # The authority's keys: a server asks its own store, an agent's certificate is turned away at the door.
        with pytest.raises(BadRequest, match="itself only"):
            await follower.backend.query("internal.ca_signing_material")
        with pytest.raises(Refused, match="is for servers"):
            await running.clients["client-1"].backend.query("internal.ca_signing_material")


async def test_the_leaders_end_loses_no_write_and_wakes_no_one_falsely(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=2) as running:
        leader = await running.leader()
        index = await register(running.clients["client-1"].backend, "web", "n1")
        parked = [
            asyncio.ensure_future(
                backend.query("health.service", {"service": "web"}, min_index=index, wait_s=30, mode=mode)
            )
            for backend in backends(running)
            if backend is not leader.backend
            for mode in READ_MODES
        ]
        acknowledged: list[int] = []

        async def write(number: int) -> None:
            backend = running.clients[f"client-{number % 2 + 1}"].backend
            (await backend.apply(KVSet(f"k/{number}", b"x"))).unwrap()
            acknowledged.append(number)

        writes = [asyncio.ensure_future(write(number)) for number in range(20)]
        await eventually(lambda: len(acknowledged) > 2)
        await running.stop_server(leader.node.name)
        writes += [asyncio.ensure_future(write(number)) for number in range(20, 40)]
        await asyncio.gather(*writes)
        keys = (await running.clients["client-1"].backend.query("kv.keys", {"prefix": "k/"})).value
        assert len(keys) == 40
        await asyncio.sleep(0)
        woken = [query.exception() or query.result() for query in parked if query.done()]
        assert not woken, "a leader change wakes no one"
        second = await register(running.clients["client-2"].backend, "web", "n2")
        for result in await asyncio.gather(*parked):
            assert result.index == second


async def test_a_paused_leader_is_not_waited_for(tmp_path: Path) -> None:
    """A partition stands for the pause: nothing is refused, nothing answers."""
    async with cluster(tmp_path, clients=1) as running:
        leader = await running.leader()
        others = [name for name in running.servers if name != leader.node.name]
        leader.faults.block([*others, "client-1"])
        for name in others:
            running.servers[name].faults.block([leader.node.name])
        async with promptly(5.0, "writing without the paused leader"):
            for backend in [running.servers[name].backend for name in others]:
                (await backend.apply(KVSet("a", b"1"), timeout_s=PATIENCE_S)).unwrap()
        (await running.clients["client-1"].backend.apply(KVSet("b", b"1"), timeout_s=PATIENCE_S)).unwrap()
        with pytest.raises(NodeError):
            await leader.backend.apply(KVSet("c", b"1"), timeout_s=0.5)
        with pytest.raises((NodeError, TimeoutError)):
            await asyncio.wait_for(leader.backend.query("kv.get", {"key": "a"}), 1.0)
        leader.faults.block([])
        for name in others:
            running.servers[name].faults.block([])
        result = await leader.backend.query("kv.get", {"key": "a"})
        assert result.value["Value"] == b"1"


async def test_a_subscription_outlives_its_server_without_a_reset(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        client = running.clients["client-1"]
        await register(client.backend, "web", "n0")
        async with follow(client.backend, "health.service", service="web") as events:
            first = await step(events)
            assert first.reset
            rows: Rows = merge({}, first)
            lost = client.link.server
            await running.stop_server(lost)
            await eventually(lambda: client.link.server not in ("", lost))
            await register(client.backend, "web", "n1")
            while len(rows) < 2:  # n0's own checks may still be coming
                event = await step(events)
                assert not event.reset
                rows = merge(rows, event)


async def test_leaves_are_signed_for_what_is_registered_on_the_asking_node(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=2) as running:
        await running.follower()
        one, two = (running.clients[name].backend for name in ("client-1", "client-2"))
        domain = await trust_domain(one)
        assert domain.endswith(".consul")
        await register(one, "web", "client-1")
        chain = await one.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
        leaf = x509.load_pem_x509_certificates(chain.encode())[0]
        (root,) = (await one.query("connect.roots")).value["Roots"]
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(root["RootCert"].encode()))
        with pytest.raises(Refused, match="not registered on node 'client-2'"):
            await two.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
        (await two.apply(Revoke("instance", "web-1", reason="stolen"))).unwrap()
        with pytest.raises(Refused, match="is revoked") as refused:
            await one.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
        assert refused.value.http_status == 403


async def test_a_leaf_asked_for_before_its_registration_arrives_waits_for_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        client = running.clients["client-1"].backend
        domain = await trust_domain(client)
        await running.leader()
        domain = await trust_domain(client)
        asked = asyncio.ensure_future(
            client.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
        )
        await asyncio.sleep(0.05)
        await register(client, "web", "client-1")
        assert "BEGIN CERTIFICATE" in await asked


async def test_the_root_is_made_once_sealed_and_rotated_without_a_gap(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        leader = await running.leader()
        client = running.clients["client-1"].backend
        domain = await trust_domain(client)
        (old,) = (await client.query("connect.roots")).value["Roots"]
        new = await client.operator("ca.rotate")
        roots = (await client.query("connect.roots")).value
        assert (roots["ActiveRootID"], len(roots["Roots"])) == (new["ID"], 2)
        await register(client, "web", "client-1")
        chain = await client.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
        leaf, crossed = x509.load_pem_x509_certificates(chain.encode())
        leaf.verify_directly_issued_by(crossed)
        crossed.verify_directly_issued_by(x509.load_pem_x509_certificate(old["RootCert"].encode()))
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(new["RootCert"].encode()))
        await running.stop_server(leader.node.name)
        await running.leader()
        assert len((await client.query("connect.roots")).value["Roots"]) == 2, "a new leader makes no new root"
        await client.sign_leaf(request(domain, "web", "web-1"), service="web", instance="web-1")
    secrets = TlsFiles(running.config.tls_dir).cluster_key.read_bytes()
    for path in (tmp_path / "lictor-data").glob("server-*/raft/**/*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"PRIVATE KEY" not in data
            assert secrets not in data


async def test_a_silent_agent_turns_critical_and_passing_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1, extra=FAST_LIVENESS) as running:
        leader = await running.leader()
        client = running.clients.pop("client-1")
        await register(client.backend, "web", "client-1")

        async def status() -> str:
            (check,) = (await leader.backend.query("health.node", {"node": "client-1"})).value
            return str(check["Status"])

        async def turns(wanted: str) -> None:
            async with asyncio.timeout(PATIENCE_S):
                index = 0
                while await status() != wanted:
                    result = await leader.backend.query(
                        "health.node", {"node": "client-1"}, min_index=index, wait_s=2
                    )
                    index = result.index

        await asyncio.sleep(2.5)  # longer than an agent may be silent
        assert await status() == PASSING, "heartbeats arrive"
        await client.stop()
        await turns(CRITICAL)
        await running.start_client("client-1")
        await turns(PASSING)


async def test_an_election_fails_no_healthy_agent(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1, extra=FAST_LIVENESS) as running:
        leader = await running.leader()
        client = running.clients["client-1"].backend
        await register(client, "web", "client-1")
        index = (await client.query("health.node", {"node": "client-1"})).index
        await running.stop_server(leader.node.name)
        result = await client.query("health.node", {"node": "client-1"}, min_index=index, wait_s=3)
        assert result.index == index, "the check has not changed"


async def test_a_session_that_is_not_renewed_ends_and_frees_its_lock(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        leader = await running.leader()
        client = running.clients["client-1"].backend
        await register(client, "web", "client-1")
        session = Session(id="0" * 8 + "-0000-0000-0000-000000000001", node="client-1", ttl="10s", lock_delay=0)
        (await client.apply(SessionCreate(session))).unwrap()
        assert (await client.apply(KVLock("lock", b"", session.id))).unwrap() is True
        await eventually(lambda: session.id in leader.duties.session_deadlines)
        leader.duties.session_deadlines.beat(session.id, 0.0, 0.001)
        async with asyncio.timeout(PATIENCE_S):
            held = await client.query("kv.get", {"key": "lock"})
            while "Session" in held.value:
                held = await client.query("kv.get", {"key": "lock"}, min_index=held.index, wait_s=5)


async def test_operators_see_and_move_leadership(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        leader = await running.leader()
        client = running.clients["client-1"].backend
        addresses = {server.node.rpc_endpoint for server in running.servers.values()}
        assert await client.operator("status.leader") == leader.node.rpc_endpoint
        assert set(await client.operator("status.peers")) == addresses
        configuration = await client.operator("raft.configuration")
        assert {server["Address"] for server in configuration["Servers"]} == addresses
        assert [server["ID"] for server in configuration["Servers"] if server["Leader"]] == [leader.node.name]
        status = await client.operator("raft.status")
        assert status["state"] in ("leader", "follower")
        other = next(name for name in running.servers if name != leader.node.name)
        await client.operator("raft.transfer_leader", {"id": other})
        await eventually(lambda: running.servers[other].duties.in_office)
        with pytest.raises(Refused, match="is no voter"):
            await client.operator("raft.transfer_leader", {"id": "nobody"})
        health = await client.operator("autopilot.health")
        assert len(health["Servers"]) == 3
        with pytest.raises(BadRequest, match="its own API"):
            await client._repeat(
                lambda connection, left_s: connection.call("operator", b"\x92\xacfaults.block\x80", left_s),
                5,
                write=False,
            )


async def test_a_server_leaves_and_another_joins(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        await running.leader()
        client = running.clients["client-1"].backend
        (await client.apply(KVSet("a", b"1"))).unwrap()
        gone = (await running.follower()).node.name
        await running.stop_server(gone)
        await client.operator("raft.remove_peer", {"id": gone})
        assert len((await client.operator("raft.configuration"))["Servers"]) == 2
        server = await running.start_server(gone)
        await eventually(lambda: server.replica.leader is not None)
        servers = (await client.operator("raft.configuration"))["Servers"]
        assert sorted(one["ID"] for one in servers) == ["server-1", "server-2", "server-3"]
        result = await server.backend.query("kv.get", {"key": "a"})
        assert result.value["Value"] == b"1"


async def test_a_new_server_joins_by_itself_and_votes(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    extra = f'[nodes.server-9]\nrole = "server"\njoin = true\nrpc_port = {port}\nhttp_port = 0\ndns_port = 0\n'
    async with cluster(tmp_path, extra=extra) as running:
        leader = await running.leader()
        (await leader.backend.apply(KVSet("a", b"1"))).unwrap()

        def votes() -> bool:
            return [member.voter for member in leader.replica.members() if member.id == "server-9"] == [True]

        await eventually(votes)
        result = await running.servers["server-9"].backend.query("kv.get", {"key": "a"}, mode="stale")
        assert result.value["Value"] == b"1"


async def test_everything_comes_back_after_all_servers_stopped(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        await running.leader()
        client = running.clients["client-1"].backend
        (await client.apply(KVSet("a", b"1"))).unwrap()
        names = list(running.servers)
        await asyncio.gather(*(running.stop_server(name) for name in names))
        await asyncio.gather(*(running.start_server(name) for name in names))
        assert (await client.query("kv.get", {"key": "a"})).value["Value"] == b"1"


async def test_an_agent_cannot_plant_a_root_of_its_own(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        await running.leader()
        client = running.clients["client-1"].backend
        root = CARoot(id="aa", name="mine", root_cert="-----BEGIN CERTIFICATE-----")
        with pytest.raises(Refused, match="AddCARoot is for servers"):
            await client.apply(AddCARoot(root, b"key"))
        with pytest.raises(Refused, match="RetireCARoot is for servers"):
            await client.apply(RetireCARoot("aa"))


async def test_an_agent_leaves_a_server_that_is_cut_off_from_its_peers(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1, extra=FAST_LIVENESS) as running:
        await running.leader()
        client = running.clients["client-1"]
        await eventually(lambda: client.link.server != "")
        lonely = client.link.server
        others = [name for name in running.servers if name != lonely]
        running.servers[lonely].faults.block(others)
        for name in others:
            running.servers[name].faults.block([lonely])
        (await client.backend.apply(KVSet("a", b"1"), timeout_s=10)).unwrap()
        assert client.link.server in others


async def test_an_agent_keeps_a_server_when_none_knows_a_leader(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1, extra=FAST_LIVENESS) as running:
        await running.leader()
        client = running.clients["client-1"]
        written = (await client.backend.apply(KVSet("a", b"1"))).index
        kept = client.link.server
        replica = running.servers[kept].replica
        await eventually(lambda: replica.status().applied_index >= written)
        for name in [name for name in running.servers if name != kept]:
            await running.stop_server(name)
        await eventually(lambda: replica.leader is None)
        await eventually(lambda: not client.link.known_leader)
        for _ in range(3):
            stale = await client.backend.query("kv.get", {"key": "a"}, mode="stale")
            assert stale.value["Value"] == b"1"
            assert not stale.known_leader
        assert client.link.server == kept


async def test_parked_readers_of_an_agent_share_one_place_on_the_server(tmp_path: Path) -> None:
    async with cluster(tmp_path, servers=1, clients=1) as running:
        server = await running.leader()
        client = running.clients["client-1"].backend
        index = await register(client, "web", "n1")
        parked = [
            asyncio.ensure_future(
                client.query("health.service", {"service": "web"}, min_index=index, wait_s=30, mode=mode)
            )
            for mode in READ_MODES
            for _ in range(100)
        ]
        await eventually(lambda: len(client.followed) == 1)
        (connection,) = server.listener.connections
        await eventually(lambda: len(connection) == 1)
        assert not any(query.done() for query in parked)
        second = await register(client, "web", "n2")
        for result in await asyncio.gather(*parked):
            assert (result.index, len(result.decode(tuple[InstanceHealth, ...]))) == (second, 2)


async def test_stale_reads_of_an_agent_are_answered_locally_and_never_go_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, servers=1, clients=1) as running:
        await running.leader()
        client = running.clients["client-1"].backend
        await register(client, "web", "n0")

        async def stale() -> int:
            result = await client.query("health.service", {"service": "web"}, mode="stale")
            return len(result.value)

        assert [await stale() for _ in range(3)] == [1, 1, 1]
        assert len(client.followed) == 1
        for number in range(1, 6):
            await register(client, "web", f"n{number}")
            assert await stale() == number + 1, "what this agent wrote, it reads"
        await running.stop_server("server-1")
        await eventually(lambda: running.clients["client-1"].link.server == "")
        result = await client.query("health.service", {"service": "web"}, mode="stale")
        assert (len(result.value), result.known_leader) == (6, False)


async def test_following_ends_with_a_bad_query(tmp_path: Path) -> None:
    async with cluster(tmp_path, servers=1, clients=1) as running:
        await running.leader()
        client = running.clients["client-1"].backend
        for _ in range(3):
            with pytest.raises(BadRequest):
                await client.query("nope", mode="stale")
        await eventually(lambda: len(client.followed) == 0)


async def pieces_of(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def saved_of(directory: Path, key: str) -> bytes:
    """A backup of a cluster that was made and is gone; its certificates and its cluster key stay."""
    async with cluster(directory, servers=1) as other:
        server = other.servers["server-1"]
        (await server.backend.apply(KVSet(key, b"1"))).unwrap()
        await eventually(lambda: active_root(server.replica.machine.store) is not None)
        saved = b"".join([piece async for piece in server.backend.snapshot_save()])
    shutil.rmtree(server.node.data_dir)
    return saved


async def keys_of(backend: Backend) -> list[str]:
    keys: list[str] = (await backend.query("kv.keys", {"prefix": ""}, mode="consistent")).value
    return keys


async def test_a_backup_of_another_cluster_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    saved = await saved_of(tmp_path, "theirs")
    async with cluster(tmp_path, clients=1) as running:
        follower = await running.follower()
        store = lambda: follower.replica.machine.store  # noqa: E731 - a restore puts another in its place
        await eventually(lambda: active_root(store()) is not None)
        ours = trust_domain_of(store())
        client = running.clients["client-1"].backend
        (await client.apply(KVSet("ours", b"1"))).unwrap()
        for restorer in (client, follower.backend):
            with pytest.raises(Refused, match=f"another cluster: .*this cluster's is {ours}.*-foreign") as refused:
                await restorer.snapshot_restore(pieces_of(saved))
            assert refused.value.http_status == 409
            assert await keys_of(client) == ["ours"]
        await client.snapshot_restore(pieces_of(saved), foreign=True)
        assert await keys_of(client) == ["theirs"]
        await eventually(lambda: trust_domain_of(store()) != ours)


async def test_a_backup_whose_authority_could_sign_nothing_here_is_refused_always(tmp_path: Path) -> None:
    saved = await saved_of(tmp_path / "theirs", "theirs")
    async with cluster(tmp_path / "ours", clients=1) as running:
        client = running.clients["client-1"].backend
        (await client.apply(KVSet("ours", b"1"))).unwrap()
        with pytest.raises(Refused, match=r"this server's cluster key: copy cluster\.key") as refused:
            await client.snapshot_restore(pieces_of(saved), foreign=True)
        assert refused.value.http_status == 409
        assert await keys_of(client) == ["ours"]


async def test_a_backup_is_saved_and_restored_through_any_node(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        follower = await running.follower()
        client = running.clients["client-1"].backend
        for number in range(20):
            (await client.apply(KVSet(f"k/{number}", b"x" * 100_000))).unwrap()
        for saver, restorer in ((client, follower.backend), (follower.backend, client)):
            for _ in range(3):  # asked again and again, it is followed
                await client.query("kv.keys", {"prefix": ""}, mode="stale")
            assert len(client.followed) == 1
            saved = b"".join([piece async for piece in saver.snapshot_save()])
            assert len(saved) > 2_000_000
            (await client.apply(KVSet("k/0", b"changed"))).unwrap()
            (await client.apply(KVSet("new", b"1"))).unwrap()
            await restorer.snapshot_restore(pieces_of(saved))
            for reader in backends(running):
                keys = (await reader.query("kv.keys", {"prefix": ""}, mode="consistent")).value
                assert len(keys) == 20
                first = await reader.query("kv.get", {"key": "k/0"})
                assert first.value["Value"] == b"x" * 100_000
            async with asyncio.timeout(PATIENCE_S):
                while len((await client.query("kv.keys", {"prefix": ""}, mode="stale")).value) != 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            with pytest.raises(Refused, match="damaged"):
                await restorer.snapshot_restore(pieces_of(saved[:-100] + bytes(100)))
        (await client.apply(KVSet("after", b"1"))).unwrap()
