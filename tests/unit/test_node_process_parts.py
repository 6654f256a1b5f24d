"""Small parts of a node's process: data directory, log lines, autopilot's rules."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import pytest

from node.autopilot import health, removable, state
from node.data_dir import DataDir, DataDirBusy
from node.errors import NodeError, Refused, UnknownOutcome, from_wire, to_wire
from node.logs import KeyValueFormatter, quoted
from raftstate.model.autopilot import AutopilotConfig
from raftstate.raft_members import Member
from raftstate.replica import RaftStatus


def test_one_process_at_a_time_has_a_data_directory(tmp_path: Path) -> None:
    first, second = DataDir(tmp_path / "n"), DataDir(tmp_path / "n")
    first.open()
    assert (tmp_path / "n").stat().st_mode & 0o777 == 0o700
    assert int(first.pid_file.read_text()) == os.getpid()
    with pytest.raises(DataDirBusy, match=rf"pid {os.getpid()}"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_data_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirBusy, match="choose another"):
        DataDir(tmp_path / "file" / "n").open()


def test_a_data_directory_on_a_full_disk_is_refused_with_what_to_do(tmp_path: Path) -> None:
    directory = DataDir(tmp_path / "n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(DataDirBusy, match="make room"):
            directory.open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    directory.open()  # the lock was given back
    directory.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ('a"b', '"a\\"b"'),
        ("line\nbreak", '"line\\nbreak"'),
        ("\x1b[31mred", '"\\x1b[31mred"'),
        ("a=b", '"a=b"'),
    ],
)
def test_values_stay_on_one_line(text: str, expected: str) -> None:
    assert quoted(text) == expected


def test_a_log_line_is_key_value_with_its_trace() -> None:
    try:
        raise ValueError("broken\nbadly")
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("lictor.x", logging.ERROR, "f", 1, "it %s", ("failed",), error)
    line = KeyValueFormatter().format(record)
    assert "\n" not in line
    assert line.startswith("time=20")
    assert ' level=error from=lictor.x msg="it failed" trace="' in line
    assert "ValueError" in line


def status(*members: tuple[str, bool], leader: str = "s1", lag: dict[str, int] | None = None) -> RaftStatus:
    rows = tuple(Member(name, f"{name}:8300", voter) for name, voter in members)
    return RaftStatus(leader, "leader", 7, leader, 90, 90, 1, 100, 100, 0, 0, rows, lag or {}, None)


THREE = (("s1", True), ("s2", True), ("s3", True))
FIVE = (*THREE, ("s4", True), ("s5", True))


def test_autopilot_counts_how_many_may_fail() -> None:
    well = {"s2": 0, "s3": 0}
    report = health(status(*THREE, lag=well), lambda name: True, {}, version="1")
    assert (report["Healthy"], report["FailureTolerance"]) == (True, 1)
    report = health(status(*THREE, lag=well), lambda name: name != "s3", {}, version="1")
    assert (report["Healthy"], report["FailureTolerance"]) == (False, 0)
    assert [server["SerfStatus"] for server in report["Servers"]] == ["alive", "alive", "failed"]
    lagging = health(status(*THREE, lag={"s2": 0, "s3": 1000}), lambda name: True, {}, version="1")
    assert [server["Healthy"] for server in lagging["Servers"]] == [True, True, False]


def test_a_dead_server_goes_only_when_enough_stay() -> None:
    assert removable(status(*THREE), {"s3": 1e9}, after_s=60) is None, "a cluster of three keeps its places"
    assert removable(status(*FIVE), {"s5": 59.0}, after_s=60) is None
    assert removable(status(*FIVE), {"s5": 61.0}, after_s=60) == "s5"
    assert removable(status(*FIVE), {"s4": 61.0, "s5": 62.0}, after_s=60) == "s5", (
        "one at a time, the longest dead first"
    )
    assert removable(status(*FIVE), {"s3": 61.0, "s4": 61.0, "s5": 62.0}, after_s=60) is None, (
        "no majority would be well"
    )
    assert removable(status(*FIVE), {"s1": 1e9}, after_s=60) is None, "the leader is not dead"
    assert removable(status(*THREE, ("s9", False)), {"s9": 61.0}, after_s=60) == "s9", "a learner holds no vote"
    behind = {"s2": 0, "s3": 9999, "s4": 9999, "s5": 9999}
    assert removable(status(*FIVE, lag=behind), {"s5": 61.0}, after_s=60) is None, "no majority would follow the log"


def test_operators_say_how_dead_servers_are_cleaned_up() -> None:
    off = AutopilotConfig(cleanup_dead_servers=False)
    assert removable(status(*FIVE), {"s5": 61.0}, after_s=60, config=off) is None
    two = AutopilotConfig(min_quorum=2)
    assert removable(status(*THREE), {"s3": 61.0}, after_s=60, config=two) == "s3"
    none = AutopilotConfig(min_quorum=0)
    assert removable(status(*THREE), {"s2": 61.0, "s3": 61.0}, after_s=60, config=none) is None, "never below quorum"
    many = AutopilotConfig(min_quorum=5)
    assert removable(status(*FIVE), {"s5": 61.0}, after_s=60, config=many) is None
    near = AutopilotConfig(max_trailing_logs=10)
    report = health(status(*THREE, lag={"s2": 11, "s3": 0}), lambda name: True, {}, version="1", config=near)
    assert [server["Healthy"] for server in report["Servers"]] == [True, False, True]
    seen = state(report)
    assert seen["Voters"] == ["s1", "s2", "s3"]
    assert seen["Leader"] == "s1"
    assert [seen["Servers"][name]["Status"] for name in ("s1", "s2")] == ["leader", "voter"]


def test_errors_keep_their_kind_on_the_wire() -> None:
    for error in (Refused("no", reason="conflict", http_status=409), UnknownOutcome("?"), NodeError("x")):
        back = from_wire(*to_wire(error))
        assert (type(back), str(back), back.http_status) == (type(error), str(error), error.http_status)
    assert "brand-new" in str(from_wire("brand-new", "", "", 500))
