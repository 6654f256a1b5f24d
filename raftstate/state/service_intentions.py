"""``service-intentions`` configuration entries: another form of the intentions on one destination service.

An entry is not stored: writing one replaces the service's intentions, reading one shows them. Names in it are
services (or ``service:instance``), never bare instance ids. Source of the form: Consul's service-intentions entry.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import msgspec

from raftstate.model.intention import WILDCARD, Intention, Permission
from raftstate.model.wire import Wire
from raftstate.state import intentions
from raftstate.state.answer import Answer, answer
from raftstate.state.commands import UpsertIntention
from raftstate.state.names import require_service_name
from raftstate.state.policy_tables import intention_key
from raftstate.state.refusal import INVALID, Refused
from raftstate.state.step import Step, plain
from raftstate.state.store import Store

KIND = "service-intentions"


class _Source(Wire, frozen=True):
    name: str
    action: str = ""
    permissions: tuple[Permission, ...] | None = None
    description: str = ""
    type: str = "consul"
    namespace: str = "default"


class _Entry(Wire, frozen=True):
    sources: tuple[_Source, ...] = ()
    meta: dict[str, str] = {}


def put(step: Step, name: str, entry: dict[str, Any], cas_index: int | None) -> bool:
    """Make the intentions on service ``name`` those of the entry."""
    if cas_index is not None and cas_index != _modify_index(step.store, name):
        return False
    if name != WILDCARD:
        require_service_name(name, f"name of the {KIND} entry")
    try:
        wanted = msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as error:
        raise Refused(INVALID, f"the {KIND} entry of {name!r} is not as it should be: {error}") from error
    kept = set()
    for number, source in enumerate(wanted.sources):
        row = Intention(
            source.name,
            name,
            id=_new_id(step.index, number),
            description=source.description,
            source_ns=source.namespace,
            source_type=source.type,
            action=source.action,
            permissions=source.permissions or (),
            meta=wanted.meta,
        )
        stored = intentions.upsert(step, UpsertIntention(row, resolve=False))
        key = intention_key(step.store.intentions.by_id[stored["ID"]])
        if key in kept:
            raise Refused(INVALID, f"the {KIND} entry of {name!r} names the source {source.name!r} twice")
        kept.add(key)
    for row in _rows(step.store, name):
        if intention_key(row) not in kept:
            intentions.remove(step, row)
    return True


def delete(step: Step, name: str, cas_index: int | None) -> bool:
    """Delete the intentions on service ``name``."""
    if cas_index is not None and cas_index != _modify_index(step.store, name):
        return False
    for row in _rows(step.store, name):
        intentions.remove(step, row)
    return True


def _new_id(index: int, number: int) -> str:
    """Return an id that every replica makes alike: a log index is used once."""
    digest = hashlib.blake2b(f"{KIND}/{index}/{number}".encode(), digest_size=16).digest()
    return str(uuid.UUID(bytes=digest, version=4))


def _rows(store: Store, name: str) -> list[Intention]:
    return intentions.in_order(store.intentions.by_watch.get(("intention-destination", name), {}).values())


def _modify_index(store: Store, name: str) -> int:
    rows = _rows(store, name)
    return store.changed_at(("intention-destination", name)) if rows else 0


def _shown(store: Store, name: str) -> dict[str, Any] | None:
    rows = _rows(store, name)
    if not rows:
        return None
    return {
        "Kind": KIND,
        "Name": name,
        "Sources": [_shown_source(row) for row in rows],
        "Meta": dict(rows[0].meta),
        "CreateIndex": min(row.create_index for row in rows),
        "ModifyIndex": _modify_index(store, name),
    }


def _shown_source(row: Intention) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "Name": f"{row.source_service}:{row.source_name}" if row.source_service else row.source_name,
        "Type": row.source_type,
        "Precedence": row.precedence,
        "Description": row.description,
    }
    if row.permissions:
        shown["Permissions"] = [plain(permission) for permission in row.permissions]
    else:
        shown["Action"] = row.action
    return shown


def get(store: Store, name: str) -> Answer:
    """The intentions on a service as an entry, or None."""
    return answer(store, _shown(store, name), ("intention-destination", name))


def list_all(store: Store) -> Answer:
    """An entry for each destination service."""
    names = sorted({key[3] for key in store.intentions.rows if not key[2]})
    return answer(store, [_shown(store, name) for name in names], ("intentions",))
