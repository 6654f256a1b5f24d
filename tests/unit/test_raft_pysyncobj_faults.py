"""What pysyncobj 0.3.17 does by itself, and why its message handlers are not used (decision 10).

If one of these fails, pysyncobj has changed: read decision 10 again. `test_raft_core.py` has each one's counterpart.
"""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from raftstate.raft_driven import Driven


class Recorder(Transport):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.sent.append((node.id, message))
        return True

    def destroy(self) -> None: ...


class Plain:
    """pysyncobj as it comes, but for its thread and sockets."""

    def __init__(self, size: int = 3) -> None:
        self.transport = Recorder()
        self.others = [Node(name) for name in "bcde"[: size - 1]]
        conf = SyncObjConf(autoTick=False, pollerType="select")
        self.raft = SyncObj(Node("a"), self.others, conf, nodeClass=Node, transport=self.transport)

    def receive(self, peer: str, **message: Any) -> None:
        self.raft._SyncObj__onMessageReceived(Node(peer), message)

    def append(self, term: int, previous: int, entries: list[tuple[bytes, int, int]], commit: int = 1) -> None:
        self.receive(
            "b",
            type="append_entries",
            term=term,
            commit_index=commit,
            entries=entries,
            prevLogIdx=previous,
            prevLogTerm=0 if previous == 1 else term,
        )


def test_an_overlapping_append_truncates_what_matches_and_is_applied(caplog: pytest.LogCaptureFixture) -> None:
    plain = Plain()
    entries = [(b"\x01", 2, 1), (b"\x01", 3, 1), (b"\x01", 4, 1)]
    plain.append(1, 1, entries, commit=4)
    plain.raft._SyncObj__applyLogEntries()
    assert plain.raft.raftLastApplied == 4
    with caplog.at_level(logging.CRITICAL):
        plain.append(1, 1, entries[:1], commit=4)
    assert "truncating already-applied log entries" in caplog.text
    assert plain.raft._SyncObj__raftLog[-1][1] == 2, "two applied entries, held by a quorum, are gone"


def test_a_stale_acknowledgement_raises_the_match_index() -> None:
    plain = Plain()
    plain.raft._SyncObj__raftCurrentTerm = 7
    plain.raft._SyncObj__onBecomeLeader()
    # Nothing in this message says of which term it is.
    plain.receive("b", type="next_node_idx", next_node_idx=100, reset=False, success=True)
    assert plain.raft._SyncObj__raftMatchIndex[Node("b")] == 99


def test_a_duplicated_vote_elects_without_a_quorum() -> None:
    plain = Plain(5)
    plain.raft._SyncObj__raftState = 1
    plain.raft._SyncObj__raftCurrentTerm, plain.raft._SyncObj__votesCount = 3, 1
    for _ in range(2):
        plain.receive("b", type="response_vote", term=3)
    assert plain.raft._isLeader()


def test_a_stale_leader_is_told_nothing() -> None:
    plain = Plain()
    plain.raft._SyncObj__raftCurrentTerm = 9
    plain.append(3, 1, [])
    assert plain.transport.sent == []


def test_anyone_with_a_higher_term_deposes_a_leader() -> None:
    plain = Plain()
    plain.raft._SyncObj__raftCurrentTerm = 7
    plain.raft._SyncObj__onBecomeLeader()
    plain.receive("c", type="request_vote", term=50, last_log_index=0, last_log_term=0)
    assert not plain.raft._isLeader()


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return str.upper, ("code of the sender's choice",)


def test_it_runs_what_a_log_entry_says() -> None:
    plain = Plain()
    ran = plain.raft._SyncObj__parseChangeClusterRequest(b"\x02" + pickle.dumps(Payload()))
    assert ran == "CODE OF THE SENDER'S CHOICE"


def test_none_of_that_can_run_in_the_adapter() -> None:
    for name in ("onMessageReceived", "doApplyCommand", "parseChangeClusterRequest", "loadDumpFile"):
        with pytest.raises(AssertionError, match="must not run"):
            getattr(Driven, f"_SyncObj__{name}")(None)
    with pytest.raises(AssertionError, match="must not run"):
        Driven._onTick(None)
