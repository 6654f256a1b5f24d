"""Which callers an Envoy tells apart before the handshake, and when the connections of one must end. Pure.

Envoy ends connections by the filter chain that took them, and of a listener in which only filter chains changed it
ends those of the changed chains. So each caller that is known has a chain of its own, found by the server name that
it gives (:mod:`raftstate.model.caller_name`), and a withdrawal renames the chains of those from whom something was
taken. The server name proves nothing: each chain demands the certificate of its caller, and asks the same RBAC as
every other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from node.xds import rbac
from node.xds.snapshot import Snapshot
from raftstate.model.intention import WILDCARD

CHAINS_MAX = 256
"""Callers told apart; those beyond share the chain of their service, or that of everyone else."""
GONE_MAX = 64
"""Of those, instances that are no longer known."""
STATE_BYTES_MAX = 1 << 20
"""How much an Envoy may bring from an earlier stream, once it is unpacked."""
_EVERYTHING = frozenset({'{"any": true}'})


class Caller(NamedTuple):
    """Whose connections are told apart from others'."""

    service: str
    """Empty: of whomever no other one stands for."""
    instance: str
    """Empty: of the service's instances that are not told apart."""


EVERYONE_ELSE = Caller("", "")


class Chain(NamedTuple):
    """One filter chain of the public listener."""

    caller: Caller
    generation: int
    """Grows when something was taken from the caller: the chain that had another one is drained."""


class Verdicts:
    """What each caller may do, in a form in which to be allowed more is to have a superset."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._rules: dict[rbac.Source, tuple[int, frozenset[str]]] = {}
        self._named: dict[str, set[str]] = {}
        """Instances of which something is said, by service."""
        for rank, one in enumerate(rbac.decisions(snapshot)):
            self._rules[one.source] = rank, frozenset(json.dumps(rule, sort_keys=True) for rule in one.allowed)
            self._named.setdefault(one.source[0], set()).add(one.source[1])
        self._revoked = {(row.service, row.value) for row in snapshot.revocations if row.kind == "instance"}
        for service, instance in self._revoked:
            self._named.setdefault(service, set()).add(instance)
        self._revoked |= {(row.value, "") for row in snapshot.revocations if row.kind == "service"}
        self.serials = frozenset(row.value for row in snapshot.revocations if row.kind == "serial")
        self.roots = frozenset(snapshot.roots)
        self._common = json.dumps([sorted(self.serials), sorted(self.roots)])

    def may(self, service: str, instance: str) -> frozenset[str]:
        """Return what an identity may do; ``*`` is a service of which nothing is said."""
        if self._revoked and not self._revoked.isdisjoint(((service, ""), (service, instance), ("", instance))):
            return frozenset()
        sources = ((service, instance), (service, ""), rbac.ANYONE)
        return min((self._rules[one] for one in sources if one in self._rules), default=(0, frozenset()))[1]

    def within(self, caller: Caller, before: Verdicts | None = None) -> Iterable[rbac.Source]:
        """Return the identities of a caller about which different things may be said, here or ``before``.

        An instance that one of the two names, of whatever service, is one of a service that only the other names.
        """
        if caller.instance:
            return [(caller.service, caller.instance)]
        both = [self] if before is None else [self, before]

        def named(service: str) -> set[str]:
            return {""}.union(*(one._named.get(service, ()) for one in both))

        anywhere = named("")
        if caller.service:
            return [(caller.service, one) for one in anywhere | named(caller.service)]
        services = {WILDCARD}.union(*(one._named for one in both))
        services.update(service for each in both for service, _ in each._revoked)
        return [(name, one) for name in services - {""} for one in anywhere | named(name)]

    def services(self) -> list[str]:
        """Return the services of which instances may come by an intention that names the service or an instance."""
        named = {service for (service, _), (_, allowed) in self._rules.items() if allowed}
        return sorted(one for one in named - {WILDCARD} if self.admits(one))

    @property
    def anyone(self) -> bool:
        """Whether services may come that no intention names."""
        return bool(self.may(WILDCARD, ""))

    def admits(self, service: str) -> bool:
        """Whether some instance of a service may come."""
        return any(self.may(*one) for one in self.within(Caller(service, "")))

    def takes_from(self, before: Verdicts, caller: Caller) -> bool:
        """Whether something that the caller could do before is no longer allowed. Errs towards yes."""
        if not self.serials <= before.serials or not before.roots <= self.roots:
            return True  # nobody knows here whose certificate a serial number is
        return any(_is_less(self.may(*one), before.may(*one)) for one in self.within(caller, before))

    def digest(self, caller: Caller) -> str:
        """Return a short text that differs when what the caller may do does."""
        allowed = [[*one, *sorted(self.may(*one))] for one in sorted(self.within(caller))]
        return hashlib.sha256((json.dumps(allowed) + self._common).encode()).hexdigest()[:12]


def _is_less(now: frozenset[str], before: frozenset[str]) -> bool:
    return now != _EVERYTHING and not before <= now


class Chains:
    """The public listener's filter chains over time."""

    def __init__(self) -> None:
        self._counter = 0
        self._chains: dict[Caller, int] = {}
        self._verdicts: Verdicts | None = None
        self._digests: dict[Caller, str] = {}
        """What an Envoy brought from an earlier stream and was not compared yet."""

    def all(self) -> list[Chain]:
        """Return the chains, that of everyone else last."""
        named = [Chain(caller, generation) for caller, generation in sorted(self._chains.items()) if caller.service]
        return [*named, Chain(EVERYONE_ELSE, self._chains.get(EVERYONE_ELSE, self._counter))]

    def follow(
        self, verdicts: Verdicts, instances: Mapping[str, Sequence[str]], services: Iterable[str] = ()
    ) -> None:
        """Take what callers may do now.

        ``instances``: by service, those that are known. ``services``: those that there are, for when anyone may come.
        """
        before, self._verdicts = self._verdicts, verdicts
        if before is not None:
            self._end(one for one in self._chains if verdicts.takes_from(before, one))
        self._compare()
        wanted = self._wanted(verdicts, instances, services)
        if gone := self._chains.keys() - wanted:
            for one in gone:
                del self._chains[one]
            self._counter += 1  # should one of them come back, its chain is not the one that is being drained
        for one in wanted:
            self._chains.setdefault(one, self._counter)

    def _wanted(
        self, verdicts: Verdicts, instances: Mapping[str, Sequence[str]], services: Iterable[str]
    ) -> dict[Caller, None]:
        """Return whom to tell apart; whoever has a chain keeps it, as long as some of the service may come.

        An instance that is no longer known too: it may be its agent that is gone, and its calls go on.
        """
        everyone = sorted(services) if verdicts.anyone else ()
        admitted = dict.fromkeys([*verdicts.services(), *(one for one in everyone if verdicts.admits(one))])
        here = dict.fromkeys(Caller(one, "") for one in admitted)
        here |= dict.fromkeys(Caller(one, name) for one in admitted for name in sorted(instances.get(one, ())))
        kept, gone = [], []
        for one in self._chains:
            if one in here or (one.service and one.service not in instances and verdicts.admits(one.service)):
                kept.append(one)
            elif one.service and verdicts.admits(one.service):
                gone.append(one)
        found = dict.fromkeys([EVERYONE_ELSE, *kept, *here, *gone[-GONE_MAX:]])
        return dict.fromkeys(list(found)[:CHAINS_MAX])

    def _end(self, callers: Iterable[Caller]) -> None:
        ended = list(callers)
        if ended:
            self._counter += 1
        for one in ended:
            self._chains[one] = self._counter

    def state(self) -> str:
        """Return what a later stream needs to go on from here, as text."""
        verdicts = self._verdicts
        rows = [] if verdicts is None else [[*one, n, verdicts.digest(one)] for one, n in self._chains.items()]
        packed = zlib.compress(json.dumps([self._counter, rows], separators=(",", ":")).encode(), 9)
        return base64.urlsafe_b64encode(packed).decode()

    def resume(self, state: str) -> bool:
        """Go on from what an Envoy has: connections that are still allowed survive the agent's restart.

        What was withdrawn while no agent was there shows by the digests, and is ended. Returns whether it was read.
        """
        found = _unpack(state)
        if found is None:
            return False
        counter, rows = found
        mine = self._chains
        self._counter = max(counter, self._counter)
        self._chains = {Caller(service, instance): generation for service, instance, generation, _ in rows}
        self._digests = {Caller(service, instance): digest for service, instance, _, digest in rows}
        for one in mine:
            self._chains.setdefault(one, self._counter)
        self._compare()
        return True

    def _compare(self) -> None:
        verdicts = self._verdicts
        if verdicts is None or not self._digests:
            return
        self._end(one for one, digest in self._digests.items() if verdicts.digest(one) != digest)
        self._digests = {}


def _unpack(state: str) -> tuple[int, list[tuple[str, str, int, str]]] | None:
    """Return what :meth:`Chains.state` made, None when it is anything else."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(base64.urlsafe_b64decode(state), STATE_BYTES_MAX)
        if unpacker.unconsumed_tail:
            return None
        counter, rows = msgspec.json.decode(text, type=tuple[int, list[tuple[str, str, int, str]]])
    except (binascii.Error, ValueError, zlib.error, msgspec.DecodeError):
        return None
    return (counter, rows) if len(rows) <= CHAINS_MAX else None
