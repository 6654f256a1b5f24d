"""What is wrong with a ``service-intentions`` entry, whose keys may be written as those of the other entries.

A key that nobody knows is refused as there: of a permission whose ``HTTP`` is misspelt, or one that asks for a JWT,
nothing would be left but the leave to do anything. For whoever takes an entry from a user; replicas don't judge by
this, so that they apply what an older version has taken.

Source of the rules: Consul's page on the service-intentions configuration entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import msgspec.inspect as shape

from raftstate.chain.checks import METHODS, spell
from raftstate.chain.entries import BadEntry, Form
from raftstate.model.intention import HTTPMatch, Permission
from raftstate.model.wire import Wire

INTENTIONS = "service-intentions"
_NO_JWT = "there are no JWTs here: who calls is known by its certificate"
_NO_PEERING = "there is no cluster peering here"


class PermissionPart(Wire, frozen=True):
    """One of a source's ``Permissions``."""

    action: str = ""
    http: HTTPMatch | None = None
    jwt: dict[str, Any] | None = msgspec.field(default=None, name="JWT")


class SourcePart(Form, frozen=True):
    """One of ``Sources``. Consul shows precedence and what is left of older intentions; nothing is read of these."""

    name: str = ""
    action: str = ""
    permissions: tuple[PermissionPart, ...] | None = None
    description: str = ""
    type: str = ""
    peer: str = ""
    sameness_group: str = ""
    precedence: int = 0
    legacy_id: str = ""
    legacy_meta: dict[str, str] | None = None
    legacy_create_time: str | None = None
    legacy_update_time: str | None = None


class IntentionsEntry(Form, frozen=True):
    """``service-intentions``"""

    sources: tuple[SourcePart, ...] | None = None
    meta: dict[str, str] | None = None
    jwt: dict[str, Any] | None = msgspec.field(default=None, name="JWT")
    hash: int = 0


_SHAPE = shape.type_info(IntentionsEntry)
Problems = Iterator[tuple[str, str]]


def check_intentions(name: str, entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Permission]]]:
    """Return the entry with its keys as Consul's API spells them, and its permissions with their paths, for those to
    judge who compile them. Raises :class:`BadEntry`, which names the field."""
    spelt = spell(entry, _SHAPE, INTENTIONS, name)
    try:
        form = msgspec.convert(spelt, IntentionsEntry)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        raise BadEntry(INTENTIONS, name, where.rstrip("`"), text) from error
    for field, text in _problems(form):
        raise BadEntry(INTENTIONS, name, field, text)
    permissions = [
        (f"Sources[{number}].Permissions[{place}]", Permission(part.action, part.http or HTTPMatch()))
        for number, source in enumerate(form.sources or ())
        for place, part in enumerate(source.permissions or ())
    ]
    return {key: value for key, value in spelt.items() if value is not None}, permissions


def _problems(form: IntentionsEntry) -> Problems:
    if form.jwt:
        yield "JWT", _NO_JWT
    for number, source in enumerate(form.sources or ()):
        at = f"Sources[{number}]"
        if not source.name:
            yield f"{at}.Name", "must not be empty"
        for field, value in (("Peer", source.peer), ("SamenessGroup", source.sameness_group)):
            if value:
                yield f"{at}.{field}", _NO_PEERING
        for place, part in enumerate(source.permissions or ()):
            yield from _permission(part, f"{at}.Permissions[{place}]")


def _permission(part: PermissionPart, at: str) -> Problems:
    if part.jwt:
        yield f"{at}.JWT", _NO_JWT
    if part.http is None or part.http == HTTPMatch():
        yield f"{at}.HTTP", 'must say what is meant; for every request: PathPrefix = "/"'
        return
    for place, method in enumerate(part.http.methods):
        if method.upper() not in METHODS:
            yield f"{at}.HTTP.Methods[{place}]", f"{method[:80]!r} is no HTTP method"
