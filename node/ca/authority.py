"""The authority on the leader: makes the first root, signs leaves, rotates roots and retires old ones.

It keeps no state of its own but the opened key of the active root; everything else is in the replicated state, and
concurrent leaders (one of them deposed) are kept apart by compare-and-set on the active root.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cryptography import x509

from node.backend import Applied
from node.ca.policy import LeafRefused, LeafRequest, bounded_ttl_s, judge, parse_csr
from node.ca.sealing import seal, unseal
from node.ca.signing import Signer, cross_sign, key_pem, make_root, new_key, rfc3339, sign_leaf
from node.durations import format_duration, parse_duration_s
from node.errors import NodeError, NoLeader, Refused
from raftstate.model.catalog import CatalogNode, ServiceInstance
from raftstate.model.connect import CAConfig, CARoot, CARoots, Revocation, SigningMaterial
from raftstate.state.commands import AddCARoot, Command, RetireCARoot, SetCAConfig
from raftstate.state.connect import active_root
from raftstate.state.store import Store

log = logging.getLogger("lictor.ca")

RETIRE_MARGIN_S = 3600.0
"""An old root stays this much longer than the longest leaf it may have signed."""


class Apply(Protocol):
    """`Backend.apply`, as much of it as is used here."""

    async def __call__(self, command: Command, *, request_id: str | None = None) -> Applied:
        """Write through the leader."""


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Authority:
    """Connect's CA. `ask(name, params)` reads this server's state, `apply` writes through the leader."""

    def __init__(
        self,
        *,
        datacenter: str,
        trust_domain: str,
        cluster_key: bytes,
        leaf_ttl_s: float,
        ask: Callable[[str, Mapping[str, Any]], Any],
        instance_of: Callable[[str, str], ServiceInstance | None],
        apply: Apply,
        now: Callable[[], datetime.datetime] = _utc_now,
    ) -> None:
        self._datacenter, self._trust_domain, self._leaf_ttl_s = datacenter, trust_domain, leaf_ttl_s
        self._cluster_key = cluster_key
        self._ask, self._instance_of, self._apply, self._now = ask, instance_of, apply, now
        self._signer: Signer | None = None
        self._changing = asyncio.Lock()

    # -- what is stored --------------------------------------------------------------------------------------------

    def _config(self) -> CAConfig | None:
        config: CAConfig | None = self._ask("connect.ca_config", {}).value
        return config if config is not None and config.trust_domain else None

    def _roots(self) -> CARoots:
        roots: CARoots = self._ask("connect.roots", {}).value
        return roots

    def leaf_ttl_s(self) -> float:
        """Return the lifetime of a leaf: the stored configuration's, else the file's."""
        config = self._config()
        text = config.config.get("LeafCertTTL") if config is not None else None
        try:
            return bounded_ttl_s(parse_duration_s(text)) if text else self._leaf_ttl_s
        except ValueError:
            return self._leaf_ttl_s

    def _active_signer(self) -> Signer:
        active = next((root for root in self._roots().roots if root.active), None)
        if active is None:
            raise NoLeader("the certificate authority has no root yet: try again in a moment")
        if self._signer is None or self._signer.root != active:
            material: SigningMaterial = self._ask("internal.ca_signing_material", {}).value
            self._signer = Signer.load(active, unseal(material.sealed_key, self._cluster_key, active.id))
        return self._signer

    def check_usable(self, store: Store) -> None:
        """Raise SealError if the authority of a state could sign nothing here: its key is under another cluster key.

        There would be no way out of that but the other key: a rotation is cross-signed by the key before.
        """
        root = active_root(store)
        if root is not None and (sealed := store.sealed_keys.rows.get(root.id)) is not None:
            unseal(sealed, self._cluster_key, root.id)

    # -- roots -----------------------------------------------------------------------------------------------------

    async def ensure_root(self) -> None:
        """Make trust domain and first root if there are none. Call it on every change to leadership."""
        async with self._changing:
            if self._config() is None:
                domain = self._trust_domain or f"{uuid.uuid4()}.consul"
                config = {
                    "LeafCertTTL": format_duration(self._leaf_ttl_s),
                    "RootCertTTL": "87600h0m0s",
                    "IntermediateCertTTL": "8760h0m0s",
                    "PrivateKeyType": "ec",
                    "PrivateKeyBits": 256,
                }
                stored = self._ask("connect.ca_config", {}).value
                index = stored.modify_index if isinstance(stored, CAConfig) else 0
                (await self._apply(SetCAConfig(config=config, trust_domain=domain, cas_index=index))).unwrap()
            if any(root.active for root in self._roots().roots):
                return
            root = await self._add_root(None)
            log.info("ca: made root %s of trust domain %s", root.id, self._roots().trust_domain)

    async def rotate(self, *, request_id: str | None = None) -> CARoot:
        """Make a new root, cross-signed by the old one, and sign with it from now on.

        The old root stays in the bundle until no leaf of it can be alive. Raises Refused when another rotation won.
        With the `request_id` of an attempt that has rotated already, nothing changes: its root is returned.
        """
        async with self._changing:
            root = await self._add_root(self._active_signer(), request_id)
            log.warning("ca: rotated to root %s; the old one stays trusted until its leaves have expired", root.id)
            return root

    async def _add_root(self, old: Signer | None, request_id: str | None = None) -> CARoot:
        trust_domain = self._roots().trust_domain
        now, key = self._now(), new_key()
        root = make_root(trust_domain, key, now)
        if old is not None:
            crossed = cross_sign(root, old, trust_domain, now)
            root = CARoot(**{**_fields(root), "intermediate_certs": (crossed,)})
        command = AddCARoot(
            root=root,
            sealed_key=seal(key_pem(key), self._cluster_key, root.id),
            make_active=True,
            expected_active_root_id=old.root.id if old is not None else "",
        )
        (await self._apply(command, request_id=request_id)).unwrap()
        roots = self._roots().roots
        made = next((stored for stored in roots if stored.id == root.id), None)
        return made or next((stored for stored in roots if stored.active), root)

    async def retire_old_roots(self) -> None:
        """Drop roots whose leaves have all expired. The leader calls it from time to time."""
        roots = self._roots().roots
        active = next((root for root in roots if root.active), None)
        if active is None:
            return
        since = x509.load_pem_x509_certificate(active.root_cert.encode()).not_valid_before_utc
        if (self._now() - since).total_seconds() < self.leaf_ttl_s() + RETIRE_MARGIN_S:
            return
        for root in roots:
            if not root.active:
                (await self._apply(RetireCARoot(root_id=root.id))).unwrap()
                log.warning("ca: retired root %s", root.id)

    # -- leaves ----------------------------------------------------------------------------------------------------

    def sign(self, csr_pem: str, *, service: str, instance: str, node: str) -> str:
        """Return the chain for a leaf, PEM: the leaf, then the cross-signed root while an older root is trusted.

        Raises LeafRefused, NoLeader (no root yet).
        """
        signer = self._active_signer()
        roots = self._roots()
        revocations: tuple[Revocation, ...] = tuple(self._ask("connect.revocations", {}).value)
        registered = self._instance_of(node, instance) if instance else None
        plan = judge(
            parse_csr(csr_pem),
            LeafRequest(service, instance, node),
            trust_domain=roots.trust_domain,
            datacenter=self._datacenter,
            registered_service=registered.service if registered is not None else None,
            revocations=revocations,
            neighbours=() if instance else self._instances(node, service),
        )
        serial = x509.random_serial_number()
        now = self._now()
        leaf = sign_leaf(plan, signer, now=now, ttl_s=self.leaf_ttl_s(), serial=serial)
        log.info("ca: signed a leaf for %s/%s on %s at %s", service, instance or "-", node, rfc3339(now))
        return leaf + "".join(signer.root.intermediate_certs if len(roots.roots) > 1 else ())

    def _instances(self, node: str, service: str) -> list[str]:
        """Return the ids of a service's instances on a node."""
        held: CatalogNode | None = self._ask("catalog.node", {"node": node}).value
        return [row.id for row in held.services.values() if row.service == service] if held is not None else []


def _fields(root: CARoot) -> dict[str, Any]:
    return {name: getattr(root, name) for name in root.__struct_fields__}


__all__ = ["Authority", "LeafRefused", "NodeError", "Refused"]
