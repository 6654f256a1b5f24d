"""Membership: who votes, who only listens, and which single step may follow (Raft thesis, chapter 4).

A membership entry in the log holds the whole membership, not a change, so that taking back an uncommitted one is
falling back to the entry before it. It counts from the moment it is in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A server. `address` is host:port of its peer listener; a learner receives the log and does not vote."""

    id: str
    address: str = ""
    voter: bool = True


class Members(msgspec.Struct, frozen=True):
    """A membership, sorted by id."""

    all: tuple[Member, ...] = ()

    @classmethod
    def of(cls, members: Iterable[Member]) -> Members:
        """Build from members in any order; a later one of the same id wins."""
        by_id = {member.id: member for member in members}
        return cls(tuple(by_id[key] for key in sorted(by_id)))

    @property
    def voters(self) -> tuple[str, ...]:
        """Ids of the voters."""
        return tuple(member.id for member in self.all if member.voter)

    def get(self, server: str) -> Member | None:
        """The member of that id, if any."""
        return next((member for member in self.all if member.id == server), None)

    def put(self, member: Member) -> Members:
        """With `member` added or changed."""
        return Members.of((*self.all, member))

    def without(self, server: str) -> Members:
        """With that server gone."""
        return Members(tuple(member for member in self.all if member.id != server))

    def refuse_step(self, after: Members) -> str | None:
        """Why `after` may not follow this membership; None when it may.

        Only steps that change at most one voter keep every old majority overlapping every new one.
        """
        if not after.voters:
            return "a cluster needs a voter: add another server before removing this one"
        if len(set(self.voters) ^ set(after.voters)) > 1:
            return "only one voter may be added or removed at a time"
        for new in [one for one in after.all if one not in self.all]:
            owner = next((one for one in after.all if one.id != new.id and one.address == new.address), None)
            if owner is not None:
                return (
                    f"{new.address} is the address of {owner.id}: give {new.id} its own, or remove {owner.id} first "
                    f"(`lictor operator raft remove-peer -id {owner.id}`)"
                )
        return None

    def quorum_value(self, value_of: Callable[[str], float]) -> float:
        """The greatest value that a majority of the voters has reached; needs at least one voter."""
        values = sorted([value_of(member.id) for member in self.all if member.voter], reverse=True)
        return values[len(values) // 2]

    def is_quorum(self, servers: Iterable[str]) -> bool:
        """Whether these servers hold a majority of the votes."""
        voters = set(self.voters)
        return 2 * len(voters.intersection(servers)) > len(voters)


def encode_members(members: Members) -> bytes:
    """Bytes for the log and for snapshots; equal memberships give equal bytes."""
    return msgspec.msgpack.encode(members.all)


def decode_members(data: bytes) -> Members:
    """Parse `encode_members`' form. Raises msgspec.MsgspecError."""
    return Members.of(msgspec.msgpack.decode(data, type=tuple[Member, ...])) if data else Members()
