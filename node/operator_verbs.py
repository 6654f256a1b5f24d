"""The operator's verbs on a server: which need the leader, and what each does. `node.backend` documents them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from node import protocol
from node.ca.sealing import SealError
from node.errors import BadRequest, NoLeader, Refused, TimedOut, UnknownOutcome, Unreachable
from node.faults import FaultFilter
from node.leader_route import LeaderRoute
from node.protocol import OperatorRequest, RestoreRequest, encode
from node.raft_errors import translate
from node.rpc.client import ClientConnection
from raftstate.errors import RaftError
from raftstate.model.wire import to_msgpack
from raftstate.replica import Replica
from raftstate.state.machine import StateMachine
from raftstate.state.snapshot import Restorer, trust_domain_of
from raftstate.state.store import Store

if TYPE_CHECKING:
    from node.ca.authority import Authority

OPERATOR_TIMEOUT_S = 30.0
ADD_TIMEOUT_S = 60.0
SNAPSHOT_TIMEOUT_S = 600.0
READING = frozenset({"raft.configuration", "autopilot.health", "autopilot.configuration"})
"""The leader's verbs that change nothing."""
RAFT_PROTOCOL = "3"
"""What Consul shows; clients only print it."""

Verb = Callable[[dict[str, Any]], Awaitable[Any]]


class OperatorVerbs:
    """Runs verbs on this server or, where they are the leader's, there."""

    def __init__(
        self,
        replica: Replica,
        route: LeaderRoute,
        authority: Authority,
        faults: FaultFilter,
        *,
        health: Callable[[], dict[str, Any]],
        autopilot: Callable[[], dict[str, Any]],
    ) -> None:
        self._replica, self._route, self._authority, self._faults = replica, route, authority, faults
        self._health, self._autopilot = health, autopilot
        self._leaders: dict[str, Verb] = {
            "raft.configuration": self._configuration,
            "raft.add_peer": self._add_peer,
            "raft.remove_peer": self._remove_peer,
            "raft.leave": self._leave,
            "raft.transfer_leader": self._transfer_leader,
            "autopilot.health": self._autopilot_health,
            "autopilot.configuration": self._autopilot_configuration,
            "ca.rotate": self._ca_rotate,
        }
        self._own: dict[str, Verb] = {
            "raft.status": self._raft_status,
            "status.leader": self._leader_address,
            "status.peers": self._peer_addresses,
            "faults.block": self._block,
            "node.servers": self._servers,
        }

    def add(self, name: str, verb: Verb) -> None:
        """Add a verb that any server runs by itself."""
        self._own[name] = verb

    async def run(self, request: OperatorRequest) -> bytes:
        """Run a verb; return its value as MessagePack. Raises BadRequest for an unknown one."""
        if (own := self._own.get(request.verb)) is not None:
            return to_msgpack(await own(request.params))
        verb = self._leaders.get(request.verb)
        if verb is None:
            known = ", ".join(sorted((*self._own, *self._leaders)))
            raise BadRequest(f"unknown operator verb {request.verb!r}; known: {known}")

        params = dict(request.params)
        if request.verb == "ca.rotate":
            params.setdefault("request_id", uuid.uuid4().hex)

        async def here(left_s: float) -> bytes:
            return to_msgpack(await verb(params))

        async def there(leader: ClientConnection, left_s: float) -> bytes:
            forward = encode(msgspec.structs.replace(request, params=params, forwarded=True))
            try:
                return await leader.call(protocol.OPERATOR, forward, left_s)
            except (Unreachable, TimedOut, UnknownOutcome):
                params.setdefault("asked", leader.peer.node)
                raise

        return await self._route.run(
            here,
            there,
            timeout_s=ADD_TIMEOUT_S if request.verb == "raft.add_peer" else OPERATOR_TIMEOUT_S,
            write=request.verb not in READING,
            forwarded=request.forwarded,
        )

    # -- the leader's ----------------------------------------------------------------------------------------------

    async def _configuration(self, params: dict[str, Any]) -> Any:
        await self._replica.read_barrier("consistent" if params.get("consistent") is True else "default")
        servers = [
            {
                "ID": member.id,
                "Node": member.id,
                "Address": member.address,
                "Leader": member.id == self._replica.leader,
                "ProtocolVersion": RAFT_PROTOCOL,
                "Voter": member.voter,
            }
            for member in self._replica.members()
        ]
        return {"Servers": servers, "Index": self._replica.status().commit_index}

    async def _add_peer(self, params: dict[str, Any]) -> None:
        server, address = _text(params, "id"), _text(params, "address")
        await self._replica.add_server(server, address, ADD_TIMEOUT_S)

    async def _remove_peer(self, params: dict[str, Any]) -> None:
        members = self._replica.members()
        if "id" in params:
            found = [member for member in members if member.id == params["id"]]
        else:
            address = _text(params, "address")
            found = [member for member in members if member.address == address]
        if not found and "asked" in params:
            return  # the attempt before this one, whose answer got lost, took it out
        if not found:
            known = ", ".join(f"{member.id} ({member.address})" for member in members)
            raise Refused(f"no such server in the raft configuration; it has {known}", http_status=404)
        await self._replica.remove_server(found[0].id)

    async def _leave(self, params: dict[str, Any]) -> None:
        """Return only when the committed membership, as a quorum knows it now, is without this server."""
        server = _text(params, "id")
        await self._replica.read_barrier("consistent")
        await self._replica.remove_server(server)

    async def _transfer_leader(self, params: dict[str, Any]) -> None:
        to = str(params["id"]) if params.get("id") else None
        known = [member.id for member in self._replica.members() if member.voter]
        if to is not None and to not in known:
            raise Refused(f"{to!r} is no voter; these are: {', '.join(known)}", http_status=400)
        # An attempt whose answer got lost, as the connection to the old leader ends with its leadership, may have
        # been the one that moved it: made again at the new leader it would move leadership back.
        moved = to is None and params.get("asked") not in (None, self._replica.id)
        if not moved and to != self._replica.leader:
            await self._replica.transfer_leadership(to)

    async def _autopilot_health(self, params: dict[str, Any]) -> Any:
        await self._replica.read_barrier("default")
        return self._health()

    async def _autopilot_configuration(self, params: dict[str, Any]) -> Any:
        await self._replica.read_barrier("default")
        return self._autopilot()

    async def _ca_rotate(self, params: dict[str, Any]) -> Any:
        return await self._authority.rotate(request_id=_text(params, "request_id"))

    # -- any server's ----------------------------------------------------------------------------------------------

    async def _raft_status(self, params: dict[str, Any]) -> Any:
        status = self._replica.status()
        return {
            "id": status.id,
            "state": status.role,
            "term": status.term,
            "leader": status.leader or "",
            "commit_index": status.commit_index,
            "applied_index": status.applied_index,
            "first_index": status.first_index,
            "last_index": status.last_index,
            "durable_index": status.durable_index,
            "snapshot_index": status.snapshot_index,
            "last_contact_ms": status.last_contact_ms,
            "lag": status.lag,
            "failure": status.failure or "",
            "members": [{"id": one.id, "address": one.address, "voter": one.voter} for one in status.members],
        }

    async def _leader_address(self, params: dict[str, Any]) -> str:
        leader = self._replica.leader
        return (self._route.address_of(leader) or "") if leader is not None else ""

    async def _peer_addresses(self, params: dict[str, Any]) -> list[str]:
        return [member.address for member in self._replica.members() if member.voter]

    async def _block(self, params: dict[str, Any]) -> Any:
        peers = params.get("peers", [])
        if not isinstance(peers, list) or not all(isinstance(peer, str) for peer in peers):
            raise BadRequest("peers must be a list of node names")
        return {"Blocked": self._faults.block(peers, one_way=params.get("one_way") is True)}

    async def _servers(self, params: dict[str, Any]) -> Any:
        servers = [{"Node": member.id, "Address": member.address} for member in self._replica.members()]
        return {"Servers": servers, "Connected": self._replica.id, "Leader": self._replica.leader or ""}

    # -- snapshots -------------------------------------------------------------------------------------------------

    async def snapshot_save(self, *, forwarded: bool) -> AsyncIterator[bytes]:
        """Yield a snapshot taken on the leader."""
        if self._replica.is_leader:
            try:
                await self._replica.read_barrier("consistent")
                async for piece in self._replica.save_snapshot():
                    yield piece
            except RaftError as error:
                raise translate(error) from error
            return
        connection = await self._leader_connection(forwarded)
        async for piece in connection.stream(protocol.SNAPSHOT_SAVE, encode(True)):
            yield piece

    async def snapshot_restore(self, pieces: AsyncIterator[bytes], *, forwarded: bool, foreign: bool = False) -> None:
        """Hand a snapshot to the leader, which replaces the cluster's state by it.

        Raises Refused for another cluster's, unless ``foreign`` consents to it, and for one whose authority could
        sign nothing here.
        """
        if self._replica.is_leader:

            def admit(restorer: Restorer) -> None:
                if not foreign:
                    self._refuse_foreign(restorer.store)
                try:
                    self._authority.check_usable(restorer.store)
                except SealError as error:
                    raise Refused(
                        f"this cluster's authority could sign nothing after that: {error}",
                        reason="ca-seal",
                        http_status=409,
                    ) from error

            try:
                await self._replica.restore_snapshot(pieces, admit=admit)
            except RaftError as error:
                raise translate(error) from error
            return
        connection = await self._leader_connection(forwarded)
        await connection.upload(
            protocol.SNAPSHOT_RESTORE, encode(RestoreRequest(foreign)), pieces, SNAPSHOT_TIMEOUT_S
        )

    def _refuse_foreign(self, store: Store) -> None:
        """Another cluster's state brings its root certificates and identities: no sidecar's leaf would be good."""
        machine = self._replica.machine
        assert isinstance(machine, StateMachine)
        ours, theirs = trust_domain_of(machine.store), trust_domain_of(store)
        if ours and theirs and theirs != ours:
            raise Refused(
                f"this is a snapshot of another cluster: its trust domain is {theirs}, this cluster's is {ours}. To "
                "take over its identities, root certificates and intentions all the same: "
                "lictor snapshot restore -foreign FILE, or ?foreign=true",
                reason="foreign-snapshot",
                http_status=409,
            )

    async def _leader_connection(self, forwarded: bool) -> Any:
        if forwarded:
            raise NoLeader(leader=self._replica.leader)
        return await self._route.connection(OPERATOR_TIMEOUT_S)


def _text(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"the verb needs the parameter {key!r}, a text")
    return value
