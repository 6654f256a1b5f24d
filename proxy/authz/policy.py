"""Intentions, compiled: from a source and a destination to the one intention that decides.

The intention of highest precedence among those that match decides (Consul: "Precedence and match order"). Each side
of an intention is an instance, a service or ``*``, so at most nine can match a given pair, and each is found by
its key: the cost does not grow with the number of intentions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxy.authz.permission import CompiledPermission, compile_permission
from proxy.authz.request import Request
from raftstate.model.identity import Identity
from raftstate.model.intention import ALLOW, DENY, WILDCARD, Intention, Permission, precedence

SideKey = str | tuple[str, str]
"""``*``, a service's name, or (service, instance id)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer with what it rests on.

    ``allowed`` with ``permissions``, from :meth:`Policy.decide`: the connection is admitted on the condition that
    each of its HTTP requests is put to :meth:`Policy.decide_request`.
    """

    allowed: bool
    intention: Intention | None
    reason: str
    permissions: tuple[Permission, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rule:
    """One intention's decisions, made when it was compiled."""

    connection: Decision
    l4: Decision
    permissions: tuple[CompiledPermission, ...]
    allowed: Decision
    """A permission allowed the request."""
    denied: Decision
    """A permission denied it."""
    unmatched: Decision
    ambiguous: Decision
    invalid: Decision

    @property
    def strictness(self) -> int:
        return 0 if not self.connection.allowed else 1 if self.permissions else 2


class Policy:
    """Compiled intentions. Immutable; make one with :func:`compile_policy`."""

    __slots__ = ("_default", "_rules", "default_allow")

    def __init__(self, rules: dict[SideKey, dict[SideKey, _Rule]], default_allow: bool) -> None:
        self.default_allow = default_allow
        self._rules = rules
        self._default = Decision(
            default_allow,
            None,
            f"no intention matches: the default is to {'allow' if default_allow else 'deny'}",
        )

    def decide(self, source: Identity, service: str, instance: str) -> Decision:
        """Decide a connection from ``source`` to ``instance`` (an instance id, may be empty) of ``service``."""
        rule = self._find(source, service, instance)
        return self._default if rule is None else rule.connection

    def decide_l4(self, source: Identity, service: str, instance: str) -> Decision:
        """Decide a connection of which no request will be looked at: L7 intentions count as deny."""
        rule = self._find(source, service, instance)
        return self._default if rule is None else rule.l4

    def decide_request(self, source: Identity, service: str, instance: str, request: Request) -> Decision:
        """Decide one HTTP request; of the intention's permissions the first that covers it decides, none: deny.

        ``permissions`` of the answer are the intention's, when it has some: the path was then read by the rule in
        :mod:`proxy.authz.request` and must be forwarded in its normal form.
        """
        rule = self._find(source, service, instance)
        if rule is None:
            return self._default
        if not rule.permissions:
            return rule.connection
        if request.ambiguity:
            return rule.ambiguous
        for permission in rule.permissions:
            if permission.covers(request):
                if permission.allow:
                    return rule.allowed
                return rule.invalid if permission.problem else rule.denied
        return rule.unmatched

    def _find(self, source: Identity, service: str, instance: str) -> _Rule | None:
        rules = self._rules
        for destination in ((service, instance), service, WILDCARD):
            by_source = rules.get(destination)
            if by_source is not None:
                rule = (
                    by_source.get((source.service, source.instance))
                    or by_source.get(source.service)
                    or by_source.get(WILDCARD)
                )
                if rule is not None:
                    return rule
        return None


def compile_policy(intentions: Iterable[Intention], default_allow: bool) -> Policy:
    """Compile ``intentions``; ``default_allow`` holds when none matches.

    What is invalid denies: an intention without a usable action, a permission that cannot be compiled. The state
    machine keeps one intention per pair of sides; should there be two, the stricter decides.
    """
    rules: dict[SideKey, dict[SideKey, _Rule]] = {}
    for intention in intentions:
        rule = _compile(intention)
        by_source = rules.setdefault(_key(intention.destination_name, intention.destination_service), {})
        key = _key(intention.source_name, intention.source_service)
        other = by_source.get(key)
        if other is None or rule.strictness < other.strictness:
            by_source[key] = rule
    return Policy(rules, default_allow)


def _key(name: str, service: str) -> SideKey:
    return name if name == WILDCARD or not service else (service, name)


def _side(name: str, service: str) -> str:
    return f"{service}:{name}" if service and name != WILDCARD else name


def _compile(intention: Intention) -> _Rule:
    named = (
        f"{_side(intention.source_name, intention.source_service)} => "
        f"{_side(intention.destination_name, intention.destination_service)} "
        f"(ID: {intention.id}, Precedence: {precedence(intention)})"
    )
    permissions: tuple[CompiledPermission, ...] = ()
    if intention.permissions:
        if intention.action == DENY:
            connection = Decision(False, intention, f"invalid intention, denied: action and permissions: {named}")
        else:
            permissions = tuple(compile_permission(permission) for permission in intention.permissions)
            connection = Decision(
                True, intention, f"matched L7 intention: {named}: each request is decided", intention.permissions
            )
    elif intention.action in (ALLOW, DENY):
        connection = Decision(
            intention.action == ALLOW, intention, f"matched intention: {intention.action.upper()} {named}"
        )
    else:
        connection = Decision(False, intention, f"invalid intention, denied: action {intention.action!r}: {named}")
    if not permissions:
        return _Rule(connection, connection, (), *[connection] * 5)
    problems = "; ".join(permission.problem for permission in permissions if permission.problem)

    def request(allowed: bool, what: str) -> Decision:
        return Decision(allowed, intention, f"matched L7 intention: {named}: {what}", intention.permissions)

    return _Rule(
        connection=connection,
        l4=request(False, "denied: its permissions need an HTTP request to decide on"),
        permissions=permissions,
        allowed=request(True, "a permission allows the request"),
        denied=request(False, "a permission denies the request"),
        unmatched=request(False, "no permission covers the request"),
        ambiguous=request(False, "denied: the request's path is ambiguous"),
        invalid=request(False, f"denied: the permission is invalid: {problems}"),
    )
