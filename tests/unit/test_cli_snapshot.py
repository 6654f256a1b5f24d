"""Snapshot files as the command line sees them: whole or refused, wherever the damage is."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path

import pytest

from cli import snapshot
from cli.main import main
from raftstate.snapshot_format import SnapshotEncoder, SnapshotHeader
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine


def _snapshot(chunks: int = 3) -> bytes:
    encoder = SnapshotEncoder(SnapshotHeader(7, 2, {"server-1": {}}, 1_700_000_000.0))
    parts = [encoder.start(), *(encoder.chunk(bytes([n]) * 500) for n in range(chunks)), encoder.finish()]
    return b"".join(parts)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_whole_file_is_shown(pack: type[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s"
    file.write_bytes(pack(_snapshot()))
    assert main(["snapshot", "inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "1500" in shown
    assert "server-1" in shown
    assert "2023-11-14T22:13:20+00:00" in shown


def test_the_cluster_that_a_file_is_of_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = StateMachine()
    command = c.SetCAConfig(config={}, trust_domain="one.example")
    assert machine.apply(1, c.encode_envelope(c.Envelope("r", "2026-01-01T00:00:00Z", command))).refusal is None
    encoder = SnapshotEncoder(SnapshotHeader(1, 1, {}, 0.0))
    with machine.snapshot() as chunks:
        parts = [encoder.start(), *(encoder.chunk(chunk) for chunk in chunks), encoder.finish()]
    file = tmp_path / "s"
    file.write_bytes(b"".join(parts))
    assert main(["snapshot", "inspect", "-json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["TrustDomain"] == "one.example"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_any_flipped_or_missing_byte_is_refused(
    pack: type[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pack(_snapshot(1))
    file = tmp_path / "s"
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        for content in (bytes(damaged), whole[:place]):
            file.write_bytes(content)
            code = main(["snapshot", "inspect", str(file)])
            error = capsys.readouterr().err
            # A gzip header's time stamp and flags may change without changing what is packed.
            if code == 0 and pack is gzip.compress and place < 10:
                continue
            assert code == 1, (place, len(content), error)
            assert error.count("\n") == 1
            assert str(file) in error


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    assert main(["snapshot", "inspect", str(tmp_path / "none")]) == 2
    assert main(["snapshot", "restore", str(tmp_path / "none")]) == 2


def test_a_saved_file_is_durable_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        steps.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    snapshot._write_whole(tmp_path / "backup.snap", [_snapshot()])
    assert steps == ["file", "name", "directory"]
    assert [path.name for path in tmp_path.iterdir()] == ["backup.snap"]
