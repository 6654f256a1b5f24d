"""A server put together, read top to bottom: disk, replica, port, backend, the leader's duties."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from typing import Any

from node import pki
from node.acl_writes import AclWrites
from node.autopilot import DEFAULTS, health, shown
from node.ca.authority import Authority
from node.config import SERVER, ClusterConfig, NodeConfig
from node.errors import PkiError
from node.faults import FaultFilter
from node.joining import PATIENCE_S, join_if_unknown, leave_first
from node.leader_duties import LeaderDuties
from node.leader_route import LeaderRoute
from node.operator_verbs import OperatorVerbs
from node.peers import PeerConnections
from node.rejoin import LEAVE, Marker, RejoinMarker
from node.rpc.listener import Listener
from node.server import ServerBackend
from node.server_rpc import ServerRpc
from node.tasks import Tasks
from node.tokens import first_token_of, tokens_of
from node.version import lictor_version
from raftstate.disk import RealDisk
from raftstate.errors import RaftError
from raftstate.journal import Journal
from raftstate.model.autopilot import AutopilotConfig
from raftstate.model.catalog import PASSING, SERF_HEALTH
from raftstate.raft_config import RaftConfig
from raftstate.raft_members import Member, Members
from raftstate.replica import Replica
from raftstate.snapshots import SnapshotStore
from raftstate.state.machine import StateMachine
from raftstate.transport import TlsPeerTransport
from raftstate.watch import Watches

log = logging.getLogger("lictor.server")

WARM_EVERY_S = 1.0
COLLECT_EVERY_S = 1800.0


class ServerNode:
    """One server of the cluster. `await start()`, then use `backend`; `await stop()` hands leadership over."""

    def __init__(
        self,
        config: ClusterConfig,
        node: NodeConfig,
        *,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        rng: random.Random | None = None,
        silent_since: float | None = None,
    ) -> None:
        """`silent_since`: see `RaftCore`, by `boot_clock`."""
        self.config, self.node = config, node
        self._on_failure, self._silent_since = on_failure, silent_since
        self._rng = rng or random.Random()
        self.faults = FaultFilter(enabled=config.fault_injection)
        self._tasks = Tasks("server")
        self._listening = self._running = False
        """Whether there is something to stop, and whether all of it runs."""

    async def start(self) -> None:
        """Open disk, port and replica. Raises NodeError, RaftError (damaged data), OSError (port taken)."""
        config, node = self.config, self.node
        files = pki.TlsFiles(config.tls_dir)
        cluster_key = pki.load_cluster_key(files.cluster_key)

        self.transport = TlsPeerTransport(
            node.name,
            pki.client_context(files, node.name, pki.ALPN_RAFT),
            peer_name=self._server_name,
            on_frame=self._deliver,
            on_read=self._delivered,
            on_connected=self._peer_lost,  # what was sent before there was a link is lost as well
            on_disconnected=self._peer_lost,
            fault_filter=self.faults.blocks if config.fault_injection else None,
        )
        directory = node.data_dir / "raft"
        disk = RealDisk()
        self._marker = RejoinMarker(disk, node.data_dir)
        marker = await asyncio.to_thread(self._marker.resume)
        journal = await asyncio.to_thread(Journal, disk, str(directory / "journal"))
        self.replica = Replica(
            node.name,
            journal=journal,
            snapshots=SnapshotStore(disk, str(directory / "snapshots")),
            machine=StateMachine(),
            watches=Watches(),
            peers=self.transport,
            bootstrap=self._founders(marker),
            config=RaftConfig(
                heartbeat_s=config.raft.heartbeat_s,
                election_timeout_min_s=config.raft.election_timeout_min_s,
                election_timeout_max_s=config.raft.election_timeout_max_s,
                command_bytes_max=config.limits.command_bytes_max,
            ),
            rng=self._rng,
            silent_since=self._silent_since,
            on_failure=self._on_failure,
        )

        self.peers = PeerConnections(
            pki.client_context(files, node.name, pki.ALPN_RPC), config.datacenter, blocked=self.faults.blocks
        )
        route = LeaderRoute(self.replica, self.peers, rng=self._rng)
        self.backend = ServerBackend(self.replica, route, node=node.name)
        authority = Authority(
            datacenter=config.datacenter,
            trust_domain=config.trust_domain,
            cluster_key=cluster_key,
            leaf_ttl_s=config.leaf_ttl_s,
            ask=self.backend.reads.ask_internal,
            instance_of=lambda host, instance: self._store.services.rows.get((host, instance)),
            apply=self.backend.apply,
        )
        self.backend.authority = authority
        verbs = OperatorVerbs(
            self.replica, route, authority, self.faults, health=self._health, autopilot=self._autopilot_shown
        )
        self.backend.verbs = verbs
        if config.acl_enabled:
            writes = AclWrites(self.backend.apply, tokens_of(config, self.backend), node.data_dir)
            verbs.add("acl.write", writes.run)
        self.duties = LeaderDuties(
            self.backend, self.replica, authority, config.liveness, first_token=first_token_of(config)
        )
        self.rpc = ServerRpc(self.backend, verbs, self.duties)

        self.listener = Listener(
            pki.server_context(files, node.name),
            config.datacenter,
            self.rpc.methods,
            limits=config.limits,
            accept_raft=lambda peer: self.transport.incoming(peer.node),
            blocked=self.faults.blocks,
        )
        self.rpc.crowded = lambda: self.listener.crowded
        try:
            await self.listener.start(node.bind_address, node.rpc_port)
        except OSError:
            await asyncio.to_thread(journal.close)
            raise
        self._listening = True
        others = [server for server in config.servers() if server.name != node.name]
        # Until its log names the members, a server that joins answers those that the file names.
        self.transport.set_peers({server.name: server.rpc_endpoint for server in others})
        await self.transport.start()
        if marker is None or marker.stage != LEAVE:
            await self.replica.start()
        self.rpc.start()
        self.duties.start()
        self._tasks.spawn(self._own_heartbeat())
        self._tasks.spawn(self._keep_peers_near())
        self._tasks.spawn(self._collect())
        self._tasks.spawn(self._come_in(marker, others))
        self._running = True
        log.info("server: %s listens for its peers at %s", node.name, node.rpc_endpoint)

    async def _come_in(self, marker: Marker | None, others: list[NodeConfig]) -> None:
        patience_s = PATIENCE_S
        if marker is not None and marker.stage == LEAVE:
            await leave_first(self.node, others, self.peers, self._rng)
            try:
                await asyncio.to_thread(self._marker.left)
                await self.replica.start()
            except (OSError, RaftError) as error:
                self._on_failure(error)
                return
            patience_s = 0.0  # nobody will come for a server that is no member
        await join_if_unknown(self.node, others, self.replica, self.peers, self._rng, patience_s=patience_s)

    async def hand_over(self, timeout_s: float) -> None:
        """Give leadership to another server, if this one has it; requests go on being answered."""
        if not self._running or self.replica.failure is not None or not self.replica.is_leader:
            return
        try:
            if len(self.replica.members()) < 2:
                return
            await self.replica.transfer_leadership(timeout_s=timeout_s)
        except RaftError as error:
            log.warning("server: leaving without handing over leadership: %s", error)

    async def stop(self) -> None:
        """Hand leadership over, then close everything; also what a start that failed has left."""
        if not self._listening:
            return
        self._listening = self._running = False
        await self._tasks.close()
        await self.duties.stop()
        await self.replica.stop()
        await self.backend.reads.hub.close()
        await self.rpc.stop()
        await self.listener.close()
        await self.transport.stop()
        await self.peers.close()

    def _founders(self, marker: Marker | None) -> Members:
        """The membership of a cluster that begins; what is on disk counts for more."""
        if self.node.join or marker is not None:
            return Members()
        servers = [server for server in self.config.servers() if not server.join]
        return Members.of(Member(server.name, server.rpc_endpoint) for server in servers)

    # -- what the transport asks -----------------------------------------------------------------------------------

    def _server_name(self, ssl_object: Any) -> str | None:
        try:
            peer = pki.peer_of(ssl_object, self.config.datacenter)
        except PkiError:
            return None
        return peer.node if peer.role == SERVER else None

    def _deliver(self, peer: str, frame: bytes) -> None:
        self.replica.deliver(peer, frame)

    def _delivered(self) -> None:
        self.replica.delivered()

    def _peer_lost(self, peer: str) -> None:
        self.replica.peer_lost(peer)

    # -- liveness --------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        machine = self.replica.machine
        assert isinstance(machine, StateMachine)
        return machine.store

    def _autopilot(self) -> AutopilotConfig:
        stored: AutopilotConfig = self._store.autopilot.rows.get("", DEFAULTS)
        return stored

    def _autopilot_shown(self) -> dict[str, Any]:
        return shown(self._autopilot(), self.config.liveness)

    def _health(self) -> dict[str, Any]:
        checks = self._store.checks.rows

        def alive(server: str) -> bool:
            check = checks.get((server, SERF_HEALTH))
            return check is not None and check.status == PASSING

        return health(
            self.replica.status(),
            alive,
            self.duties.stable_since(),
            version=lictor_version(),
            config=self._autopilot(),
        )

    async def _keep_peers_near(self) -> None:
        """Whoever leads next, what is forwarded then finds a connection: no handshake lengthens a hand-over."""
        while True:
            try:
                members = self.replica.members()
            except RaftError:
                members = ()
            others = [(member.id, member.address) for member in members if member.id != self.node.name]
            await self.peers.warm(others)
            await asyncio.sleep(WARM_EVERY_S * self._rng.uniform(0.8, 1.2))

    async def _collect(self) -> None:
        """Look for garbage among all objects now and then: with a large state half a second, so not as leader."""
        while True:
            await asyncio.sleep(COLLECT_EVERY_S * self._rng.uniform(0.8, 1.2))
            if not self.replica.is_leader:
                gc.collect()

    async def _own_heartbeat(self) -> None:
        while True:
            self.rpc.beat(self.node.name)
            await asyncio.sleep(self.config.liveness.heartbeat_s * self._rng.uniform(0.8, 1.2))
