"""Transactions: up to 64 operations, all or none. Source of verbs and texts: Consul's ``/v1/txn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from raftstate.model.kv import KVEntry
from raftstate.state import catalog, kv
from raftstate.state.commands import (
    KVCas,
    KVDelete,
    KVDeleteTree,
    KVLock,
    KVSet,
    KVUnlock,
    Txn,
    TxnCheck,
    TxnKV,
    TxnNode,
    TxnOp,
    TxnService,
)
from raftstate.state.refusal import INVALID, TOO_LARGE, Refused
from raftstate.state.step import Step, plain
from raftstate.state.table import undo

OPERATIONS_MAX = 64

Results = list[dict[str, Any]]


class _Failed(Exception):
    """An operation's condition does not hold."""


def txn(step: Step, command: Txn) -> dict[str, Any]:
    """Run the operations in order; when any fails, none has happened and every failure is told."""
    if len(command.ops) > OPERATIONS_MAX:
        raise Refused(
            TOO_LARGE, f"Transaction contains too many operations ({len(command.ops)} > {OPERATIONS_MAX}): split it"
        )
    results: Results = []
    errors: list[dict[str, Any]] = []
    for number, op in enumerate(command.ops):
        try:
            results.extend(_run(step, op))
        except Refused as refused:
            errors.append({"OpIndex": number, "What": refused.refusal.message})
        except _Failed as failed:
            errors.append({"OpIndex": number, "What": str(failed)})
    if errors:
        undo(step.store.journal)
        step.forget()
        return {"Results": None, "Errors": errors}
    return {"Results": results, "Errors": None}


def _run(step: Step, op: TxnOp) -> Results:
    match op:
        case TxnKV():
            return _run_kv(step, op)
        case TxnNode():
            return _run_node(step, op)
        case TxnService():
            return _run_service(step, op)
        case TxnCheck():
            return _run_check(step, op)


def _run_kv(step: Step, op: TxnKV) -> Results:
    rows, key = step.store.kv.rows, op.key
    entry = rows.get(key)
    match op.verb:
        case "set":
            kv.kv_set(step, KVSet(key, op.value, op.flags))
        case "cas":
            if not kv.kv_cas(step, KVCas(key, op.value, op.index, op.flags)):
                raise _Failed(f'failed to set key "{key}", index is stale')
        case "lock":
            if not kv.kv_lock(step, KVLock(key, op.value, op.session, op.flags)):
                raise _Failed(f'failed to lock key "{key}", lock is already held')
        case "unlock":
            if not kv.kv_unlock(step, KVUnlock(key, op.value, op.session, op.flags)):
                raise _Failed(f'failed to unlock key "{key}", lock isn\'t held, or is held by another session')
        case "delete":
            kv.kv_delete(step, KVDelete(key))
            return []
        case "delete-cas":
            if not kv.kv_delete(step, KVDelete(key, op.index)):
                raise _Failed(f'failed to delete key "{key}", index is stale')
            return []
        case "delete-tree":
            kv.kv_delete_tree(step, KVDeleteTree(key))
            return []
        case "get":
            return [_kv_result(_existing(entry, key), with_value=True)]
        case "get-or-empty":
            return [_kv_result(entry or KVEntry(0, key, 0, None), with_value=True)]
        case "get-tree":
            return [_kv_result(rows[found], with_value=True) for found in step.store.kv.order.with_prefix(key)]
        case "check-session":
            if _existing(entry, key).session != op.session:
                raise _Failed(f'failed session check for key "{key}", current session is not "{op.session}"')
        case "check-index":
            if _existing(entry, key).modify_index != op.index:
                raise _Failed(f'failed index check for key "{key}", current modify index is not {op.index}')
        case "check-not-exists":
            if entry is not None:
                raise _Failed(f'key "{key}" exists')
            return []
        case _:
            raise Refused(INVALID, f'unknown KV verb "{op.verb}"')
    return [_kv_result(rows[key], with_value=False)]


def _existing(entry: KVEntry | None, key: str) -> KVEntry:
    if entry is None:
        raise _Failed(f'key "{key}" doesn\'t exist')
    return entry


def _kv_result(entry: KVEntry, *, with_value: bool) -> dict[str, Any]:
    shown = entry if with_value else msgspec.structs.replace(entry, value=None)
    return {"KV": plain(shown)}


def _run_node(step: Step, op: TxnNode) -> Results:
    rows, name = step.store.nodes.rows, op.node.node
    if not name and op.node.id:
        name = step.store.nodes.name_by_id.get(op.node.id, "")

    def remove() -> None:
        catalog.remove_node(step, name)

    return _run_row(
        "Node", f'node "{name}"', op.verb, op.index, lambda: rows.get(name),
        lambda: catalog.put_node(step, op.node), remove,
    )  # fmt: skip


def _run_service(step: Step, op: TxnService) -> Results:
    rows = step.store.services.rows
    key = (op.service.node, op.service.id or op.service.service)
    return _run_row(
        "Service", f'service "{key[1]}" on node "{key[0]}"', op.verb, op.index, lambda: rows.get(key),
        lambda: catalog.put_service(step, op.service), lambda: catalog.remove_service(step, rows[key]),
    )  # fmt: skip


def _run_check(step: Step, op: TxnCheck) -> Results:
    rows, key = step.store.checks.rows, (op.check.node, op.check.check_id)
    return _run_row(
        "Check", f'check "{key[1]}" on node "{key[0]}"', op.verb, op.index, lambda: rows.get(key),
        lambda: catalog.put_check(step, op.check), lambda: catalog.remove_check(step, rows[key]),
    )  # fmt: skip


def _run_row(
    kind: str,
    what: str,
    verb: str,
    index: int,
    current: Callable[[], Any],
    put: Callable[[], None],
    remove: Callable[[], None],
) -> Results:
    row = current()
    match verb:
        case "get":
            if row is None:
                raise _Failed(f"{what} doesn't exist")
        case "set":
            put()
        case "cas":
            if (row.modify_index if row is not None else 0) != index:
                raise _Failed(f"failed to set {what}, index is stale")
            put()
        case "delete" | "delete-cas":
            if verb == "delete-cas" and row is not None and row.modify_index != index:
                raise _Failed(f"failed to delete {what}, index is stale")
            if row is not None:
                remove()
            return []
        case _:
            raise Refused(INVALID, f'unknown {kind} verb "{verb}"')
    return [{kind: plain(current())}]
