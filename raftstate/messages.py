"""The raft messages: fixed schemas, MessagePack arrays, no `pickle`.

Every reply carries its sender's term, so that a stale one can be dropped and a stale leader learns that it is stale
(pysyncobj's `next_node_idx` has no term). `round` is the leader's own counter; a follower only echoes it.

Names and meanings follow the Raft paper (Ongaro, Ousterhout 2014), Ongaro's thesis 6.4 (ReadIndex), 9.6 (PreVote)
and 3.10 (TimeoutNow).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from raftstate.errors import RaftError

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A term, log index, round or chunk number."""


class BadMessage(RaftError):
    """A peer sent bytes that are not a raft message of this version; close that connection."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    term: Count


class PreVote(_Message, frozen=True, tag=1):
    """May I campaign? `term` is the term I would campaign in; no one's state changes."""

    last_index: Count
    last_term: Count


class PreVoteReply(_Message, frozen=True, tag=2):
    """`term` is the asked term when granted, the replier's own when refused."""

    granted: bool


class RequestVote(_Message, frozen=True, tag=3):
    """`transfer` is set when the leader itself asked for this election: it overrides leader stickiness."""

    last_index: Count
    last_term: Count
    transfer: bool = False


class VoteReply(_Message, frozen=True, tag=4):
    granted: bool


class Heartbeat(_Message, frozen=True, tag=5):
    """The leader lives. `commit` never exceeds what the receiver is known to hold."""

    commit: Count
    round: Count


class HeartbeatReply(_Message, frozen=True, tag=6):
    """Promises nothing of the replier's disk, so it does not wait for it."""

    round: Count


class AppendEntries(_Message, frozen=True, tag=7):
    """Entries follow `prev_index` without gap; each is (term, command)."""

    prev_index: Count
    prev_term: Count
    commit: Count
    round: Count
    entries: tuple[tuple[Count, bytes], ...] = ()


class AppendReply(_Message, frozen=True, tag=8):
    """Success: everything up to `match` is durable here and equal to the leader's log.

    Refusal: `prev_index` did not match; the logs may agree at `hint_index`, whose term here is `hint_term`.
    """

    round: Count
    success: bool
    match: Count
    prev_index: Count = 0
    hint_index: Count = 0
    hint_term: Count = 0


class InstallSnapshot(_Message, frozen=True, tag=9):
    """One chunk of the snapshot at (`index`, `snapshot_term`). `members` is that index's membership, encoded."""

    index: Count
    snapshot_term: Count
    members: bytes
    chunk: Count
    last: bool
    round: Count
    data: bytes


class SnapshotReply(_Message, frozen=True, tag=10):
    """`next_chunk` is what the receiver wants next; `done` once the snapshot is durable and restored."""

    index: Count
    next_chunk: Count
    done: bool
    round: Count


class TimeoutNow(_Message, frozen=True, tag=11):
    """Leadership transfer: campaign at once."""


Message = (
    PreVote
    | PreVoteReply
    | RequestVote
    | VoteReply
    | Heartbeat
    | HeartbeatReply
    | AppendEntries
    | AppendReply
    | InstallSnapshot
    | SnapshotReply
    | TimeoutNow
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """Return the wire form of a message."""
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """Parse a message from a peer. Raises BadMessage."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadMessage(
            f"raft peer sent a malformed message ({error}); upgrade the servers to the same version"
        ) from None
