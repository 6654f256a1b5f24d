"""Tokens, roles and policies, each by its id and by what else it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftstate.model.acl import Bootstrap, Policy, Role, Token
from raftstate.state.table import Journal, Table

if TYPE_CHECKING:
    from raftstate.state.answer import Answer

RESOLVED_MAX = 4096


class Tokens(Table[str, Token]):
    """Tokens by accessor id."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("tokens", Token, journal)
        self.by_secret_hash: dict[str, Token] = {}
        self.resolved: dict[str, tuple[int, Answer]] = {}
        """What secrets came to, with the index of access control's last change before: a memory, not state."""

    def key_of(self, row: Token) -> str:
        return row.accessor_id

    def reindex(self, key: str, old: Token | None, new: Token | None) -> None:
        if old is not None:
            self.by_secret_hash.pop(old.secret_hash, None)
        if new is not None and new.secret_hash:
            self.by_secret_hash[new.secret_hash] = new

    def remember(self, secret_hash: str, index: int, found: Answer) -> None:
        """Keep what a secret came to; the oldest is forgotten when there are too many."""
        self.resolved.pop(secret_hash, None)
        if len(self.resolved) >= RESOLVED_MAX:
            del self.resolved[next(iter(self.resolved))]
        self.resolved[secret_hash] = index, found


class Policies(Table[str, Policy]):
    """Policies by id."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("acl-policies", Policy, journal)
        self.by_name: dict[str, Policy] = {}

    def key_of(self, row: Policy) -> str:
        return row.id

    def reindex(self, key: str, old: Policy | None, new: Policy | None) -> None:
        if old is not None:
            self.by_name.pop(old.name, None)
        if new is not None:
            self.by_name[new.name] = new


class Roles(Table[str, Role]):
    """Roles by id."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("acl-roles", Role, journal)
        self.by_name: dict[str, Role] = {}

    def key_of(self, row: Role) -> str:
        return row.id

    def reindex(self, key: str, old: Role | None, new: Role | None) -> None:
        if old is not None:
            self.by_name.pop(old.name, None)
        if new is not None:
            self.by_name[new.name] = new


class Bootstraps(Table[str, Bootstrap]):
    """At most one row, under "": that access control was begun."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("acl-bootstrap", Bootstrap, journal)

    def key_of(self, row: Bootstrap) -> str:
        return ""
