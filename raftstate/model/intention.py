"""Intentions: who may call whom.

An intention names its source and destination each as a service, as one instance of a service, or as ``*``.
The form of a reference outside is ``name``, ``*`` or ``service:instance``; an instance intention keeps the
service beside the instance id, because instance ids alone are not unique across services and a foreign
service must not gain rights by picking somebody's instance id.

Source of shapes and precedence: Consul's ``/v1/connect/intentions`` API and its "Precedence and match order".
"""

from __future__ import annotations

from raftstate.model.wire import Wire

ALLOW, DENY = "allow", "deny"
WILDCARD = "*"


class HeaderMatch(Wire, frozen=True):
    """One condition on a request header; exactly one of the value matchers (or ``present``) is set."""

    name: str
    present: bool = False
    exact: str = ""
    prefix: str = ""
    suffix: str = ""
    contains: str = ""
    regex: str = ""
    invert: bool = False
    ignore_case: bool = False
    """Of ASCII letters, in ``exact``, ``prefix``, ``suffix`` and ``contains``."""


class HTTPMatch(Wire, frozen=True):
    """What of a request a permission covers; empty parts match everything."""

    path_exact: str = ""
    path_prefix: str = ""
    path_regex: str = ""
    """RE2 syntax, matched against the whole path without the query; RE2 bounds its time."""
    methods: tuple[str, ...] = ()
    header: tuple[HeaderMatch, ...] = ()


class Permission(Wire, frozen=True):
    """One ordered L7 rule; the first permission whose match covers the request decides."""

    action: str
    http: HTTPMatch = HTTPMatch()


class Intention(Wire, frozen=True):
    """A stored intention. Either ``action`` is set (L4), or ``permissions`` is non-empty (L7)."""

    source_name: str
    destination_name: str
    id: str = ""
    description: str = ""
    source_ns: str = "default"
    source_service: str = ""
    """The service whose instance ``source_name`` is; empty when it names a service or ``*``."""
    destination_ns: str = "default"
    destination_service: str = ""
    """As ``source_service``, for the destination."""
    source_type: str = "consul"
    action: str = ""
    permissions: tuple[Permission, ...] = ()
    meta: dict[str, str] = {}
    precedence: int = 0
    created_at: str = ""
    """RFC 3339, UTC; made by the proposer."""
    updated_at: str = ""
    create_index: int = 0
    modify_index: int = 0


def rank(name: str, service: str) -> int:
    """Return how specific one side is: 0 for ``*``, 1 for a service, 2 for an instance."""
    return 0 if name == WILDCARD else 2 if service else 1


# Destination counts before source, as in Consul; 9, 8, 6 and 5 are the numbers Consul shows for its four forms.
_PRECEDENCE = {
    (2, 2): 14, (2, 1): 13, (2, 0): 12, (1, 2): 10, (1, 1): 9, (1, 0): 8, (0, 2): 7, (0, 1): 6, (0, 0): 5,
}  # fmt: skip


def precedence(intention: Intention) -> int:
    """Return the precedence of an intention; among those that match, the highest decides."""
    destination = rank(intention.destination_name, intention.destination_service)
    return _PRECEDENCE[destination, rank(intention.source_name, intention.source_service)]
