"""Leaf certificates of this node's services: keys are made here and never leave it but to a sidecar on this host.

A leaf is renewed at two thirds of its lifetime (with jitter, so that a fleet does not renew at once) and when the
active root changes. While the authority is away the old leaf is served on. Kept in the agent's directory, 0600.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec

from node.agent.files import file_name, write_private
from node.agent.views import View, Views
from node.backend import Backend
from node.errors import Busy, NodeError, Refused
from node.tasks import Tasks
from raftstate.model.connect import CARoots, Leaf
from raftstate.model.identity import SpiffeId

log = logging.getLogger("lictor.agent.leaf")

RENEW_AT = 2 / 3
RENEW_JITTER = 0.05
"""Share of the lifetime by which the moment of renewal is spread."""
ROTATION_SPREAD_S = 2.0
"""After a change of root a node's leaves are renewed over this time."""
RETRY_MIN_S, RETRY_MAX_S = 1.0, 30.0
ROOTS_WAIT_S = 5.0
ENTRIES_MAX = 4096
"""Each costs a key, a signature of the authority and a renewal."""
IDLE_S = 3 * 24 * 3600.0
"""A leaf that nobody has asked for so long is no longer renewed."""

Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The wall clock."""
    return datetime.datetime.now(datetime.UTC)


class LeafEntry:
    """One leaf, current: changed only by its own task."""

    def __init__(self, service: str, instance: str) -> None:
        self.service, self.instance = service, instance
        self.leaf: Leaf | None = None
        self.error: NodeError | None = None
        """Why there is no leaf (yet), or why it could not be renewed."""
        self.holders = 0
        self.used_at = 0.0
        """Loop time of the last question for it."""
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after each change; return how to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def tell(self) -> None:
        """Wake whoever waits."""
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in tuple(self._listeners):
            listener()

    async def wait(self, min_index: int, timeout_s: float) -> Leaf:
        """Return the leaf once its index exceeds ``min_index``, or the one there is when the time has passed.

        Raises :class:`node.errors.NodeError` when there is none.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.leaf is None or self.leaf.modify_index <= min_index:
            if self.leaf is None and isinstance(self.error, Refused):
                raise self.error
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        if self.leaf is None:
            raise self.error or NodeError("no leaf certificate yet: No cluster leader; retry in a moment")
        return self.leaf


class LeafManager:
    """All leaves of this node, by (service, instance); the instance is empty for the API's leaf of a service."""

    def __init__(
        self,
        backend: Backend,
        views: Views,
        directory: Path,
        *,
        datacenter: str = "dc1",
        clock: Clock = utc_now,
        rng: random.Random | None = None,
        rotation_spread_s: float = ROTATION_SPREAD_S,
    ) -> None:
        self._backend, self._views, self._directory = backend, views, directory
        self._datacenter = datacenter
        self._clock, self._rng, self._rotation_spread_s = clock, rng or random.Random(), rotation_spread_s
        self._entries: dict[tuple[str, str], LeafEntry] = {}
        self._wakes: dict[tuple[str, str], asyncio.Event] = {}
        self._roots: View | None = None
        self._tasks = Tasks("leaves")

    async def start(self) -> None:
        """Follow the roots."""
        self._roots = self._views.acquire("connect.roots")
        self._roots.listen(self._roots_changed)

    async def stop(self) -> None:
        """Renew nothing more."""
        await self._tasks.close()
        if self._roots is not None:
            self._views.release(self._roots)

    def roots(self) -> CARoots | None:
        """Return the trust bundle, None while it is not known."""
        if self._roots is None or not self._roots.known:
            return None
        found = self._roots.typed(CARoots)
        return found[0] if found else None

    @property
    def roots_view(self) -> View:
        """The view of the trust bundle."""
        if self._roots is None:
            raise NodeError("the agent has not started")
        return self._roots

    def entry(self, service: str, instance: str = "") -> LeafEntry:
        """Return the leaf's entry; it is obtained and kept current from now on."""
        key = (service, instance)
        found = self._entries.get(key)
        if found is None:
            if len(self._entries) >= ENTRIES_MAX:
                raise Busy(f"this agent keeps {ENTRIES_MAX} leaf certificates already: ask for fewer services here")
            found = self._entries[key] = LeafEntry(service, instance)
            self._wakes[key] = asyncio.Event()
            self._tasks.spawn(self._keep(found))
        found.used_at = asyncio.get_running_loop().time()
        return found

    def _roots_changed(self) -> None:
        for wake in self._wakes.values():
            wake.set()

    def _idle(self, entry: LeafEntry) -> bool:
        return not entry.holders and asyncio.get_running_loop().time() - entry.used_at > IDLE_S

    async def _keep(self, entry: LeafEntry) -> None:
        """Obtain the leaf and renew it, until nobody wants it any more."""
        key = (entry.service, entry.instance)
        wake, pause_s = self._wakes[key], RETRY_MIN_S
        saved = await asyncio.to_thread(self._load, key)
        if saved is not None and self._fits(saved):
            entry.leaf = saved
            entry.tell()
        while True:
            wake.clear()
            if self._idle(entry):
                del self._entries[key], self._wakes[key]
                return
            if entry.leaf is None or not self._fits(entry.leaf) or self._renew_in_s(entry.leaf) <= 0:
                try:
                    await self._renew(entry)
                    pause_s = RETRY_MIN_S
                except NodeError as error:
                    entry.error = error
                    entry.tell()
                    log.warning("no new leaf for %s %s: %s", entry.service, entry.instance, error)
                    delay_s = pause_s * self._rng.uniform(0.5, 1.0)
                    pause_s = min(pause_s * 2, RETRY_MAX_S)
                    await _wait_for(wake, delay_s)
                    continue
            leaf = entry.leaf
            assert leaf is not None
            await _wait_for(wake, max(self._renew_in_s(leaf), 0.5))
            if not self._fits(leaf):
                await asyncio.sleep(self._rng.uniform(0.0, self._rotation_spread_s))

    async def _renew(self, entry: LeafEntry) -> None:
        trust_domain = await self._trust_domain()
        wanted = SpiffeId(trust_domain=trust_domain, service=entry.service, datacenter=self._datacenter)
        keys = await asyncio.to_thread(_keys)
        key, csr = await asyncio.to_thread(keys.make_request, wanted, entry.instance)
        chain = await self._backend.sign_leaf(csr, service=entry.service, instance=entry.instance)
        before = entry.leaf.modify_index if entry.leaf is not None else 0
        index = max(before + 1, self._roots.index if self._roots is not None else 1)
        leaf = keys.make_leaf(entry.service, chain, key, index, entry.leaf.create_index if entry.leaf else index)
        path = self._directory / file_name(f"{entry.service}\0{entry.instance}")
        try:
            await asyncio.to_thread(write_private, path, msgspec.json.encode((entry.service, entry.instance, leaf)))
        except OSError as error:
            # It is saved for the next start only; a full disk must not let identities expire.
            log.warning("the leaf of %s %s cannot be saved: %s", entry.service, entry.instance, error)
        entry.leaf, entry.error = leaf, None
        entry.tell()

    async def _trust_domain(self) -> str:
        await self.roots_view.ready(ROOTS_WAIT_S)
        roots = self.roots()
        if roots is None or not roots.trust_domain:
            raise NodeError("No cluster leader: the trust domain is not known here yet; retry in a moment")
        return roots.trust_domain

    def _load(self, key: tuple[str, str]) -> Leaf | None:
        _keys()  # here, in a thread: the loop is not to wait for it
        path = self._directory / file_name("\0".join(key))
        try:
            service, instance, leaf = msgspec.json.decode(path.read_bytes(), type=tuple[str, str, Leaf])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the saved leaf of %s %s cannot be used, a new one is made: %s", *key, error)
            return None
        return leaf if (service, instance) == key else None

    def _fits(self, leaf: Leaf) -> bool:
        """Whether the leaf is in force and, as far as the roots are known, of the active root."""
        if self._clock() >= _time(leaf.valid_before):
            return False
        roots = self.roots()
        active = next((root for root in roots.roots if root.active), None) if roots is not None else None
        return active is None or _keys().signed_by(leaf.cert_pem, active.root_cert, active.intermediate_certs)

    def _renew_in_s(self, leaf: Leaf) -> float:
        begin, end = _time(leaf.valid_after), _time(leaf.valid_before)
        life_s = (end - begin).total_seconds()
        # The jitter belongs to the leaf, not to the moment of asking: derived from its serial number.
        share = random.Random(leaf.serial_number).uniform(-RENEW_JITTER, RENEW_JITTER)
        due = begin + datetime.timedelta(seconds=life_s * (RENEW_AT + share))
        return (due - self._clock()).total_seconds()


def _keys() -> ModuleType:
    """Return what makes and reads certificates; it is loaded with the first leaf."""
    return importlib.import_module("node.agent.leaf_keys")


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
