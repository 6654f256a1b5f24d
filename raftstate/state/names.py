"""What names, ids and metadata may look like. Bounded and without control characters: they are shown and logged."""

from __future__ import annotations

import re
from collections.abc import Mapping

from raftstate.state.refusal import INVALID, Refused

NAME_MAX = 255
"""Characters of a node's, service's or check's name or id."""
META_PAIRS_MAX, META_KEY_MAX, META_VALUE_MAX = 64, 128, 512
"""Consul's bounds of node and service metadata."""

# Spelled out, because `str.isprintable` changes with Python's Unicode tables (beyond ASCII) and replicas must agree.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def is_text(value: str, length_max: int = NAME_MAX) -> bool:
    """Whether a text surely passes `require_text`: short, and printable ASCII. False: it must be looked at there.

    For paths where to make the refusal's words would cost more than the look.
    """
    return len(value) <= length_max and value.isascii() and value.isprintable()


def require_name(value: str, what: str, *, length_max: int = NAME_MAX) -> None:
    """Refuse an empty, overlong or unprintable name."""
    if not value:
        raise Refused(INVALID, f"{what} must not be empty")
    require_text(value, what, length_max=length_max)


def require_text(value: str, what: str, *, length_max: int = NAME_MAX) -> None:
    """Refuse an overlong or unprintable text; empty is fine."""
    if is_text(value, length_max):
        return
    if len(value) > length_max:
        raise Refused(INVALID, f"{what} is longer than {length_max} characters: {value[:40]!r}…")
    if _CONTROL.search(value):
        raise Refused(INVALID, f"{what} holds a control character: {value[:80]!r}")


def require_service_name(value: str, what: str = "service name") -> None:
    """Refuse what cannot name a service: ``*`` is the wildcard, ``:`` and ``/`` part references to services."""
    if not value or not is_text(value):
        require_name(value, what)
    if value == "*" or ":" in value or "/" in value:
        raise Refused(
            INVALID, f"{what} {value!r} must not be '*' or hold ':' or '/', which have a meaning in intentions"
        )


def require_meta(meta: Mapping[str, str], what: str) -> None:
    """Refuse metadata beyond Consul's bounds."""
    if not meta:
        return
    if len(meta) > META_PAIRS_MAX:
        raise Refused(INVALID, f"{what} metadata has {len(meta)} pairs; the most is {META_PAIRS_MAX}")
    for key, value in meta.items():
        require_name(key, f"{what} metadata key", length_max=META_KEY_MAX)
        if len(value) > META_VALUE_MAX:
            raise Refused(INVALID, f"{what} metadata value of {key!r} is longer than {META_VALUE_MAX} characters")
