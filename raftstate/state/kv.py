"""Key/value commands and queries. Source of the rules: Consul's ``/v1/kv`` and session documentation."""

from __future__ import annotations

import msgspec

from raftstate.model.kv import KVEntry
from raftstate.state.answer import Answer
from raftstate.state.commands import KVCas, KVDelete, KVDeleteTree, KVLock, KVSet, KVUnlock
from raftstate.state.refusal import INVALID, TOO_LARGE, UNKNOWN_SESSION, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

KEY_MAX = 2048
"""Characters of a key."""
VALUE_MAX = 512 * 1024
"""Bytes of a value; Consul's bound."""


def kv_set(step: Step, command: KVSet) -> bool:
    """Set a key; a lock on it stays."""
    old = step.store.kv.rows.get(command.key)
    _write(step, command.key, command.value, command.flags, old, old.session if old else msgspec.UNSET)
    return True


def kv_cas(step: Step, command: KVCas) -> bool:
    """Set a key if its ModifyIndex is as expected."""
    old = step.store.kv.rows.get(command.key)
    if (old.modify_index if old else 0) != command.index:
        return False
    _write(step, command.key, command.value, command.flags, old, old.session if old else msgspec.UNSET)
    return True


def kv_lock(step: Step, command: KVLock) -> bool:
    """Set a key and lock it; the holder may lock again, which changes no LockIndex."""
    store = step.store
    if command.session not in store.sessions.rows:
        raise Refused(UNKNOWN_SESSION, f'invalid session "{command.session}": create one and use its id')
    old = store.kv.rows.get(command.key)
    if old is not None and old.session is not msgspec.UNSET:
        if old.session != command.session:
            return False
        _write(step, command.key, command.value, command.flags, old, old.session)
        return True
    until = store.lock_delays.rows.get(command.key)
    if until is not None:
        if store.clock_us < until:
            return False
        store.lock_delays.remove(command.key)
    _write(step, command.key, command.value, command.flags, old, command.session, acquired=True)
    return True


def kv_unlock(step: Step, command: KVUnlock) -> bool:
    """Set a key and give up its lock, if the session holds it."""
    if not command.session:
        raise Refused(UNKNOWN_SESSION, 'invalid session "": name the session that holds the lock')
    old = step.store.kv.rows.get(command.key)
    if old is None or old.session != command.session:
        return False
    _write(step, command.key, command.value, command.flags, old, msgspec.UNSET)
    return True


def kv_delete(step: Step, command: KVDelete) -> bool:
    """Delete a key, with ``cas_index`` only in that version; a key that is gone is deleted, as in Consul."""
    old = step.store.kv.rows.get(command.key)
    if old is None:
        return True
    if command.cas_index is not None and old.modify_index != command.cas_index:
        return False
    remove_key(step, command.key)
    return True


def kv_delete_tree(step: Step, command: KVDeleteTree) -> bool:
    """Delete every key with a prefix."""
    for key in list(step.store.kv.order.with_prefix(command.prefix)):
        remove_key(step, key)
    return True


def remove_key(step: Step, key: str) -> None:
    """Remove a key that exists and leave a tombstone."""
    step.store.kv.remove(key)
    step.store.kv_tombstones.put(key, step.index)
    step.touched.add(("kv", key))


def release_key(step: Step, entry: KVEntry) -> None:
    """Take the lock off an entry."""
    row = msgspec.structs.replace(entry, session=msgspec.UNSET, modify_index=step.index)
    step.store.kv.put(entry.key, row)
    step.touched.add(("kv", entry.key))


def _write(
    step: Step,
    key: str,
    value: bytes,
    flags: int,
    old: KVEntry | None,
    session: str | msgspec.UnsetType,
    *,
    acquired: bool = False,
) -> None:
    if not key:
        raise Refused(INVALID, "Missing key name")
    if len(key) > KEY_MAX:
        raise Refused(TOO_LARGE, f"the key is longer than {KEY_MAX} characters: {key[:40]!r}…")
    if len(value) > VALUE_MAX:
        raise Refused(TOO_LARGE, f"Value for key {key!r} is too large ({len(value)} > {VALUE_MAX} bytes)")
    if not 0 <= flags < 1 << 64:
        raise Refused(INVALID, f"flags must be an unsigned 64-bit number, not {flags}")
    index, store = step.index, step.store
    if old is None:
        store.kv.put(key, KVEntry(int(acquired), key, flags, value or None, session, index, index))
        if key in store.kv_tombstones.rows:
            store.kv_tombstones.remove(key)
    else:
        if not acquired and old.value == (value or None) and old.flags == flags and old.session == session:
            return
        lock_index = old.lock_index + acquired
        store.kv.put(key, KVEntry(lock_index, key, flags, value or None, session, old.create_index, index))
    step.touched.add(("kv", key))


def get(store: Store, key: str) -> Answer:
    """One entry, or None."""
    return Answer(max(store.kv_changed_at(key), 1), store.kv.rows.get(key), (("kv", key),))


def list_prefix(store: Store, prefix: str = "") -> Answer:
    """Entries whose key begins with ``prefix``, in key order."""
    rows = store.kv.rows
    found = [rows[key] for key in store.kv.order.with_prefix(prefix)]
    return Answer(_tree_index(store, prefix, found), found, (("kv-prefix", prefix),))


def keys(store: Store, prefix: str = "", separator: str = "") -> Answer:
    """Keys that begin with ``prefix``; with a separator, only up to its first place after the prefix, each once."""
    rows = store.kv.rows
    found = list(store.kv.order.with_prefix(prefix))
    index = _tree_index(store, prefix, [rows[key] for key in found])
    if separator:
        start, width = len(prefix), len(separator)
        cut = ((key, key.find(separator, start)) for key in found)
        found = list(dict.fromkeys(key if at < 0 else key[: at + width] for key, at in cut))
    return Answer(index, found, (("kv-prefix", prefix),))


def _tree_index(store: Store, prefix: str, found: list[KVEntry]) -> int:
    index = max(1, store.floors.rows.get("kv", 0))
    for row in found:
        if row.modify_index > index:
            index = row.modify_index
    dead = store.kv_tombstones
    for key in dead.order.with_prefix(prefix):
        if dead.rows[key] > index:
            index = dead.rows[key]
    return index
