"""Sessions: claims on locks that end with their node, their checks, or by command.

Source of the rules: Consul's session documentation. A TTL's end is seen by the leader, which proposes
``SessionDestroy``; here it is only kept.
"""

from __future__ import annotations

from typing import Any

from raftstate.model.catalog import CRITICAL
from raftstate.model.kv import BEHAVIOR_DELETE, BEHAVIOR_RELEASE, Session
from raftstate.state.answer import Answer, answer
from raftstate.state.commands import SessionCreate, SessionDestroy, SessionRenew
from raftstate.state.kv import release_key, remove_key
from raftstate.state.kv_tables import check_ids
from raftstate.state.names import require_name, require_text
from raftstate.state.refusal import CHECK_FAILS, CONFLICT, INVALID, UNKNOWN_NODE, Refused
from raftstate.state.step import Step, plain
from raftstate.state.store import Store

LOCK_DELAY_NS_MAX = 60_000_000_000
"""Consul's bound."""
CHECKS_MAX = 128


def create(step: Step, command: SessionCreate) -> str:
    """Create a session."""
    session, store = command.session, step.store
    require_name(session.id, "session id")
    require_text(session.name, "session name")
    if session.id in store.sessions.rows:
        raise Refused(CONFLICT, f"session {session.id!r} exists already: make a new id")
    if session.node not in store.nodes.rows:
        raise Refused(UNKNOWN_NODE, f"Missing node registration of {session.node!r}: register the node first")
    if session.behavior not in (BEHAVIOR_RELEASE, BEHAVIOR_DELETE):
        raise Refused(INVALID, f"Invalid Behavior setting '{session.behavior}': use release or delete")
    if not 0 <= session.lock_delay <= LOCK_DELAY_NS_MAX:
        raise Refused(INVALID, f"Invalid LockDelay {session.lock_delay} ns: it must be between 0 and 60s")
    needed = check_ids(session)
    if len(needed) > CHECKS_MAX:
        raise Refused(INVALID, f"a session may depend on {CHECKS_MAX} checks at most, not {len(needed)}")
    for check_id in needed:
        check = store.checks.rows.get((session.node, check_id))
        if check is None:
            raise Refused(CHECK_FAILS, f"Missing check '{check_id}' registration on node {session.node!r}")
        if check.status == CRITICAL:
            raise Refused(CHECK_FAILS, f"Check '{check_id}' is in critical state")
    row = step.stamp(session, None)
    assert row is not None
    store.sessions.put(row.id, row)
    step.touch("session", row.id)
    step.touch("sessions")
    step.touch("node-sessions", row.node)
    return row.id


def destroy(step: Step, command: SessionDestroy) -> bool:
    """End a session; ending one that is gone is fine."""
    session = step.store.sessions.rows.get(command.id)
    if session is not None:
        end(step, session)
    return True


def renew(step: Step, command: SessionRenew) -> Any:
    """Return the session, if it is there; the leader that proposed this starts the TTL anew."""
    session = step.store.sessions.rows.get(command.id)
    return None if session is None else plain(session)


def end(step: Step, session: Session) -> None:
    """Remove a session and release or delete what it holds."""
    store = step.store
    store.sessions.remove(session.id)
    step.bury("session", session.id)
    step.touch("sessions")
    if session.node in store.sessions.by_node:
        step.touch("node-sessions", session.node)
    else:
        step.bury("node-sessions", session.node)
    held = sorted(store.kv.by_session.get(session.id, ()))
    for key in held:
        if session.behavior == BEHAVIOR_DELETE:
            remove_key(step, key)
        else:
            release_key(step, store.kv.rows[key])
    if session.lock_delay > 0 and held:
        if step.index % 64 == 0:
            _drop_past_delays(store)
        until = store.clock_us + session.lock_delay // 1000
        for key in held:
            store.lock_delays.put(key, until)


def end_by_check(step: Step, node: str, check_id: str) -> None:
    """End the sessions that depend on a check which failed or went away."""
    for session_id in sorted(step.store.sessions.by_check.get((node, check_id), ())):
        if (session := step.store.sessions.rows.get(session_id)) is not None:
            end(step, session)


def end_by_node(step: Step, node: str) -> None:
    """End the sessions of a node that went away."""
    for session_id in sorted(step.store.sessions.by_node.get(node, ())):
        end(step, step.store.sessions.rows[session_id])


def _drop_past_delays(store: Store) -> None:
    delays = store.lock_delays
    for key in [key for key, until in delays.rows.items() if until <= store.clock_us]:
        delays.remove(key)


def info(store: Store, id: str) -> Answer:
    """The session in a list of one; an empty list when there is none."""
    row = store.sessions.rows.get(id)
    return answer(store, [] if row is None else [row], ("session", id))


def list_all(store: Store) -> Answer:
    """All sessions by id."""
    rows = store.sessions.rows
    return answer(store, [rows[id] for id in sorted(rows)], ("sessions",))


def list_node(store: Store, node: str) -> Answer:
    """A node's sessions by id."""
    rows = store.sessions.by_node.get(node, {})
    return answer(store, [rows[id] for id in sorted(rows)], ("node-sessions", node))
