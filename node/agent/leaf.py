"""Leaf certificates of this node's services: keys are made here and never leave it but to a sidecar on this host.

A leaf is renewed at two thirds of its lifetime (with jitter, so that a fleet does not renew at once) and when the
active root changes. While the authority is away the old leaf is served on. Kept in the agent's directory, 0600.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

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
        key, csr = await asyncio.to_thread(make_request, wanted, entry.instance)
        chain = await self._backend.sign_leaf(csr, service=entry.service, instance=entry.instance)
        before = entry.leaf.modify_index if entry.leaf is not None else 0
        index = max(before + 1, self._roots.index if self._roots is not None else 1)
        leaf = make_leaf(entry.service, chain, key, index, entry.leaf.create_index if entry.leaf else index)
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
        return active is None or signed_by(leaf.cert_pem, active.root_cert, active.intermediate_certs)

    def _renew_in_s(self, leaf: Leaf) -> float:
        begin, end = _time(leaf.valid_after), _time(leaf.valid_before)
        life_s = (end - begin).total_seconds()
        # The jitter belongs to the leaf, not to the moment of asking: derived from its serial number.
        share = random.Random(leaf.serial_number).uniform(-RENEW_JITTER, RENEW_JITTER)
        due = begin + datetime.timedelta(seconds=life_s * (RENEW_AT + share))
        return (due - self._clock()).total_seconds()


def make_request(wanted: SpiffeId, instance: str) -> tuple[str, str]:
    """Make a P-256 key and a signing request for it; returns both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = [x509.NameAttribute(NameOID.COMMON_NAME, wanted.service[:64])]
    if instance:
        name.append(x509.NameAttribute(NameOID.USER_ID, instance))
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(name))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(wanted.uri())]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), request.public_bytes(pem).decode()


def make_leaf(service: str, chain_pem: str, key_pem: str, index: int, create_index: int) -> Leaf:
    """Return the leaf that a signed chain and its key make. Raises NodeError when the chain is not one."""
    try:
        certificate = x509.load_pem_x509_certificates(chain_pem.encode())[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
    except (ValueError, IndexError, x509.ExtensionNotFound) as error:
        raise NodeError(f"the certificate authority answered with something that is no leaf: {error}") from error
    serial = f"{certificate.serial_number:x}"
    serial = serial if len(serial) % 2 == 0 else "0" + serial
    return Leaf(
        serial_number=":".join(serial[i : i + 2] for i in range(0, len(serial), 2)),
        cert_pem=chain_pem,
        private_key_pem=key_pem,
        service=service,
        service_uri=uri,
        valid_after=_text(certificate.not_valid_before_utc),
        valid_before=_text(certificate.not_valid_after_utc),
        create_index=create_index,
        modify_index=index,
    )


def signed_by(leaf_pem: str, root_pem: str, intermediates: tuple[str, ...] = ()) -> bool:
    """Whether the leaf's issuer is this root or one of its intermediates (by name and signature)."""
    try:
        leaf = x509.load_pem_x509_certificates(leaf_pem.encode())[0]
    except (ValueError, IndexError):
        return False
    for pem in (root_pem, *intermediates):
        try:
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(pem.encode()))
        except (InvalidSignature, ValueError, TypeError):
            continue
        return True
    return False


def _text(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
