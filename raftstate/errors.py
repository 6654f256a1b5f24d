"""Errors of the replicated state. One root, `RaftError`; every text says what to do next."""

from __future__ import annotations


class RaftError(Exception):
    """Root of every error that `raftstate` raises."""


class NotLeader(RaftError):
    """This server is not the leader; nothing was proposed, so a retry elsewhere is safe."""

    def __init__(self, leader: str | None = None) -> None:
        self.leader = leader
        hint = f"the leader is {leader!r}: ask it" if leader else "no leader is known yet: retry in a moment"
        super().__init__(f"this server is not the raft leader; {hint}")


class UnknownOutcome(RaftError):
    """The command may or may not have been applied. Retry with the same request id: it is applied once."""


class TooBusy(RaftError):
    """A bounded queue is full; nothing was proposed. Try again after a short wait."""


class CommandTooLarge(RaftError):
    """The command exceeds the size bound; split it. Nothing was proposed."""


class NoQuorum(RaftError):
    """A read could not be confirmed by a quorum in time. Nothing was changed; retry, or read with mode `stale`."""


class Stopped(RaftError):
    """The replica has stopped and takes no more work; ask another server."""


class MembershipRefused(RaftError):
    """The change of membership may not be made now, or not at all; nothing was proposed."""


class TransferFailed(RaftError):
    """Leadership could not be handed over; this server still leads, or another was elected meanwhile."""


_RECOVER = (
    "if its peers are well, run `lictor operator raft recover -config FILE -node NAME` here and start it again: it "
    "then takes the state from them. Do not empty the directory by hand: this server has voted under its name and "
    "would forget it"
)


class StateDiverged(RaftError):
    """The leader's log contradicts what this server has committed: someone's disk lied or was rolled back."""

    def __init__(self, index: int, commit: int) -> None:
        super().__init__(
            f"the leader's log differs at index {index}, which is committed here (up to {commit}); this server stops "
            "before it serves a diverged state: find the odd one with `lictor cluster status` or /v1/agent/self; "
            f"{_RECOVER}"
        )


class JournalDamaged(RaftError):
    """A part of the journal that was once durable cannot be read back as written.

    `path` and `offset` (bytes) name the place. It is refused, not cut: acknowledged entries would be lost.
    """

    def __init__(self, path: str, offset: int, what: str) -> None:
        self.path, self.offset, self.what = path, offset, what
        super().__init__(
            f"raft journal is damaged: {what} in {path} at byte {offset}; nothing was changed on disk; {_RECOVER}"
        )


class JournalFailed(RaftError):
    """A write or sync of the journal failed, now or earlier; the journal takes no more writes.

    A failed fsync is never retried: the kernel may have dropped the pages, and a second call that succeeds
    would prove nothing. The server must stop and be started again once the disk is well.
    """

    def __init__(self, cause: BaseException | str) -> None:
        super().__init__(
            f"raft journal cannot be written ({cause}); this server stops: "
            "free or replace the disk, then start it again"
        )


class SnapshotDamaged(RaftError):
    """A snapshot file, or a stream in its format, is torn or fails its checksum."""

    def __init__(self, where: str, what: str, *, advice: str = f"nothing was changed on disk; {_RECOVER}") -> None:
        self.where, self.what = where, what
        super().__init__(f"snapshot is damaged: {what} in {where}; {advice}")
