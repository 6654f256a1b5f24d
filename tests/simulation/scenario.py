"""One run: a seed draws the cluster, the clients and the faults; the referee judges; the end must be calm."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from raftstate.errors import RaftError
from raftstate.raft import Member, Members, RaftConfig, RaftCore
from raftstate.raft_backup import BEGIN, END, PART, VOID
from tests.simulation.clients import SimClient
from tests.simulation.network import Network, NetworkMood
from tests.simulation.real_machine import RealMachine
from tests.simulation.referee import Referee
from tests.simulation.server import Bugs, SimServer, Tuning
from tests.simulation.world import Violation, World
from tests.support.raft_machine import RegisterMachine

FAULTS_S = 6.0
"""Virtual seconds with faults; then everything heals and must settle."""
SETTLE_S = 4.0
RESTORING = 5
"""Of eight seeds, the one in which backups are restored: what clients see is judged less there."""


@dataclass
class Outcome:
    seed: int
    transcript: str
    """Hash of everything that happened."""
    events: int
    finished: int
    """Operations that ended."""
    elections: int
    violation: str | None
    tail: list[str]


class Scenario:
    """The cast of one seed."""

    def __init__(self, seed: int, bugs: Bugs | None = None, *, verbose: bool = False) -> None:
        self.seed = seed
        world = self.world = World(seed, verbose=verbose)
        rng = world.rng
        self.referee = Referee(world)
        self.network = Network(world, self._deliver)
        # Some runs have much of what few have: contested elections, or a leader that only some have lost.
        profile = rng.choice(("mixed", "mixed", "mixed", "elections", "links"))
        self.network.mood = self._calm = NetworkMood(ordered=rng.random() < 0.3)
        if profile == "elections":
            self._calm = NetworkMood(duplicate=0.5, late=0.05, delay_s=rng.choice((0.005, 0.02)))
        self.network.mood = self._calm
        size = {"mixed": rng.choice((1, 3, 3, 3, 5)), "elections": rng.choice((3, 5, 5)), "links": 3}[profile]
        names = [f"s{number}" for number in range(1, size + 1)]
        self.spare = [f"s{size + 1}"] if size > 1 else []
        """A server that may be added while things go wrong."""
        bootstrap = Members.of(Member(name, name) for name in names)
        tuning = Tuning(
            config=RaftConfig(
                heartbeat_s=0.08,
                election_timeout_min_s=0.3,
                election_timeout_max_s=0.32 if profile == "elections" else 0.6,
                append_entries_max=rng.choice((1, 3, 64)),
                inflight_messages_max=rng.choice((1, 4, 64)),
                snapshot_chunks_inflight=rng.choice((1, 3)),
                apply_batch=rng.choice((2, 128)),
                trailing_entries=rng.choice((0, 5, 30)),
                learner_lag_max=3,
                proposals_max=20,
            ),
            machine=RealMachine if rng.random() < 0.3 else RegisterMachine,
            snapshot_entries=rng.choice((10, 40, 1000)),
            segment_bytes=rng.choice((1000, 4096)),
            sync_s=rng.choice((0.0005, 0.003)),
            stall=rng.choice((0.0, 0.0, 0.03)),
            kills=(0.0, 0.0, 0.5, 0.9)[seed % 4],
            waits=seed // 4 % 2 == 1,
        )
        bugs = bugs or Bugs()
        self._make_machine = bugs.machine or tuning.machine
        self.servers = {
            name: SimServer(name, world, self.referee, self.network, tuning, bootstrap, bugs) for name in names
        }
        for name in self.spare:
            self.servers[name] = SimServer(name, world, self.referee, self.network, tuning, Members(), bugs)
        for name in names:
            self.servers[name].start()
        many = profile == "links"
        self.clients = [
            SimClient(
                f"c{number}",
                world,
                self.referee,
                self.servers,
                pace_s=0.02 if many else 0.06,
                wander=0.5 if many else 0.1,
            )
            for number in range(1, 7 if many else 4)
        ]
        # Which kinds of faults a run has is drawn, so that some runs have much of one kind.
        kinds = [
            self._crash,
            self._crash,
            self._crash_all,
            self._partition,
            self._partition,
            self._isolate_leader,
            self._cut_link,
            self._bad_network,
            self._pause,
            self._clocks,
            self._transfer,
            self._change_members,
            self._disk_trouble,
        ]
        if profile == "elections":
            kinds = [self._crash, self._isolate_leader, self._isolate_leader, self._partition, self._pause]
        elif profile == "links":
            kinds = [self._cut_leader_link, self._transfer, self._transfer, self._pause, self._clocks]
        self.kinds = [kind for kind in kinds if rng.random() < 0.6] or kinds
        if seed % 8 == RESTORING:
            self.kinds += [self._restore_backup, self._restore_backup]
        self._restoring: set[tuple[str, int]] = set()
        """Servers, with which of their lives, that lead a restore."""
        self.pace_s = rng.choice((0.2, 0.5, 1.0))
        world.after(0.5, self._trouble)

    def _deliver(self, source: str, target: str, data: bytes) -> None:
        server = self.servers.get(target)
        if server is not None:
            server.deliver(source, data)

    # -- faults ----------------------------------------------------------------------------------------------------

    def _trouble(self) -> None:
        if self.world.now > FAULTS_S:
            return
        self.world.rng.choice(self.kinds)()
        self.world.after(self.pace_s * (0.2 + 1.6 * self.world.rng.random()), self._trouble)

    def _some(self) -> SimServer:
        return self.servers[self.world.rng.choice(list(self.servers))]

    def _leader(self) -> SimServer | None:
        leaders = [server for server in self.servers.values() if server.alive and server.core.is_leader]
        return self.world.rng.choice(leaders) if leaders else None

    def _crash(self) -> None:
        rng = self.world.rng
        server = (self._leader() if rng.random() < 0.5 else None) or self._some()
        if not server.alive:
            return
        if rng.random() < 0.3:
            server.disk.crash_after(rng.randint(0, 6))  # within one of the next disk operations
        else:
            server.crash()
        self.world.after(rng.choice((0.01, 0.3, 1.5)) * rng.random(), lambda: self._revive(server))

    def _revive(self, server: SimServer) -> None:
        if not server.alive and server.life:
            server.start()

    def _crash_all(self) -> None:
        for server in self.servers.values():
            server.crash("with all others")
            self.world.after(self.world.rng.random() * 0.3, lambda server=server: self._revive(server))  # type: ignore[misc]

    def _partition(self) -> None:
        rng = self.world.rng
        names = list(self.servers)
        rng.shuffle(names)
        cut = rng.randint(1, max(1, len(names) - 1))
        one_way = rng.random() < 0.4
        self.world.note("net", f"partition {names[:cut]} | {names[cut:]} one_way={one_way}")
        self.network.partition(names[:cut], names[cut:], one_way=one_way)
        self.world.after(rng.random() * 2, self._heal)

    def _isolate_leader(self) -> None:
        leader = self._leader()
        if leader is None:
            return
        others = [name for name in self.servers if name != leader.name]
        self.world.note("net", f"isolate leader {leader.name}")
        self.network.partition([leader.name], others, one_way=self.world.rng.random() < 0.3)
        self.world.after(self.world.rng.random() * 2, self._heal)

    def _cut_link(self) -> None:
        """Two servers lose each other; a third hears both."""
        if len(self.servers) < 3:
            return
        one, other = self.world.rng.sample(list(self.servers), 2)
        self.world.note("net", f"cut {one} - {other}")
        self.network.partition([one], [other], one_way=False)
        self.world.after(self.world.rng.random() * 2, self._heal)

    def _cut_leader_link(self) -> None:
        leader = self._leader()
        if leader is not None:
            other = self.world.rng.choice([name for name in self.servers if name != leader.name])
            self.world.note("net", f"cut {leader.name} - {other}")
            self.network.partition([leader.name], [other], one_way=False)
            self.world.after(0.6 + self.world.rng.random(), self._heal)
            if self.world.rng.random() < 0.6:
                # About when the one that hears nothing campaigns: does the leader still trust its lease?
                self.world.after(0.28 + self.world.rng.random() * 0.3, self._isolate_leader)

    def _isolate_soon(self) -> None:
        """Cut the leader off in the middle of what it has just begun."""
        if self.world.rng.random() < 0.8:
            self.world.after(self.world.rng.random() * 0.008, self._isolate_leader)

    def _heal(self) -> None:
        self.network.heal()

    def _bad_network(self) -> None:
        rng = self.world.rng
        self.network.mood = NetworkMood(
            drop=rng.choice((0.0, 0.05, 0.3)),
            duplicate=rng.choice((0.0, 0.1, 0.5)),
            late=rng.choice((0.0, 0.1, 0.3)),
            delay_s=rng.choice((0.001, 0.01, 0.05)),
        )
        self.world.after(rng.random() * 2, self._good_network)

    def _good_network(self) -> None:
        self.network.mood = self._calm

    def _pause(self) -> None:
        server = (self._leader() if self.world.rng.random() < 0.5 else None) or self._some()
        server.pause(self.world.rng.choice((0.1, 0.5, 1.5)) * self.world.rng.random())

    def _clocks(self) -> None:
        # What `clock_drift` allows for: any two rates within 20 % of each other.
        for server in self.servers.values():
            server.set_rate(self.world.rng.uniform(0.92, 1.08))

    def _transfer(self) -> None:
        leader = self._leader()
        if leader is not None:
            leader.operate(lambda core: core.transfer(None, lambda _error: None))
            self._isolate_soon()

    def _change_members(self) -> None:
        leader = self._leader()
        if leader is None or not self.spare:
            return
        rng = self.world.rng
        name = rng.choice([*self.spare, rng.choice(list(self.servers))])

        def add(core: RaftCore) -> None:
            self.world.note("op", f"add {name}")
            core.change_members(lambda members: members.put(Member(name, name, False)), lambda _value, _error: None)

        def remove(core: RaftCore) -> None:
            if len(core.members.voters) <= 2:
                return
            self.world.note("op", f"remove {name}")
            core.change_members(lambda members: members.without(name), lambda _value, _error: None)

        server = self.servers[name]
        if leader.core.members.get(name) is None:
            if not server.alive and not server.life:
                server.start()
            leader.operate(add)
        else:
            leader.operate(remove)
        self._isolate_soon()

    def _restore_backup(self) -> None:
        """Take a backup somewhere, now, and have a leader restore it a little later, step by step."""
        rng = self.world.rng
        source = self._some()
        if not source.alive:
            return
        chunks = list(source.machine.snapshot())
        steps = [BEGIN, *(PART + b"\0" + chunk[:20] for chunk in chunks[:1])]
        steps += [PART + b"\1" + chunk[20 if number == 0 else 0 :] for number, chunk in enumerate(chunks)]
        steps.append(END)
        if rng.random() < 0.3:
            steps = [*steps[: rng.randint(1, len(steps) - 1)], VOID]  # whoever asked for it has hung up
        self.world.after(rng.random(), lambda: self._restore_step(None, steps))
        if rng.random() < 0.5:
            self.world.after(rng.random() + 0.02, self._crash if rng.random() < 0.5 else self._isolate_leader)

    def _restore_step(self, at: tuple[str, int] | None, steps: list[bytes]) -> None:
        """`at`: the server that leads the restore, in which of its lives. As `raftstate.backup`: one at a time."""
        leader = self._leader() if at is None else self.servers[at[0]]
        if leader is None or not leader.alive or (at is None and (leader.name, leader.life) in self._restoring):
            return
        here = at or (leader.name, leader.life)
        if here[1] != leader.life or not steps:
            self._restoring.discard(here)
            return
        self._restoring.add(here)

        def proposed(_value: Any, error: Any) -> None:
            if error is None:
                self.world.after(0.003 * self.world.rng.random(), lambda: self._restore_step(here, steps[1:]))
                return
            self._restoring.discard(here)
            leader.operate(lambda core: core.propose_restore(VOID, lambda _value, _error: None))

        def propose(core: RaftCore) -> None:
            try:
                core.propose_restore(steps[0], proposed)
            except RaftError:
                self._restoring.discard(here)
                raise

        leader.operate(propose)

    def _disk_trouble(self) -> None:
        server = self._some()
        if server.alive:
            self.world.note(server.name, "disk fails its next sync")
            server.disk.fail_next_sync()
            self.world.after(self.world.rng.random(), lambda: self._revive(server))

    # -- the whole -------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Raises Violation, or whatever broke."""
        self.world.run(FAULTS_S)
        self.network.heal()
        self.network.mood = NetworkMood()
        for server in self.servers.values():
            server.calm()
        self.world.run(FAULTS_S + 0.8)  # what was to come back has come back
        for server in self.servers.values():
            self._revive(server)
        self.world.run(FAULTS_S + SETTLE_S - 1)
        for client in self.clients:
            client.stopping = True
        self.world.run(FAULTS_S + SETTLE_S)
        self._check_calm()

    def _check_calm(self) -> None:
        leaders = [server for server in self.servers.values() if server.alive and server.core.is_leader]
        if len(leaders) != 1:
            raise Violation(f"after the faults {[server.name for server in leaders]} lead")
        members = leaders[0].core.members
        states: dict[str, Any] = {}
        for member in members.all:
            server = self.servers[member.id]
            states[member.id] = (server.core.applied, server.machine.digest(), server.machine.registers)
        self.referee.check_end(states, self._make_machine())
        if leaders[0].core.applied != leaders[0].core.last_index:
            raise Violation("the leader has entries that it cannot commit")


class _NoTruncation(logging.Handler):
    """pysyncobj's record that it truncates what is applied must never appear."""

    def emit(self, record: logging.LogRecord) -> None:
        if "truncating" in record.getMessage():
            raise Violation(record.getMessage())


def play(seed: int, bugs: Bugs | None = None, *, verbose: bool = False) -> Outcome:
    """Run one seed; `verbose` spells out the messages in the tail of the transcript."""
    logger = logging.getLogger("pysyncobj.syncobj")
    handler = _NoTruncation()
    logger.addHandler(handler)
    scenario = Scenario(seed, bugs, verbose=verbose)
    violation = None
    try:
        scenario.play()
    except Exception as error:  # noqa: BLE001 - whatever breaks in a run is what it is to report
        violation = f"{type(error).__name__}: {error}"
        if not isinstance(error, Violation):
            import traceback

            violation += "\n" + "".join(traceback.format_exception(error)[-6:])
    finally:
        logger.removeHandler(handler)
    world = scenario.world
    return Outcome(
        seed,
        world.transcript_hash(),
        world.events,
        sum(client.finished for client in scenario.clients),
        len(scenario.referee.leaders),
        violation,
        list(world.tail),
    )
