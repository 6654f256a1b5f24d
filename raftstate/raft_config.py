"""Timings and bounds of the Raft core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RaftConfig:
    """All times in seconds, all sizes in bytes.

    The lease rests on stickiness: no voter helps to elect another leader within `election_timeout_min_s` of hearing
    from one, so a leader heard by a quorum since `t` is the only one until `t + election_timeout_min_s`, less what
    two clocks may drift apart in that time.
    """

    heartbeat_s: float = 0.06
    election_timeout_min_s: float = 0.35
    election_timeout_max_s: float = 0.65
    clock_drift: float = 0.2
    """Share of the minimum election timeout that is kept back from the lease for clocks of unequal rate."""
    commit_notice_s: float = 0.004
    """A follower that gets no further entries hears of a new commit index after this time at the latest."""
    command_bytes_max: int = 576 * 1024
    """The largest value of a key (512 KiB, as Consul's) and what it travels in."""
    proposals_max: int = 4096
    proposal_bytes_max: int = 32 * 1024 * 1024
    """Writes that wait for a quorum; beyond these bounds `propose` raises TooBusy."""
    append_bytes_max: int = 256 * 1024
    """Entries are batched up to this size; a single larger entry travels alone."""
    append_entries_max: int = 512
    inflight_messages_max: int = 64
    inflight_entries_max: int = 4096
    """What a follower may find on its link at once: each takes it some microseconds, in one turn of its loop."""
    inflight_bytes_max: int = 4 * 1024 * 1024
    snapshot_chunks_inflight: int = 4
    apply_batch: int = 128
    apply_bytes: int = 256 * 1024
    """Entries, and their bytes, applied before the loop gets its turn; a single larger one is applied alone."""
    trailing_entries: int = 2048
    """Entries kept behind a snapshot, so that a follower a little behind needs no snapshot …"""
    trailing_bytes: int = 16 * 1024 * 1024
    """… and their size at most: they are held in memory, and one entry may be large."""
    learner_lag_max: int = 64
    """A learner that is this close to the end of the leader's log becomes a voter."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 2 < self.election_timeout_min_s < self.election_timeout_max_s:
            raise ValueError(
                "raft timings: need 2 * heartbeat_s < election_timeout_min_s < election_timeout_max_s; "
                f"got {self.heartbeat_s}, {self.election_timeout_min_s}, {self.election_timeout_max_s}"
            )

    @property
    def lease_s(self) -> float:
        """How long a leader may trust a quorum's answer, counted from before it asked."""
        return self.election_timeout_min_s * (1.0 - self.clock_drift)
