"""One simulated server: the real core, driver, journal, snapshot store and maker; simulated disk and time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from raftstate.errors import JournalFailed, MembershipRefused, NotLeader, RaftError, StateDiverged, TooBusy
from raftstate.journal import Journal
from raftstate.journal_sync import Group, SyncDone
from raftstate.messages import AppendReply, Message, decode_message, encode_message
from raftstate.raft import Members, RaftConfig, RaftCore
from raftstate.raft_backup import RestoreInLog
from raftstate.raft_driver import Driver
from raftstate.raft_snapshotter import SnapshotMaker
from raftstate.snapshots import SnapshotStore
from tests.simulation.network import Network
from tests.simulation.referee import Referee
from tests.simulation.world import Timer, Violation, World
from tests.support.raft_machine import RegisterMachine
from tests.support.simdisk import SimCrash, SimDisk


@dataclass
class Bugs:
    """What a planted bug replaces; the defaults are the real thing."""

    core: type[RaftCore] = RaftCore
    machine: Callable[[], Any] | None = None
    """None: a small machine or the real one, as the seed has it."""
    disk: type[SimDisk] = SimDisk
    restore: type[RestoreInLog] = RestoreInLog


@dataclass
class Tuning:
    """What a seed draws for all its servers."""

    config: RaftConfig = field(default_factory=RaftConfig)
    machine: Callable[[], Any] = RegisterMachine
    snapshot_entries: int = 40
    segment_bytes: int = 4096
    sync_s: float = 0.001
    stall: float = 0.01
    """Chance that a sync takes up to half a second."""
    kills: float = 0.0
    """Share of the crashes in which the process dies and the power stays: what was not synced is read back."""
    waits: bool = False
    """Whether a server may wait for its disk in the turn in which it asked."""


class Socket:
    """Where one life of a server is plugged into its disk.

    After a crash the dead life's iterators are finalized whenever Python's collector gets to them; they must not
    reach the disk then, least of all at a time that no seed decides.
    """

    def __init__(self, disk: SimDisk) -> None:
        self._disk: SimDisk | None = disk

    def pull(self) -> None:
        self._disk = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name) if self._disk is not None else lambda *_: ()


class WatchedJournal(Journal):
    """The real journal; the referee sees each entry as it is added."""

    referee: Referee
    server: str

    def add(self, command: bytes, idx: int, term: int) -> None:
        before = self[-1] if len(self) else None
        self.referee.entry_added(self.server, before, command, idx, term)
        super().add(command, idx, term)


class SimServer:
    """A server that can be paused, crashed and started again on what its disk kept."""

    def __init__(
        self,
        name: str,
        world: World,
        referee: Referee,
        network: Network,
        tuning: Tuning,
        bootstrap: Members,
        bugs: Bugs,
    ) -> None:
        self.name = name
        self._world, self._referee, self._network = world, referee, network
        self._tuning, self._bootstrap, self._bugs = tuning, bootstrap, bugs
        self.disk = bugs.disk(random.Random(world.rng.random()))
        self.rate = 1.0
        """How fast its clock runs."""
        self._clock_base = (0.0, world.rng.uniform(0, 1000))
        self.alive = False
        self.life = 0
        self._died_at: float | None = None
        """By its own clock, as a process knows it that has just got the lock on its data."""
        self.paused_until = 0.0
        self.core: RaftCore
        self.machine: Any
        self._driver: Driver
        self._journal: WatchedJournal
        self._socket: Socket
        self._syncs: list[Callable[[], None]] = []
        """Begun and not ended: at a crash any part of the first may have reached the disk."""
        self._maker: SnapshotMaker | None = None

    # -- clock and loop: what the driver sees ----------------------------------------------------------------------

    def clock(self) -> float:
        began, value = self._clock_base
        return value + (self._world.now - began) * self.rate

    def set_rate(self, rate: float) -> None:
        """Let its clock run faster or slower than true time from now on."""
        self._clock_base = (self._world.now, self.clock())
        self.rate = rate

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        return self._later(0.0, callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        return self._later(delay / self.rate, callback)

    def _later(self, delay: float, callback: Callable[[], None]) -> Timer:
        life = self.life

        def happen() -> None:
            if self.life != life:
                return
            if self._world.now < self.paused_until:
                self._world.after(self.paused_until - self._world.now, happen_if_wanted)
            else:
                self._guard(callback)

        def happen_if_wanted() -> None:
            timer.fire()

        timer = self._world.after(delay, happen)
        return timer

    def _guard(self, action: Callable[[], None]) -> None:
        """Run code of the server; the disk may go down, or the whole server, in the middle of it."""
        try:
            action()
        except SimCrash:
            self.crash("in a disk write")
            self._world.after(self._world.rng.random() * 0.5, lambda: None if self.alive else self.start())
            return
        except OSError as error:
            self._driver.fail(error)  # as Replica does
            return
        if self.alive:
            self._referee.check_server(self.name, self.core)

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start on what the disk holds."""
        self.life += 1
        self.alive = True
        self._syncs = []
        self._maker = None
        self._guard(self._boot)

    def _boot(self) -> None:
        rng = self._world.rng
        self._socket = socket = Socket(self.disk)
        try:
            self._journal = WatchedJournal(
                socket, "raft", segment_bytes=self._tuning.segment_bytes, entropy=rng.randbytes
            )
            self._journal.referee, self._journal.server = self._referee, self.name
            self._store = SnapshotStore(socket, "snapshots", clock=lambda: 0.0)
            self.machine = (self._bugs.machine or self._tuning.machine)()
            meta = self._store.latest()
            if meta is not None:
                self.machine.restore(self._store.open(meta))
            self.core = self._bugs.core(
                self.name,
                self._journal,
                self._store,
                self._apply,
                bootstrap=self._bootstrap,
                clock=self.clock,
                rng=random.Random(rng.random()),
                config=self._tuning.config,
                silent_since=self._died_at,
            )
            self.core.backup = self._bugs.restore(self.machine.restorer, self._replaced)
        except JournalFailed as error:
            # The disk is still unwell: whoever runs the server starts it again later.
            self._world.note(self.name, f"does not start: {error}")
            self.alive = False
            self._unplug()
            self._world.after(0.3, lambda: None if self.alive else self.start())
            return
        except RaftError as error:
            raise Violation(f"{self.name} cannot start again: {error}") from error
        self._snapshot_at = meta.index if meta else 0
        self._driver = Driver(
            self.core,
            self._journal,
            self,
            clock=self.clock,
            run_sync=self._run_sync,
            send=self._send,
            after=self._after_pump,
            on_failure=self._failed,
        )
        self._world.note(self.name, f"starts at index {self._snapshot_at}, log to {self.core.last_index}")
        self._driver.poke()

    def crash(self, how: str = "") -> None:
        """The power goes, or the process is killed, in whatever it is doing."""
        if not self.alive:
            return
        self._world.note(self.name, f"CRASH {how}")
        self.alive = False
        self.life += 1
        self._driver.stop()
        if self._syncs and self._world.rng.random() < 0.7:
            self.disk.crash_after(self._world.rng.randint(0, 3))
            try:
                self._syncs[0]()
            except (SimCrash, OSError, RaftError, RuntimeError):
                pass  # that the sync does not end well is the point
        self._unplug()

    def _unplug(self) -> None:
        self._died_at = self.clock()
        self._socket.pull()
        if self._tuning.kills and self._world.rng.random() < self._tuning.kills:
            self._world.note(self.name, "the power stays")
            self.disk.kill()
        else:
            self.disk.crash()

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, (Violation, AssertionError, StateDiverged)):
            raise error
        if isinstance(error, SimCrash):
            raise error
        if not isinstance(error, (RaftError, OSError)):
            raise error
        self._world.note(self.name, f"stops: {type(error).__name__}")
        self.alive = False
        self.life += 1
        self._unplug()

    def calm(self) -> None:
        """No more faults of its own: disk, clock and pauses are well from now on."""
        self.paused_until = min(self.paused_until, self._world.now)
        self.set_rate(1.0)
        self.disk.syncs_to_fail = 0
        self.disk._steps_left = None

    def pause(self, seconds: float) -> None:
        """SIGSTOP: nothing happens there, and then everything at once."""
        self._world.note(self.name, f"paused for {seconds:.2f}")
        self.paused_until = self._world.now + seconds

    # -- what the driver asks for ----------------------------------------------------------------------------------

    def _run_sync(self, group: Group, done: SyncDone, *, here: bool) -> bool:
        """As `raftstate.journal_sync`: some groups are written at once, the rest with their sync."""
        rng = self._world.rng
        waits = here and self._tuning.waits and rng.random() < 0.7
        try:
            number = group.write()
        except (OSError, RaftError) as problem:
            error = problem
            self._later(0.0001, lambda: done(error))
            return False

        def finish() -> None:
            if number < 0:
                group.sync()
                return
            failed: OSError | None = None
            try:
                self.disk.fdatasync(number)
            except OSError as error:
                failed = error
            group.synced(failed)

        if waits and number >= 0:
            finish()
            return True
        self._syncs.append(finish)
        delay = self._tuning.sync_s * (0.3 + rng.random())
        if rng.random() < self._tuning.stall:
            delay += rng.random() * 0.5

        def ends() -> None:
            if not self.alive:
                return
            error: BaseException | None = None
            self._syncs.remove(finish)
            try:
                finish()
            except (OSError, RaftError) as problem:
                error = problem
            self._later(0.0001, lambda: done(error))

        self._later(delay, ends)
        return False

    def _send(self, peer: str, message: Message) -> None:
        self._referee.message_sent(self.name, peer, message, self._journal)
        if isinstance(message, AppendReply):
            self._referee.ack_sent(self.name, message, self._journal.durable_index)
        data = encode_message(message)
        self._world.note(self.name, f"-> {peer} {len(data)}:{crc32(data):x}", lambda: f"-> {peer} {message}")
        self._network.send(self.name, peer, data)

    def deliver(self, peer: str, data: bytes) -> None:
        """A message arrives."""
        if not self.alive:
            return

        def take() -> None:
            self.core.receive(peer, decode_message(data))
            self._driver.heard()

        if self._world.now < self.paused_until:
            self._later(self.paused_until - self._world.now, take)
        else:
            self._guard(take)

    def _apply(self, index: int, data: bytes) -> Any:
        term = self.core.term_at(index)
        assert term is not None
        self._referee.entry_applied(self.name, index, term, data)
        return self.machine.apply(index, data)

    def _after_pump(self) -> None:
        core = self.core
        if core.install is not None:
            self._later(self._world.rng.random() * 0.02, self._restore)
        elif (
            self._maker is None
            and self._may_snapshot()
            and (
                core.applied - self._snapshot_at >= self._tuning.snapshot_entries
                or (core.snapshot_wanted and core.applied > self._snapshot_at)
            )
        ):
            self._maker = SnapshotMaker(core, self.machine, self._store)
            self._later(0.001, self._snapshot_step)

    def _replaced(self, _old: Any) -> None:
        self._referee.restores += 1
        self._world.note(self.name, "a backup is in place")

    def _may_snapshot(self) -> bool:
        term = self.core.term_at(self.core.applied)
        return term is not None and not self.core.backup.under_way(term)

    # -- snapshots -------------------------------------------------------------------------------------------------

    def _snapshot_step(self) -> None:
        maker = self._maker
        assert maker is not None
        if maker.step():
            self._later(0.001, self._snapshot_step)
            return
        maker.commit()
        maker.finish()
        self._world.note(self.name, f"snapshot at {maker.index}")
        self._snapshot_at = maker.index
        self._maker = None
        self._driver.poke()

    def _restore(self) -> None:
        install = self.core.install
        if install is None:
            return
        install.writer.commit()
        meta = self._store.latest()
        assert meta is not None
        self.machine.restore(self._store.open(meta))
        self.core.installed()
        self._snapshot_at = install.index
        self._world.note(self.name, f"installed snapshot {install.index}")
        self._driver.poke()

    # -- clients ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes, done: Callable[[Any, Any], None]) -> None:
        """Propose; `done(applied, error)`, perhaps never."""
        self._ask(lambda: self.core.propose(data, done), lambda error: done(None, error))

    def read(self, *, lease: bool, done: Callable[[int | None, Any], None]) -> None:
        """A default or consistent read; `done(index, error)`."""
        self._ask(
            lambda: self.core.read(lease=lease, done=lambda index: done(index, None)), lambda error: done(None, error)
        )

    def operate(self, action: Callable[[RaftCore], None]) -> None:
        """An operator's request; refusals are fine."""
        self._ask(lambda: action(self.core), lambda _error: None)

    def _ask(self, action: Callable[[], Any], refused: Callable[[RaftError], None]) -> None:
        if not self.alive:
            return

        def take() -> None:
            try:
                action()
            except (NotLeader, TooBusy, MembershipRefused, RaftError) as error:
                refused(error)
            self._driver.poke()

        if self._world.now < self.paused_until:
            self._later(self.paused_until - self._world.now, take)
        else:
            self._guard(take)
