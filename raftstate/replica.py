"""Replica: one server's copy of the replicated state, as the rest of the program sees it.

The asyncio shell that ties RaftCore, Journal, SnapshotStore, StateMachine and Watches together. It takes no
forwarding decisions: a server that is not the leader raises NotLeader, and `node` asks the leader.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from raftstate import backup
from raftstate.clock import boot_clock
from raftstate.errors import (
    MembershipRefused,
    NoQuorum,
    NotLeader,
    RaftError,
    Stopped,
    TooBusy,
    TransferFailed,
    UnknownOutcome,
)
from raftstate.journal_sync import GroupSync
from raftstate.messages import BadMessage, Message, decode_message, encode_message
from raftstate.raft import Member, Members, RaftConfig, RaftCore
from raftstate.raft_backup import RestoreInLog
from raftstate.raft_driven import ROLES
from raftstate.raft_driver import Driver
from raftstate.raft_install import members_dict
from raftstate.raft_ports import Snapshots
from raftstate.replica_snapshots import SnapshotWork, let_go
from raftstate.replica_types import JournalLike, Machine, Peers, RaftStatus, ReadMode, ReadStamp
from raftstate.snapshot_format import SnapshotHeader
from raftstate.submissions import Submission, Submissions, Told
from raftstate.transport_link import server_address

__all__ = ["Machine", "Peers", "RaftStatus", "ReadMode", "ReadStamp", "Replica", "boot_clock"]

log = logging.getLogger(__name__)

Waiting = asyncio.Future[Any] | Submission
"""A write whose outcome is not known yet."""

EXPIRY_S = 0.05
"""How often writes are looked at that may have waited too long."""
START_WAIT_S = 5.0
"""How long after a start a stale read waits for a leader to tell what has been committed."""


class Replica:
    """One server of the cluster. All methods belong to the event loop that `start` ran on.

    `machine` and `watches` are public to read; `watches.notify(keys)` is called after each applied command. The
    transport hands what arrives to `deliver` and broken connections to `peer_lost`. `on_failure(error)` is called
    once if the replica must stop (a failed sync, a diverged log): the process should end then, loudly.
    """

    def __init__(
        self,
        server: str,
        *,
        journal: JournalLike,
        snapshots: Snapshots,
        machine: Machine,
        peers: Peers,
        bootstrap: Members,
        watches: Any = None,
        config: RaftConfig | None = None,
        snapshot_entries: int = 20_000,
        snapshot_bytes: int = 32 * 1024 * 1024,
        clock: Callable[[], float] = boot_clock,
        rng: random.Random | None = None,
        silent_since: float | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.id = server
        self.machine = machine
        self.watches = watches
        self.failure: BaseException | None = None
        self._journal, self._snapshots, self._peers = journal, snapshots, peers
        self._bootstrap, self._config = bootstrap, config or RaftConfig()
        self._clock, self._rng = clock, rng or random.Random()
        self._silent_since = silent_since
        self._on_failure = on_failure
        self._core: RaftCore | None = None
        self._driver: Driver | None = None
        self._syncs = GroupSync()
        self._tasks: set[asyncio.Task[None]] = set()
        self._proposals: dict[Waiting, tuple[float, float]] = {}
        """Writes that wait, with when they give up and after how many seconds that is."""
        self._submissions = Submissions(lambda submission: self._proposals.pop(submission, None))
        self._expiry: asyncio.TimerHandle | None = None
        self._encoded: tuple[Message | None, bytes] = (None, b"")
        """The message sent last, and its bytes."""
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._caught_up, self._start_until = False, 0.0
        self._snapshot_work = SnapshotWork(
            machine,
            snapshots,
            entries=snapshot_entries,
            bytes_=snapshot_bytes,
            clock=clock,
            on_made=self._poke,
            on_replaced=self._state_replaced,
        )
        self._one_restore = backup.OneRestore(self._abandon_restore)
        self._known_members = Members()
        self._known_leader: tuple[str | None, int] = (None, 0)
        self._leader_callbacks: list[Callable[[str | None], None]] = []

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Restore the newest snapshot and begin to take part. Raises RaftError if the data on disk is damaged."""
        await self._snapshot_work.load(self._journal[0][1] if len(self._journal) else 0)
        self._core = RaftCore(
            self.id,
            self._journal,
            self._snapshots,
            self._apply,
            bootstrap=self._bootstrap,
            clock=self._clock,
            rng=self._rng,
            config=self._config,
            silent_since=self._silent_since,
        )
        self._start_until = self._clock() + START_WAIT_S
        self._core.backup = RestoreInLog(self.machine.restorer, self._replaced_by_backup)
        self._syncs.open()
        self._driver = Driver(
            self._core,
            self._journal,
            asyncio.get_running_loop(),
            clock=self._clock,
            run_sync=self._syncs.run,
            send=self._send,
            after=self._after_pump,
            on_failure=self._fail,
        )
        self._driver.poke()

    async def stop(self) -> None:
        """Leave in good order: hand over leadership if there is someone to take it, sync, close the journal."""
        if self._driver is None:
            if self._core is None:  # it never took part: only what was opened for it is closed
                await asyncio.to_thread(self._journal.close)
            return
        if self.failure is None and self.is_leader and len(self._running_core().members.voters) > 1:
            try:
                await self.transfer_leadership(timeout_s=2 * self._config.election_timeout_max_s)
            except RaftError as error:
                log.warning("raft: leaving without handing over leadership: %s", error)
        driver, self._driver = self._driver, None
        driver.stop()
        if self._expiry is not None:
            self._expiry.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._wake_all(Stopped("this server is stopping: ask another one"))
        await self._syncs.close(self._journal.close)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        log.critical("raft: this server stops: %s", error, exc_info=error)
        self._wake_all(Stopped(f"this server has stopped: {error}"))
        if self._on_failure is not None:
            self._on_failure(error)

    def _running_core(self) -> RaftCore:
        if self._core is None or self._driver is None or self.failure is not None:
            reason = f": {self.failure}" if self.failure else ""
            raise Stopped(f"this server takes no part in raft now{reason}; ask another server")
        return self._core

    # -- writes ----------------------------------------------------------------------------------------------------

    async def apply(self, envelope: bytes, timeout_s: float = 10.0) -> Any:
        """Replicate a command; return the Applied once it is committed and applied here.

        Raises NotLeader, TooBusy, CommandTooLarge (nothing was proposed), UnknownOutcome, Stopped.
        """
        return await self._propose(lambda core, done: core.propose(envelope, done), timeout_s)

    def submit(self, envelope: bytes, told: Told, timeout_s: float = 10.0) -> None:
        """As `apply`, for a caller without a task: ``told`` gets the outcome in a later turn of the loop.

        Raises NotLeader, TooBusy, CommandTooLarge, Stopped: nothing was proposed, and ``told`` is not called.
        """
        core = self._running_core()
        if core.transferring:
            raise TooBusy("leadership is being handed over: try again after a short wait")
        submission = Submission(self._submissions, told)
        core.propose(envelope, submission.settle)
        self._poke()
        self._await(submission, self._clock() + timeout_s, timeout_s)

    async def _propose(
        self, propose: Callable[[RaftCore, Callable[[Any, Any], None]], object], timeout_s: float
    ) -> Any:
        core = self._running_core()
        deadline = self._clock() + timeout_s
        if core.transferring:
            await self._until(lambda: not core.transferring, timeout_s)
            core = self._running_core()
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(value: Any, error: Any) -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)

        propose(core, done)
        self._poke()
        self._await(result, deadline, timeout_s)
        try:
            return await result
        finally:
            self._proposals.pop(result, None)

    def _await(self, result: Waiting, deadline: float, timeout_s: float) -> None:
        self._proposals[result] = deadline, timeout_s
        if self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_later(EXPIRY_S, self._expire)

    def _expire(self) -> None:
        """One clock for all writes: a timer for each would cost more than its proposal."""
        self._expiry = None
        now = self._clock()
        for result, (deadline, timeout_s) in self._proposals.items():
            if deadline <= now and not result.done():
                result.set_exception(
                    UnknownOutcome(
                        f"no quorum confirmed the write within {timeout_s:g} s: retry with the same request id"
                    )
                )
        if self._proposals:
            self._expiry = asyncio.get_running_loop().call_later(EXPIRY_S, self._expire)

    def _apply(self, index: int, data: bytes) -> Any:
        applied = self.machine.apply(index, data)
        self._snapshot_work.logged += len(data)
        if self.watches is not None:
            self.watches.notify(applied.touched)
        return applied

    # -- reads -----------------------------------------------------------------------------------------------------

    async def read_barrier(self, mode: ReadMode = "default", timeout_s: float = 5.0) -> ReadStamp:
        """Return once `machine` may be read in this mode; read it without awaiting in between.

        `stale`: on any server, at once but for the first seconds after its start. `default`: the leader under its
        lease, else as consistent. `consistent`: the leader, after a quorum round that many readers share. Raises
        NotLeader, NoQuorum, Stopped.
        """
        core = self._running_core()
        if mode == "stale":
            if not self._caught_up:
                await self._catch_up(core)
            return self._stamp(core)
        if not core.is_leader:
            raise NotLeader(core.leader)
        await self._confirm(core, lease=mode == "default", timeout_s=timeout_s)
        return self._stamp(core)

    async def _confirm(self, core: RaftCore, *, lease: bool, timeout_s: float) -> None:
        result: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

        def done(index: int | None) -> None:
            if not result.done():
                result.set_result(index)

        core.read(lease=lease, done=done)
        if not result.done():
            self._poke()
            try:
                async with asyncio.timeout(timeout_s):
                    await result
            except TimeoutError:
                raise NoQuorum(
                    f"no quorum confirmed the read within {timeout_s:g} s: retry, or accept a stale read"
                ) from None
        if result.result() is None:
            raise NotLeader(core.leader)

    async def _catch_up(self, core: RaftCore) -> None:
        """Show nothing older than before this start, if a leader can be heard; without one, show what there is."""
        left_s = self._start_until - self._clock()
        try:
            if left_s > 0:
                await self._until(lambda: core.caught_up, left_s)
        except NoQuorum:
            log.warning("raft: no leader %g s after the start: stale reads may go back a little", START_WAIT_S)
        self._caught_up = True

    async def wait_applied(self, index: int, timeout_s: float = 5.0) -> None:
        """Wait until this server has applied `index` (an Applied's), so that a client never sees an older state.

        Raises NoQuorum if that takes longer.
        """
        self._running_core()
        await self._until(lambda: self.applied_index >= index, timeout_s)

    @property
    def applied_index(self) -> int:
        """The state's index here, as rows and `Applied` carry it; that of the log is in `status()`."""
        return 0 if self._core is None else self._core.applied + self.machine.offset

    def _stamp(self, core: RaftCore) -> ReadStamp:
        return ReadStamp(self.applied_index, core.leader is not None, self._contact_ms(core))

    def _contact_ms(self, core: RaftCore) -> int:
        if core.is_leader:
            return 0
        age_s = self._clock() - core.heard_at
        return int(age_s * 1000) if age_s < 1e9 else 2**31 - 1

    # -- leadership and membership ---------------------------------------------------------------------------------

    @property
    def leader(self) -> str | None:
        """Node id of the leader, if known."""
        return self._core.leader if self._core is not None else None

    @property
    def is_leader(self) -> bool:
        """Whether this server believes that it leads. Reads and writes do not rest on this."""
        return self._core is not None and self._core.is_leader

    def on_leader(self, callback: Callable[[str | None], None]) -> None:
        """Have `callback(leader)` called whenever the leader or its term changes."""
        self._leader_callbacks.append(callback)

    async def wait_leader(self, timeout_s: float) -> str:
        """Wait until a leader is known (here: also ready to serve). Raises NoQuorum."""
        core = self._running_core()

        def known() -> bool:
            return core.leader is not None and (not core.is_leader or core.applied >= core.noop_index)

        await self._until(known, timeout_s)
        assert core.leader is not None
        return core.leader

    def members(self) -> tuple[Member, ...]:
        """The membership that counts now, sorted by id."""
        return self._running_core().members.all

    async def add_server(self, server: str, address: str, timeout_s: float = 60.0) -> None:
        """Add a server: a learner first, with a vote once it has caught up.

        Raises MembershipRefused, NotLeader, NoQuorum (it is a learner, and does not catch up).
        """
        core = self._running_core()
        try:
            server_address(address)
        except RaftError as error:
            raise MembershipRefused(f"{server!r} cannot be added: {error}") from None
        present = core.members.get(server)
        if present is None or not present.voter or present.address != address:
            member = Member(server, address, bool(present and present.voter))
            await self._propose(lambda core, done: core.change_members(lambda all: all.put(member), done), timeout_s)

        def votes() -> bool:
            found = core.members.get(server)
            return found is None or (found.voter and core.membership_index <= core.commit) or not core.is_leader

        try:
            await self._until(votes, timeout_s)
        except NoQuorum:
            raise NoQuorum(
                f"{server!r} is in the membership without a vote and has not caught up within {timeout_s:g} s: see "
                f"that it runs and can be reached at {address}, or `lictor operator raft remove-peer -id {server}`"
            ) from None
        if not core.is_leader:
            raise UnknownOutcome(f"leadership was lost while {server!r} was catching up: see the members and retry")

    async def remove_server(self, server: str, timeout_s: float = 10.0) -> None:
        """Have a server out of the committed membership, this one included.

        Raises MembershipRefused, NotLeader, UnknownOutcome, NoQuorum.
        """
        core = self._running_core()
        if core.is_leader and core.members.get(server) is None:
            # Its removal may be in the log only: another leader could still take that back.
            await self._until(lambda: core.membership_index <= core.commit or not core.is_leader, timeout_s)
            if not core.is_leader:
                raise NotLeader(core.leader)
            return
        await self._propose(lambda core, done: core.change_members(lambda all: all.without(server), done), timeout_s)

    async def transfer_leadership(self, to: str | None = None, timeout_s: float = 5.0) -> None:
        """Hand leadership to `to`, or to the most advanced voter; return when another server is known to lead.

        Raises NotLeader, TransferFailed.
        """
        core = self._running_core()
        deadline = self._clock() + timeout_s
        result: asyncio.Future[TransferFailed | None] = asyncio.get_running_loop().create_future()

        def done(error: TransferFailed | None) -> None:
            if not result.done():
                result.set_result(error)

        core.transfer(to, done)
        self._poke()
        try:
            async with asyncio.timeout(timeout_s):
                error = await result
        except TimeoutError:
            raise TransferFailed(f"leadership was not taken over within {timeout_s:g} s: try again") from None
        if error is not None:
            raise error
        # It leads no more, which is not yet that anyone else does: the candidate may lose, even to this server.
        try:
            leader = await self.wait_leader(max(0.0, deadline - self._clock()))
        except NoQuorum:
            raise TransferFailed(f"no server took over within {timeout_s:g} s: see `lictor status`") from None
        if leader == core.id:
            raise TransferFailed("the server that was to take over did not win, and this one leads again: try again")

    def status(self) -> RaftStatus:
        """This server's view of the cluster, for operators; also after a failure."""
        core = self._core
        if core is None:
            raise Stopped("this server has not started yet")
        return RaftStatus(
            id=self.id,
            role=ROLES[core.role],
            term=core.term,
            leader=core.leader,
            commit_index=core.commit,
            applied_index=core.applied,
            first_index=core.first_index,
            last_index=core.last_index,
            durable_index=self._journal.durable_index,
            snapshot_index=self._snapshot_work.index,
            last_contact_ms=self._contact_ms(core),
            members=core.members.all,
            lag=core.lag(),
            failure=str(self.failure) if self.failure else None,
        )

    # -- transport -------------------------------------------------------------------------------------------------

    def deliver(self, peer: str, data: bytes) -> None:
        """Take in a message from the authenticated server `peer`. Raises BadMessage: close that connection."""
        message = decode_message(data)
        if self._driver is None or self.failure is not None or self._core is None:
            return
        try:
            self._core.receive(peer, message)
        except BadMessage:
            raise
        except Exception as error:  # noqa: BLE001 - a core in an unknown state must not go on
            self._driver.fail(error)
            return
        self._driver.heard()

    def delivered(self) -> None:
        """What a connection had to deliver for now is delivered: answer it in this very turn of the loop."""
        if self._driver is not None:
            self._driver.pump_if_poked()

    def peer_lost(self, peer: str) -> None:
        """The connection to `peer` broke."""
        if self._core is not None and self._driver is not None:
            self._core.peer_lost(peer)

    def _send(self, peer: str, message: Message) -> None:
        if message is not self._encoded[0]:  # followers get one and the same append
            self._encoded = message, encode_message(message)
        self._peers.send(peer, self._encoded[1])

    # -- after each pump -------------------------------------------------------------------------------------------

    def _poke(self) -> None:
        if self._driver is not None:
            self._driver.poke()

    def _after_pump(self) -> None:
        core = self._core
        assert core is not None
        self._submissions.tell()
        members = core.members
        if members is not self._known_members:
            known, self._known_members = self._known_members, members
            if members != known:
                self._peers.set_peers({m.id: m.address for m in members.all if m.id != self.id})
        if core.term != self._known_leader[1] or core.leader != self._known_leader[0]:
            self._known_leader = (core.leader, core.term)
            log.info("raft: leader of term %d is %s", core.term, core.leader or "not known")
            for callback in self._leader_callbacks:
                callback(core.leader)
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for predicate, future in waiters:
                if future.done():
                    continue
                if predicate():
                    future.set_result(None)
                else:
                    self._waiters.append((predicate, future))
        work = self._snapshot_work.due(core)
        if work is not None:
            self._spawn(work)

    async def _until(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        if predicate():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((predicate, future))
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise NoQuorum(f"the cluster did not get there within {timeout_s:g} s: see `lictor status`") from None

    def _wake_all(self, error: RaftError) -> None:
        waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            if not future.done():
                future.set_exception(error)
        for result in self._proposals:
            if not result.done():
                result.set_exception(
                    UnknownOutcome(
                        "this server stopped while the write was on its way: retry with the same request id"
                    )
                )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._report)

    def _report(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._driver is not None:
            self._driver.fail(error)

    # -- backups ---------------------------------------------------------------------------------------------------

    async def save_snapshot(self) -> AsyncIterator[bytes]:
        """Yield a backup of the state as applied here, in the snapshot file's form, while work goes on.

        Await a read barrier first for the newest state.
        """
        core = self._running_core()
        header = SnapshotHeader(
            core.applied, core.term_at(core.applied) or 0, members_dict(core.members), time.time()
        )
        async for piece in backup.save(self.machine, header):
            yield piece

    async def restore_snapshot(
        self,
        pieces: AsyncIterator[bytes],
        timeout_s: float = 60.0,
        *,
        admit: Callable[[Any], None] = lambda _restorer: None,
    ) -> None:
        """Replace the state on every server by a backup; the membership stays as it is. Only on the leader.

        The backup is checked whole before anything changes; `admit` is shown what was read of it, and may raise. One
        at a time. Raises SnapshotDamaged, NotLeader, TooBusy, UnknownOutcome.
        """
        self._running_core()._refuse_unless_leading()

        async def propose(step: bytes) -> Any:
            return await self._propose(lambda core, done: core.propose_restore(step, done), timeout_s)

        await backup.restore(pieces, propose, self.machine.restorer, admit, self._one_restore.turn)

    def _abandon_restore(self, step: bytes) -> None:
        try:
            self._running_core().propose_restore(step, lambda _value, _error: None)
        except RaftError:
            return  # it ended with this leadership
        self._poke()

    def _replaced_by_backup(self, replaced: Any) -> None:
        self._snapshot_work.due_soon()
        self._state_replaced(replaced)

    def _state_replaced(self, replaced: Any) -> None:
        if self.watches is not None:
            self.watches.notify_all()
        self._spawn(let_go(replaced))
        self._poke()
