"""Tokens: rows that say which secret (by its hash) may do what; the deciding is done elsewhere."""

from __future__ import annotations

import re

from raftstate.state.answer import Answer, answer
from raftstate.state.commands import DeleteToken, UpsertToken
from raftstate.state.names import require_name
from raftstate.state.refusal import CONFLICT, INVALID, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

_SHA256 = re.compile("[0-9a-f]{64}")


def upsert(step: Step, command: UpsertToken) -> bool:
    """Write a token."""
    token, tokens = command.token, step.store.tokens
    require_name(token.accessor_id, "accessor id")
    if not _SHA256.fullmatch(token.secret_hash):
        raise Refused(INVALID, "secret_hash must be 64 lower-case hex digits: the secret itself is never stored")
    if command.only_first and tokens.rows:
        return False
    holder = tokens.by_secret_hash.get(token.secret_hash)
    if holder is not None and holder.accessor_id != token.accessor_id:
        raise Refused(CONFLICT, f"the secret belongs to token {holder.accessor_id} already: make a new one")
    old = tokens.rows.get(token.accessor_id)
    row = step.stamp(token, old)
    if row is not None:
        tokens.put(row.accessor_id, row)
        if old is not None and old.secret_hash != row.secret_hash:
            step.bury("token-secret", old.secret_hash)
        _touch(step, row.accessor_id, row.secret_hash)
    return True


def delete(step: Step, command: DeleteToken) -> bool:
    """Delete a token."""
    row = step.store.tokens.remove(command.accessor_id)
    if row is None:
        return False
    step.touch("tokens")
    step.bury("token", row.accessor_id)
    step.bury("token-secret", row.secret_hash)
    return True


def _touch(step: Step, accessor_id: str, secret_hash: str) -> None:
    step.touch("tokens")
    step.touch("token", accessor_id)
    step.touch("token-secret", secret_hash)


def token(store: Store, accessor_id: str = "", secret_hash: str = "") -> Answer:
    """A token by accessor id or by the hash of its secret, or None."""
    if accessor_id:
        return answer(store, store.tokens.rows.get(accessor_id), ("token", accessor_id))
    return answer(store, store.tokens.by_secret_hash.get(secret_hash), ("token-secret", secret_hash))


def tokens(store: Store) -> Answer:
    """All tokens by accessor id."""
    rows = store.tokens.rows
    return answer(store, [rows[id] for id in sorted(rows)], ("tokens",))
