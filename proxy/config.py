"""The sidecar's current configuration, built from the stream of :class:`SidecarUpdate`.

A section that cannot be used is reported and what it would open stays shut: an unreadable leaf or bundle leaves the
old one in force, intentions that cannot be compiled become "deny everything".
"""

from __future__ import annotations

import logging

from proxy.authz import Policy, compile_policy
from proxy.errors import BadConfiguration
from proxy.identity import Revoked
from proxy.tls import TlsMaterial, make_material
from raftstate.model.connect import Leaf, Revocation
from raftstate.model.intention import Intention
from raftstate.model.sidecar import SidecarSelf, SidecarUpdate, SidecarUpstream

log = logging.getLogger("lictor.proxy")

SELF, TLS, POLICY, REVOCATIONS, UPSTREAMS = "self", "tls", "policy", "revocations", "upstreams"
REGISTERED = "registered"


class Configuration:
    """What is in force now. Mutated only by :meth:`apply`, read by everyone."""

    def __init__(self) -> None:
        self.version = 0
        self.registered = True
        """False: our instance was deregistered. Nobody may call it then."""
        self.self: SidecarSelf | None = None
        self.material: TlsMaterial | None = None
        self.tls_due = False
        """Leaf or bundle are new and no contexts could be made of them for want of descriptors or memory; the next
        :meth:`apply` tries again."""
        self.policy: Policy | None = None
        """None while intentions are not known or could not be compiled: nothing is admitted then."""
        self.policy_version = 0
        """Grows with every change of what may be admitted; decisions are cached under it."""
        self.revocations: tuple[Revocation, ...] | None = None
        """As they came; None: not known yet."""
        self.revoked = Revoked()
        self.upstreams: tuple[SidecarUpstream, ...] = ()
        self.leaf: Leaf | None = None
        self.roots: tuple[str, ...] = ()
        self.intentions: tuple[Intention, ...] | None = None
        self.default_allow: bool | None = None

    @property
    def ready(self) -> bool:
        """Whether calls can be taken: all that a decision and a handshake need is known."""
        known = (self.self, self.material, self.policy, self.revocations)
        return all(each is not None for each in known)

    def missing(self) -> list[str]:
        """Return what is still awaited, for the text of a refusal."""
        known = {
            "registration": self.self,
            "leaf certificate": self.material,
            "intentions": self.policy,
            "revocations": self.revocations,
            "a new registration": self.registered or None,
        }
        return [name for name, value in known.items() if value is None]

    def apply(self, update: SidecarUpdate) -> set[str]:
        """Take one line of the stream; return which of the parts above changed in effect."""
        changed: set[str] = set()
        self.version = update.version
        if update.self is not None and update.self != self.self:
            self.self = update.self
            changed.add(SELF)
        if (self._takes_tls(update) or self.tls_due) and self._renew_material():
            changed.add(TLS)
        if self._takes_policy(update):
            self._recompile()
            changed.add(POLICY)
        if update.revocations is not None:
            self.revocations = update.revocations
            self.revoked = Revoked(update.revocations)
            changed.add(REVOCATIONS)
        if update.upstreams is not None and update.upstreams != self.upstreams:
            self.upstreams = update.upstreams
            changed.add(UPSTREAMS)
        if update.registered is not None and update.registered != self.registered:
            self.registered = update.registered
            self.policy_version += 1
            changed.add(REGISTERED)
        return changed

    def _takes_tls(self, update: SidecarUpdate) -> bool:
        before = (self.leaf, self.roots)
        if update.leaf is not None:
            self.leaf = update.leaf
        if update.roots is not None:
            self.roots = update.roots
        return (self.leaf, self.roots) != before

    def _renew_material(self) -> bool:
        if self.leaf is None or not self.roots:
            return False
        try:
            self.material = make_material(self.leaf, self.roots)
        except BadConfiguration as error:
            kept = "the one before stays in force" if self.material else "no call can be taken or made"
            log.warning("%s; %s", error, kept)
            self.tls_due = False
            return False
        except OSError as error:  # nothing is wrong with them
            if not self.tls_due:
                log.warning("the new certificate can't be taken yet, trying again: %s", error.strerror)
            self.tls_due = True
            return False
        self.tls_due = False
        return True

    def _takes_policy(self, update: SidecarUpdate) -> bool:
        before = (self.intentions, self.default_allow)
        if update.intentions is not None:
            self.intentions = update.intentions
        if update.default_allow is not None:
            self.default_allow = update.default_allow
        return (self.intentions, self.default_allow) != before

    def _recompile(self) -> None:
        self.policy_version += 1
        self.policy = None
        if self.intentions is None:
            return
        try:
            self.policy = compile_policy(self.intentions, bool(self.default_allow))
        except ValueError as error:
            log.warning("the intentions cannot be used, so every call is denied until they are corrected: %s", error)
