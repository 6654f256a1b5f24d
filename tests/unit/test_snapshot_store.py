"""Snapshot files: whole or not at all, and the newest good one is found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftstate.disk import RealDisk
from raftstate.errors import RaftError, SnapshotDamaged
from raftstate.snapshot_format import SnapshotDecoder, SnapshotEncoder, SnapshotHeader
from raftstate.snapshots import SnapshotMeta, SnapshotStore, inspect
from tests.support.simdisk import SimCrash, SimDisk

MEMBERS = {"server-1": {"address": "127.0.0.1:8300", "voter": True}}


def store(disk: SimDisk) -> SnapshotStore:
    return SnapshotStore(disk, "/snapshots", clock=lambda: 1_700_000_000.0)


def save(snapshots: SnapshotStore, index: int, chunks: list[bytes] | None = None) -> SnapshotMeta:
    writer = snapshots.begin(index, 3, MEMBERS)
    for chunk in [b"state of %d" % index] if chunks is None else chunks:
        writer.write(chunk)
    return writer.commit()


def path(disk: SimDisk, index: int) -> str:
    [name] = [name for name in disk.listdir("/snapshots") if name.startswith(f"{index:020d}-")]
    return f"/snapshots/{name}"


def test_what_was_saved_is_loaded() -> None:
    snapshots = store(SimDisk())
    assert snapshots.latest() is None
    chunks = [b"one", b"", b"x" * 3_000_000, b"\xff" * 20]
    meta = save(snapshots, 42, chunks)
    assert (meta.index, meta.term, meta.members) == (42, 3, MEMBERS)
    assert snapshots.latest() == meta
    assert list(snapshots.open(meta)) == chunks


def test_newest_two_are_kept_and_found_after_a_restart() -> None:
    disk = SimDisk()
    for index in (10, 20, 30):
        save(store(disk), index)
    assert len(disk.listdir("/snapshots")) == 2
    disk.crash()
    latest = store(disk).latest()
    assert latest is not None
    assert latest.index == 30


def test_inspect_tells_what_is_inside() -> None:
    disk = SimDisk()
    save(store(disk), 7, [b"ab", b"cde"])
    summary = inspect(disk, path(disk, 7))
    assert (summary.header.index, summary.header.term, summary.header.members) == (7, 3, MEMBERS)
    assert (summary.chunks, summary.bytes, summary.header.created) == (2, 5, 1_700_000_000.0)
    assert summary.sha256 == "36bbe50ed96841d10443bcb670d6554f0a34b761be67ec9c4a8ad2c0c44ca42c"


def test_damaged_newest_falls_back_to_the_older_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    disk = SimDisk()
    save(store(disk), 10)
    save(store(disk), 20)
    disk.flip(path(disk, 20), 150)
    latest = store(disk).latest()
    assert latest is not None
    assert latest.index == 10
    assert "a newer one is damaged" in caplog.text


def test_never_falls_back_below_the_journals_base() -> None:
    disk = SimDisk()
    save(store(disk), 10)
    save(store(disk), 20)
    disk.flip(path(disk, 20), 150)
    with pytest.raises(SnapshotDamaged, match="lictor operator raft recover"):
        store(disk).latest(min_index=15)


def test_damaged_one_does_not_count_as_kept() -> None:
    disk = SimDisk()
    save(store(disk), 10)
    save(store(disk), 20)
    disk.flip(path(disk, 20), 150)
    snapshots = store(disk)
    snapshots.latest()
    save(snapshots, 30)
    assert [int(name[:20]) for name in disk.listdir("/snapshots")] == [10, 20, 30]
    save(snapshots, 40)
    assert [int(name[:20]) for name in disk.listdir("/snapshots")] == [30, 40]


def test_snapshot_being_read_outlives_its_turn() -> None:
    disk = SimDisk()
    snapshots = store(disk)
    first = save(snapshots, 1, [b"a", b"b"])
    reader = snapshots.open(first)
    abandoned = snapshots.open(first)
    for index in (2, 3, 4):
        save(snapshots, index)
    del abandoned
    assert list(reader) == [b"a", b"b"]
    assert [int(name[:20]) for name in disk.listdir("/snapshots")] == [3, 4]


def test_damage_found_while_reading_is_remembered() -> None:
    disk = SimDisk()
    snapshots = store(disk)
    save(snapshots, 1)
    meta = save(snapshots, 2)
    disk.flip(path(disk, 2), disk.size(path(disk, 2)) - 1)
    with pytest.raises(SnapshotDamaged, match="trailer"):
        list(snapshots.open(meta))
    latest = snapshots.latest()
    assert latest is not None
    assert latest.index == 1


def test_aborted_and_abandoned_snapshots_leave_nothing() -> None:
    disk = SimDisk()
    snapshots = store(disk)
    writer = snapshots.begin(5, 1, {})
    writer.write(b"half")
    writer.abort()
    writer.abort()
    with pytest.raises(RaftError, match="begin another"):
        writer.write(b"more")
    snapshots.begin(6, 1, {}).write(b"half")
    assert len(disk.listdir("/snapshots")) == 1
    assert store(disk).latest() is None
    assert disk.listdir("/snapshots") == []


@pytest.mark.parametrize("seed", range(40))
def test_crash_at_any_step_leaves_the_old_or_the_new_one_whole(seed: int) -> None:
    for steps in range(12):
        disk = SimDisk(seed * 100 + steps)
        save(store(disk), 10, [b"old" * 1000])
        disk.crash_after(steps)
        try:
            save(store(disk), 20, [b"new" * 1000])
            allowed = {20}
        except SimCrash:
            allowed = {10, 20}
        disk.crash()
        snapshots = store(disk)
        latest = snapshots.latest()
        assert latest is not None
        assert latest.index in allowed
        assert list(snapshots.open(latest)) == [(b"old" if latest.index == 10 else b"new") * 1000]


@pytest.mark.parametrize("seed", range(40))
def test_what_a_start_finds_is_there_for_good(seed: int) -> None:
    """A process is killed before the new name is durable, and the power goes after the next start.

    By then the journal may have been cut behind the snapshot that this start found.
    """
    for steps in range(12):
        disk = SimDisk(seed * 100 + steps)
        save(store(disk), 10)
        disk.crash_after(steps)
        try:
            save(store(disk), 20)
        except SimCrash:
            pass
        disk.kill()
        found = store(disk).latest()
        assert found is not None
        disk.crash()
        again = store(disk).latest()
        assert again is not None
        assert again.index >= found.index


def test_full_disk_leaves_the_older_snapshot() -> None:
    disk = SimDisk()
    snapshots = store(disk)
    save(snapshots, 10)
    disk.capacity = 2 * disk.size(path(disk, 10)) + 100
    writer = snapshots.begin(20, 3, MEMBERS)
    with pytest.raises(OSError, match="No space left"):
        writer.write(b"x" * 1000)
    writer.abort()
    assert len(disk.listdir("/snapshots")) == 1
    latest = store(disk).latest()
    assert latest is not None
    assert latest.index == 10


def test_every_damaged_byte_and_every_cut_is_found() -> None:
    encoder = SnapshotEncoder(SnapshotHeader(1, 2, {"a": 1}, 0.0))
    whole = encoder.start() + encoder.chunk(b"first chunk") + encoder.chunk(b"second") + encoder.finish()
    for offset in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            with pytest.raises(SnapshotDamaged):
                decode(whole[:offset] + bytes([whole[offset] ^ mask]) + whole[offset + 1 :])
        with pytest.raises(SnapshotDamaged):
            decode(whole[:offset])
    with pytest.raises(SnapshotDamaged, match="bytes follow the end"):
        decode(whole + b"\0")
    assert decode(whole) == [b"first chunk", b"second"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(1, 50))
def test_decoding_in_any_pieces_gives_the_chunks(chunks: list[bytes], step: int) -> None:
    encoder = SnapshotEncoder(SnapshotHeader(1, 2, {}, 0.0))
    whole = encoder.start() + b"".join(encoder.chunk(chunk) for chunk in chunks) + encoder.finish()
    assert decode(whole, step) == chunks


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_rubbish_is_refused(data: bytes, led: bool) -> None:
    with pytest.raises(SnapshotDamaged):
        decode(b"LICTORS\n\x01\x00" + data if led else data)


def decode(data: bytes, step: int = 10_000) -> list[bytes]:
    decoder = SnapshotDecoder("a test")
    chunks = []
    for at in range(0, len(data), step):
        chunks += list(decoder.feed(data[at : at + step]))
    decoder.finish()
    return chunks


def test_real_files(tmp_path: object) -> None:
    snapshots = SnapshotStore(RealDisk(), f"{tmp_path}/a/snapshots")
    meta = save_real(snapshots)
    again = SnapshotStore(RealDisk(), f"{tmp_path}/a/snapshots")
    assert again.latest() == meta
    assert b"".join(again.open(meta)) == b"z" * 5_000_000


def save_real(snapshots: SnapshotStore) -> SnapshotMeta:
    writer = snapshots.begin(1, 1, MEMBERS)
    for _ in range(50):
        writer.write(b"z" * 100_000)
    return writer.commit()
