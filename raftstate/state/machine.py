"""The state machine: commands in, outcomes out. Pure, so that the same log gives the same state everywhere."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import msgspec

from raftstate.state import acl, autopilot, catalog, config_entries, connect, intentions, kv, sessions
from raftstate.state import commands as c
from raftstate.state.changes import WatchKey, reap
from raftstate.state.digest import digest_of
from raftstate.state.policy_tables import Request
from raftstate.state.refusal import INTERNAL, INVALID, MALFORMED, REUSED, Refusal, Refused
from raftstate.state.snapshot import Restorer, Snapshot
from raftstate.state.step import Step
from raftstate.state.store import Store
from raftstate.state.table import undo
from raftstate.state.txn import txn

REQUESTS_MAX = 131_072
REQUESTS_KEPT = 4_096
"""The newest ones, which no age makes forgotten: a leader's wrong clock must not double a retry."""
REQUEST_WEIGHT_MAX = 64 * 1024 * 1024
REQUEST_AGE_US_MAX = 10 * 60 * 1_000_000
_SWEEP_EVERY = 1_024
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


class Applied(msgspec.Struct, frozen=True):
    """A command's outcome: a value, or a refusal that had no effect."""

    index: int
    """The command's index; for a retry, the first attempt's."""
    value: Any
    """Builtins only; see each command."""
    refusal: Refusal | None
    touched: frozenset[WatchKey]
    """What to wake; empty when nothing changed."""


_NOTHING: frozenset[WatchKey] = frozenset()
_REUSED = (
    "the request id %r was used for another command, which was answered at index %d, so this one was not done: "
    "use a new id for each write, and repeat one only with the same content"
)


def _forget_requests(step: Step, command: c.ForgetRequests) -> int:
    before = parse_time_us(command.before)
    if before is None:
        raise Refused(INVALID, f"'before' is not an RFC 3339 time with an offset: {command.before[:80]!r}")
    old = [request.request_id for request in step.store.requests.rows.values() if request.at_us < before]
    for request_id in old:
        step.store.requests.remove(request_id)
    return len(old)


HANDLERS: dict[type, Callable[[Step, Any], Any]] = {
    c.RegisterNode: catalog.register_node,
    c.RegisterService: catalog.register_service,
    c.RegisterCheck: catalog.register_check,
    c.CatalogRegister: catalog.catalog_register,
    c.DeregisterNode: catalog.deregister_node,
    c.DeregisterService: catalog.deregister_service,
    c.DeregisterCheck: catalog.deregister_check,
    c.UpsertIntention: intentions.upsert,
    c.DeleteIntention: intentions.delete,
    c.SetCAConfig: connect.set_ca_config,
    c.SetAutopilot: autopilot.put,
    c.AddCARoot: connect.add_ca_root,
    c.RetireCARoot: connect.retire_ca_root,
    c.Revoke: connect.revoke,
    c.Restore: connect.restore,
    c.KVSet: kv.kv_set,
    c.KVDelete: kv.kv_delete,
    c.KVDeleteTree: kv.kv_delete_tree,
    c.KVCas: kv.kv_cas,
    c.KVLock: kv.kv_lock,
    c.KVUnlock: kv.kv_unlock,
    c.SessionCreate: sessions.create,
    c.SessionDestroy: sessions.destroy,
    c.SessionRenew: sessions.renew,
    c.Txn: txn,
    c.SetConfigEntry: config_entries.put,
    c.DeleteConfigEntry: config_entries.delete,
    c.UpsertToken: acl.upsert,
    c.DeleteToken: acl.delete,
    c.BootstrapACL: acl.bootstrap,
    c.UpsertPolicy: acl.upsert_policy,
    c.DeletePolicy: acl.delete_policy,
    c.UpsertRole: acl.upsert_role,
    c.DeleteRole: acl.delete_role,
    c.ForgetRequests: _forget_requests,
}


class StateMachine:
    """Applies the log in order. Its store is read by anyone and changed only here."""

    def __init__(self) -> None:
        self._last_at: tuple[str, int | None] = ("", None)
        self.store = Store()
        """Take it anew for each query: a restore puts another in its place, and never changes one in use."""

    def apply(self, index: int, data: bytes) -> Applied:
        """Apply the command at a log index; indexes grow. Never raises for any ``data``.

        Raises ValueError when the index does not grow: the log would be applied twice. Rows and `Applied` get the
        log index plus `offset`.
        """
        store = self.store
        index += store.offset
        if index <= store.index:
            raise ValueError(
                f"log index {index} is not above {store.index}, which is applied: this must not be repeated"
            )
        store.index = index
        store.journal.clear()
        try:
            envelope = c.decode_envelope(data)
        except c.MalformedCommand as error:
            return Applied(index, None, Refusal(MALFORMED, str(error)), _NOTHING)
        at_us = self._time_us(envelope.at)
        if at_us is not None and at_us > store.clock_us:
            store.clock_us = at_us
        request_id = envelope.request_id
        fingerprint = b""
        if request_id:
            fingerprint = c.fingerprint(data, envelope)
            if (known := store.requests.rows.get(request_id)) is not None:
                if known.fingerprint and known.fingerprint != fingerprint:
                    return Applied(index, None, Refusal(REUSED, _REUSED % (request_id[:128], known.index)), _NOTHING)
                return Applied(known.index, known.value, known.refusal, _NOTHING)
        step = Step(store, index, envelope.at)
        value, refusal = self._run(step, envelope.command)
        if request_id:
            store.requests.put(request_id, Request(request_id, index, store.clock_us, value, refusal, fingerprint))
        touched = step.settle()
        self._sweep(index)
        store.journal.clear()
        return Applied(index, value, refusal, touched)

    def _time_us(self, at: str) -> int | None:
        """Parse a proposal's time; those of one moment have the same."""
        if at != self._last_at[0]:
            self._last_at = at, parse_time_us(at)
        return self._last_at[1]

    @staticmethod
    def _run(step: Step, command: Any) -> tuple[Any, Refusal | None]:
        try:
            return HANDLERS[type(command)](step, command), None
        except Refused as refused:
            refusal = refused.refusal
        except (MemoryError, RecursionError):
            raise  # one replica's trouble: it must stop rather than differ from the others
        except Exception as error:  # noqa: BLE001 a bug met by one command must not stop every server for good
            refusal = Refusal(
                INTERNAL, f"the state machine failed at {type(command).__name__}: {error!r}; report this"
            )
        undo(step.store.journal)
        step.forget()
        return None, refusal

    def _sweep(self, index: int) -> None:
        """Keep what is remembered within bounds. By content and index only, so that replicas agree."""
        store = self.store
        if len(store.changes.buried):
            reap(store.changes, store.floors)
        store.kv_tombstones.reap(store.floors)
        requests = store.requests
        count = len(requests.rows)
        surplus = 0
        if count > REQUESTS_MAX:
            surplus = REQUESTS_MAX // 32
        elif requests.weight > REQUEST_WEIGHT_MAX:
            surplus = requests.surplus_weight(REQUEST_WEIGHT_MAX)
        elif index % _SWEEP_EVERY == 0 and count > REQUESTS_KEPT:
            oldest = store.clock_us - REQUEST_AGE_US_MAX
            for request in islice(requests.rows.values(), count - REQUESTS_KEPT):
                if request.at_us >= oldest:
                    break
                surplus += 1
        if surplus:
            for request_id in list(islice(requests.rows, surplus)):
                requests.remove(request_id)

    def snapshot(self) -> Snapshot:
        """Open a snapshot of the state as it is now. Costs nothing yet; close it when done."""
        return Snapshot(self.store)

    @property
    def offset(self) -> int:
        """What is added to log indexes to make the state's; it never falls."""
        return self.store.offset

    def restorer(self) -> Restorer:
        """Begin to read a snapshot in slices; the state changes when it is finished."""
        return Restorer(self._install)

    def _install(self, fresh: Store, at: int | None) -> Store:
        replaced = self.store
        if at is not None:
            # A backup, perhaps of a log that was further than ours: its rows keep their indexes.
            fresh.offset = max(replaced.offset, fresh.index - at)
        self.store = fresh
        return replaced

    def restore(self, chunks: Iterable[bytes]) -> None:
        """Replace the state by a snapshot, in any thread while nothing is applied. Wake every watcher after this.

        Raises SnapshotDamaged, and then nothing has changed.
        """
        restorer = self.restorer()
        for chunk in chunks:
            restorer.feed(chunk)
        restorer.finish()

    def digest(self) -> str:
        """Return the state's fingerprint; equal states have equal ones."""
        return digest_of(self.store)


def parse_time_us(text: str) -> int | None:
    """Return microseconds since the epoch of an RFC 3339 time with an offset; None when it is none."""
    try:
        moment = datetime.datetime.fromisoformat(text)
        return None if moment.tzinfo is None else (moment - _EPOCH) // _MICROSECOND
    except (ValueError, OverflowError):
        return None
