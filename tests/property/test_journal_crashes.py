"""Whatever happens before a crash, a restart finds everything that was synced, and nothing that never was."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftstate.errors import JournalDamaged
from raftstate.journal import Journal
from raftstate.journal_format import CERTIFICATE_BYTES, decode_header
from raftstate.journal_writer import Writer
from tests.support.journal_model import DIRECTORY, OPERATIONS, JournalRun, built, state_of
from tests.support.simdisk import SimDisk, _SimFile

steps = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10_000)), max_size=60)
calm_steps = st.lists(
    st.tuples(
        st.sampled_from([name for name in OPERATIONS if name not in ("crash", "take")]), st.integers(0, 10_000)
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(0, 2**32))
def test_restart_finds_a_state_between_synced_and_written(operations: list[tuple[str, int]], seed: int) -> None:
    run = JournalRun(SimDisk(seed), rng=random.Random(seed))
    for operation, number in [*operations, ("crash", 1)]:
        run.step(operation, number)


def run_seed(seed: int, disk: SimDisk) -> int:
    rng = random.Random(seed)
    run = JournalRun(disk, rng=rng, segment_bytes=rng.choice([200, 1000, 5000]))
    for _ in range(rng.randint(10, 150)):
        run.step(rng.choice(OPERATIONS), rng.randrange(10_000))
    run.step("crash", 1)
    return run.crashes


def test_many_seeds_of_long_runs() -> None:
    assert sum(run_seed(seed, SimDisk(seed)) for seed in range(400)) > 2000


def lie(disk: SimDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_SimFile, "_flush", lambda self: None)


def forget_names(disk: SimDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimDisk, "_flush_names", lambda self, path: None)


def believe_the_cache(disk: SimDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "_rewrite", lambda self, name, found: None)


@pytest.mark.parametrize("plant", [lie, forget_names, believe_the_cache])
def test_planted_bug_of_a_skipped_sync_is_caught(
    plant: Callable[[SimDisk, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(SimDisk(), monkeypatch)
    caught = 0
    for seed in range(20):
        try:
            run_seed(seed, SimDisk(seed))
        except (AssertionError, JournalDamaged):
            caught += 1
    assert caught >= 10


@settings(max_examples=25, deadline=None)
@given(calm_steps, st.integers(1, 255))
def test_every_damaged_byte_that_is_certified_is_refused(operations: list[tuple[str, int]], mask: int) -> None:
    run = built([*operations, ("add", 7), ("sync", 1)], segment_bytes=300)
    snapshot = run.disk.snapshot()
    files = {path: data for path, data in snapshot.items() if len(data) < 3000}
    newest = max(snapshot)
    for path, data in files.items():
        certified = len(data) - CERTIFICATE_BYTES
        if path != newest:
            following = decode_header(snapshot[min(later for later in snapshot if later > path)])
            assert following is not None
            certified = following[0].previous_bytes
        for offset in range(len(data)):
            disk = SimDisk.of(run.disk.snapshot())
            disk.flip(path, offset, mask)
            if offset < certified:
                with pytest.raises(JournalDamaged, match="lictor operator raft recover"):
                    Journal(disk, DIRECTORY)
            else:
                # Only the last certificate itself, or what closes the segment: nothing is lost with it.
                assert state_of(Journal(disk, DIRECTORY)) == run.history[-1], (path, newest)


@settings(max_examples=10, deadline=None)
@given(calm_steps, calm_steps)
def test_a_tail_torn_at_any_byte_is_cut_to_a_written_state(
    before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> None:
    run = built(before, segment_bytes=1 << 20)
    path_sizes = {path: len(data) for path, data in run.disk.snapshot().items()}
    journal = Journal(run.disk, DIRECTORY, segment_bytes=1 << 20)
    tail = JournalRun.__new__(JournalRun)
    tail.__dict__.update(run.__dict__, journal=journal, history=[state_of(journal)], synced=0, taken=[])
    for operation, number in after:
        if operation != "sync":
            tail.step(operation, number | 1)
    pending = journal.take_pending()
    if pending is None:
        return
    pending.sync()
    for path, data in run.disk.snapshot().items():
        for size in range(path_sizes.get(path, 0), len(data)):
            disk = SimDisk.of({**run.disk.snapshot(), path: data[:size]})
            reopened = Journal(disk, DIRECTORY)
            assert state_of(reopened) in tail.history
            # The cut is clean: what is written behind it is found again.
            reopened.clear()
            reopened.add(b"next", 1, 1)
            reopened.close()
            disk.crash()
            assert state_of(Journal(disk, DIRECTORY))[0] == ((b"next", 1, 1),)
