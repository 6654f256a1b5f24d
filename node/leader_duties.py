"""What only the leader does: judge which agents live, end sessions, look after the authority's roots.

Everything it decides becomes a command in the log; a leader that has been deposed meanwhile can propose nothing.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Iterable
from typing import Any, cast

import msgspec

from node.autopilot import DEFAULTS, removable
from node.ca.authority import Authority
from node.ca.signing import rfc3339
from node.config import Liveness
from node.durations import parse_duration_s
from node.errors import NodeError
from node.liveness import ALIVE_OUTPUT, DEAD_OUTPUT, Deadlines, Excuse
from node.protocol import ApplyRequest
from node.roster import Roster
from node.server import ServerBackend
from node.tasks import Tasks
from raftstate.errors import RaftError
from raftstate.model.acl import Token, expired
from raftstate.model.catalog import CRITICAL, PASSING, SERF_HEALTH, Check
from raftstate.model.kv import Session
from raftstate.model.wire import to_msgpack
from raftstate.replica import Replica
from raftstate.state.commands import BootstrapACL, Command, DeleteToken, DeregisterNode, RegisterCheck, SessionDestroy

log = logging.getLogger("lictor.leader")

TICK_S = 0.25
STALL_S = 1.0
SLOW_TICK_S = 60.0
CLEANUP_TICK_S = 1.0
PROPOSE_TIMEOUT_S = 10.0
PROPOSALS_MAX = 64
"""Verdicts on their way at once: a rack that vanishes is many nodes."""
SESSION_GRACE = 2.0
"""Consul ends a session between its TTL and twice its TTL; the benefit of the doubt is the holder's."""


class LeaderDuties:
    """Runs while this server leads. `beats` takes heartbeats in whether it does or not."""

    def __init__(
        self,
        backend: ServerBackend,
        replica: Replica,
        authority: Authority,
        liveness: Liveness,
        *,
        first_token: Token | None = None,
    ) -> None:
        """``first_token``: written when access control has none yet."""
        self._backend, self._replica, self._authority, self._liveness = backend, replica, authority, liveness
        self._first_token = first_token
        self.node_ttl_s = liveness.node_ttl_s
        self._nodes = Deadlines(liveness.node_ttl_s)
        self._excuse = Excuse(liveness.node_ttl_s)
        self.session_deadlines = Deadlines(0.0)
        self._roster = Roster()
        self._dead_since: dict[str, float] = {}
        self._servers: dict[str, tuple[bool, float, str]] = {}
        """(well, loop time, RFC 3339) of each server's last change."""
        self._tasks = Tasks("leader")
        self._room = asyncio.Semaphore(PROPOSALS_MAX)
        self._wake = asyncio.Event()
        self._judging: set[str] = set()
        self.in_office = False
        self._ticked_at = 0.0
        replica.on_leader(lambda leader: self._wake.set())
        backend.on_session_renewed = self._session_renewed

    def start(self) -> None:
        """Wait for office."""
        self._tasks.spawn(self._run())

    async def stop(self) -> None:
        """Leave everything to the next leader."""
        await self._tasks.close()

    # -- heartbeats ------------------------------------------------------------------------------------------------

    def beats(self, nodes: Iterable[str]) -> None:
        """Note signs of life; a node that was judged dead is judged alive again."""
        if not self.in_office:
            return
        now = asyncio.get_running_loop().time()
        checks = self._store.checks.rows
        for node in nodes:
            self._nodes.beat(node, now)
            check = checks.get((node, SERF_HEALTH))
            if check is not None and check.status != PASSING:
                self._judge(node, PASSING, ALIVE_OUTPUT)

    def excuse(self) -> None:
        """A server has more to do than it can: agents that are not heard of may be trying to get in."""
        self._excuse.note(asyncio.get_running_loop().time())

    def _judge(self, node: str, status: str, output: str) -> None:
        if node not in self._judging:
            self._judging.add(node)
            self._tasks.spawn(self._verdict(node, status, output))

    async def _verdict(self, node: str, status: str, output: str) -> None:
        try:
            check = self._store.checks.rows.get((node, SERF_HEALTH))
            if check is None or check.status == status:
                return
            log.warning("liveness: %s is %s: %s", node, status, output)
            row = Check(node=node, check_id=SERF_HEALTH, name=check.name, status=status, output=output)
            await self._propose(RegisterCheck(row))
        finally:
            self._judging.discard(node)

    # -- office ----------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return cast(Any, self._replica.machine).store

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_slow = next_cleanup = 0.0
        while True:
            self._wake.clear()
            if not self._replica.is_leader:
                self.in_office = False
                await self._wake.wait()
                continue
            try:
                if not self.in_office:
                    await self._take_office()
                    next_slow = loop.time() + SLOW_TICK_S
                self._tick(loop.time())
                if loop.time() >= next_slow:
                    next_slow = loop.time() + SLOW_TICK_S
                    await self._authority.retire_old_roots()
                    await self._delete_expired_tokens()
                if loop.time() >= next_cleanup:
                    next_cleanup = loop.time() + CLEANUP_TICK_S
                    await self._remove_dead_server(loop.time())
            except (NodeError, RaftError) as error:
                log.warning("leader: %s", error)
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _take_office(self) -> None:
        await self._replica.read_barrier("consistent", PROPOSE_TIMEOUT_S)
        await self._authority.ensure_root()
        if self._first_token is not None and not self._store.acl_bootstrap.rows:
            await self._propose(BootstrapACL(self._first_token))
        now = asyncio.get_running_loop().time()
        self._roster.forget()
        self._roster.look(self._store, now)
        self._nodes.begin(self._roster.living, now)
        self._ticked_at = now
        self.session_deadlines.begin((), now)
        self._dead_since.clear()
        self._servers.clear()
        self.in_office = True
        log.info("leader: took office; %d agents are watched", len(self._nodes))

    def _tick(self, now: float) -> None:
        roster = self._roster
        if roster.look(self._store, now):
            self._nodes.keep_only(roster.living, now)
        if now - self._ticked_at > STALL_S:
            # This process did not run for a while: the beats of that time wait in sockets, and say nothing yet.
            self._nodes.begin(roster.living, now)
        self._ticked_at = now
        for node in self._nodes.expired(now):
            if self._excuse.holds(now):
                self._nodes.beat(node, now)
                continue
            self._judge(node, CRITICAL, DEAD_OUTPUT)
            roster.forget()  # if the verdict is not written, the node gets a full deadline again
        self._reap_nodes(roster.critical, now)
        self._end_sessions(now)
        self._note_servers(now)

    def _reap_nodes(self, critical: set[str], now: float) -> None:
        """A node that is critical for days leaves the catalog. Counted from this leader's own office."""
        for node in [known for known in self._dead_since if known not in critical]:
            del self._dead_since[node]
        for node in critical:
            since = self._dead_since.setdefault(node, now)
            if now - since >= self._liveness.deregister_after_s:
                self._dead_since[node] = now
                log.warning("liveness: %s has been gone for %g s: deregistered", node, now - since)
                self._tasks.spawn(self._propose(DeregisterNode(node)))

    # -- servers ---------------------------------------------------------------------------------------------------

    def _note_servers(self, now: float) -> None:
        """Note since when each server has been well or dead, for operators and for the clean-up."""
        for member in self._replica.members():
            check = self._store.checks.rows.get((member.id, SERF_HEALTH))
            well = check is None or check.status != CRITICAL
            held = self._servers.get(member.id)
            if held is None or held[0] != well:
                self._servers[member.id] = (well, now, rfc3339(datetime.datetime.now(datetime.UTC)))

    def stable_since(self) -> dict[str, str]:
        """Return since when (RFC 3339) each server has been as it is, as far as this leader has seen."""
        return {server: since for server, (_, _, since) in self._servers.items()}

    async def _remove_dead_server(self, now: float) -> None:
        dead_for_s = {server: now - at for server, (well, at, _) in self._servers.items() if not well}
        config = self._store.autopilot.rows.get("", DEFAULTS)
        after_s = self._liveness.remove_server_after_s
        gone = removable(self._replica.status(), dead_for_s, after_s=after_s, config=config)
        if gone is not None:
            log.warning("leader: server %s has been dead for %g s and leaves the membership", gone, dead_for_s[gone])
            await self._replica.remove_server(gone)

    # -- sessions --------------------------------------------------------------------------------------------------

    def _session_renewed(self, session: Any) -> None:
        if not self.in_office or session is None:
            return
        row = self._store.sessions.rows.get(session["ID"] if isinstance(session, dict) else session)
        if row is not None and (ttl_s := _ttl_s(row)) > 0:
            self.session_deadlines.beat(row.id, asyncio.get_running_loop().time(), SESSION_GRACE * ttl_s)

    def _end_sessions(self, now: float) -> None:
        rows = self._store.sessions.rows
        for row in rows.values():
            # A new leader does not know when a session was last renewed: it begins anew with a full time.
            if row.id not in self.session_deadlines and row.id not in self._judging and (ttl_s := _ttl_s(row)) > 0:
                self.session_deadlines.beat(row.id, now, SESSION_GRACE * ttl_s)
        for session in self.session_deadlines.expired(now):
            if session in rows:
                self._judging.add(session)
                self._tasks.spawn(self._end_session(session))

    async def _end_session(self, session: str) -> None:
        try:
            log.info("sessions: %s was not renewed in time and ends", session)
            await self._propose(SessionDestroy(session))
        finally:
            self._judging.discard(session)

    async def _delete_expired_tokens(self) -> None:
        """A token that has expired is good for nothing at once, on each node by its clock; here its row goes."""
        now = datetime.datetime.now(datetime.UTC)
        rows = self._store.tokens.rows.values()
        for row in [one for one in rows if one.expiration_time and expired(one.expiration_time, now)]:
            log.info("acl: token %s expired at %s and is deleted", row.accessor_id, row.expiration_time)
            await self._propose(DeleteToken(row.accessor_id))

    async def _propose(self, command: Command) -> None:
        """Propose here and nowhere else: a verdict is the leader's own, and worth nothing once it is deposed."""
        request = ApplyRequest("", msgspec.Raw(to_msgpack(command)), forwarded=True)
        async with self._room:
            try:
                await self._backend.apply_raw(request, PROPOSE_TIMEOUT_S)
            except (NodeError, RaftError) as error:
                log.warning("leader: %s was not written (%s); it is decided anew", type(command).__name__, error)


def _ttl_s(session: Session) -> float:
    try:
        return parse_duration_s(session.ttl)
    except ValueError:
        return 0.0
