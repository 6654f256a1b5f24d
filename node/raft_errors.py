"""The replica's errors, said in the words of `node.errors`: translated once, here."""

from __future__ import annotations

from node import errors as node
from raftstate import errors as raft


def translate(error: raft.RaftError) -> node.NodeError:
    """Return the NodeError for an error of `raftstate`."""
    match error:
        case raft.NotLeader():
            return node.NoLeader(str(error), leader=error.leader)
        case raft.NoQuorum():
            return node.NoLeader(str(error))
        case raft.UnknownOutcome():
            return node.UnknownOutcome(str(error))
        case raft.TooBusy():
            return node.Busy(str(error))
        case raft.CommandTooLarge():
            return node.Refused(str(error), reason="too-large", http_status=413)
        case raft.Stopped():
            return node.Stopped(str(error))
        case raft.MembershipRefused():
            return node.Refused(str(error), reason="membership", http_status=409)
        case raft.TransferFailed():
            return node.Refused(str(error), reason="transfer", http_status=500)
        case raft.SnapshotDamaged():
            return node.Refused(str(error), reason="snapshot", http_status=400)
    return node.NodeError(str(error))
