"""JSON as Consul's clients send it, made into typed values at the edge.

Consul accepts keys in any case and in snake_case (``enabletagoverride``, ``tagged_addresses``), ``null`` for
"not given", and durations as Go strings or nanoseconds. :func:`loads` folds all of that into a struct; keys of
user-owned maps (``Meta``, ``Config``) are left as they are, unknown keys are ignored as Consul does,
unless the struct forbids them.

Most clients spell every key as Consul does. A value whose keys are all exact needs no folding, and to see that takes
a few set operations: it is converted as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from node.durations import parse_duration_s

DURATION = "duration in seconds"
Duration = Annotated[float, DURATION]
"""A field of seconds which JSON may give as a Go string or as nanoseconds."""

T = TypeVar("T")
_MAX_DEPTH = 32


class BadJson(ValueError):
    """The text is not JSON of the expected shape; the message names the field."""


def loads(data: bytes, kind: type[T], *, aliases: dict[str, str] | None = None) -> T:
    """Decode loosely spelled JSON into ``kind`` (a struct, or a container of structs).

    ``aliases`` maps further folded spellings of top-level keys to field names. Raises :class:`BadJson`.
    """
    try:
        value = msgspec.json.decode(data) if data.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadJson(f"Request decode failed: {error}") from error
    return convert(value, kind, aliases=aliases)


def convert(value: Any, kind: type[T], *, aliases: dict[str, str] | None = None) -> T:
    """Make loosely spelled builtins into ``kind``. Raises :class:`BadJson`."""
    exact = None if aliases else _exact_for(cast(Any, kind))
    if exact is not None and exact(value):
        try:
            return msgspec.convert(value, kind, strict=False)
        except (msgspec.ValidationError, ValueError, RecursionError):
            pass  # a null for "not given", perhaps: below it is dropped, or refused by name
    if aliases and isinstance(value, dict):
        value = {aliases.get(_fold(str(key)), key): item for key, item in value.items()}
    try:
        return msgspec.convert(_conform(value, kind, 0), kind, strict=False)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise BadJson(f"Request decode failed: {error}") from error


def _fold(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


@lru_cache(maxsize=256)
def _fields(kind: type) -> dict[str, tuple[str, Any, bool]]:
    """Return folded spelling -> (wire name, type, whether null is a value of it)."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        _fold(field.encode_name): (field.encode_name, hints[field.name], _nullable(hints[field.name]))
        for field in msgspec.structs.fields(kind)
    }


def _nullable(hint: Any) -> bool:
    return hint is Any or hint is None or type(None) in get_args(hint)


def _conform(value: Any, hint: Any, depth: int) -> Any:
    """Rename keys and parse durations along the type; values that do not fit are left for msgspec to refuse."""
    if depth > _MAX_DEPTH:
        raise BadJson("Request decode failed: nested too deeply")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated and DURATION in hint.__metadata__:
        return parse_duration_s(value) if isinstance(value, str | int | float) else value
    if origin in (types.UnionType, Union):
        inner = next((argument for argument in arguments if argument is not type(None)), Any)
        return None if value is None else _conform(value, inner, depth)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _conform_struct(value, hint, depth) if isinstance(value, dict) else value
    if origin in (list, tuple, set, frozenset) and isinstance(value, list):
        return [_conform(item, arguments[0], depth + 1) for item in value]
    if origin is dict and isinstance(value, dict):
        return {
            key: _conform(item, arguments[1], depth + 1)
            for key, item in value.items()
            if item is not None or _nullable(arguments[1])
        }
    return value


def _conform_struct(value: dict[Any, Any], kind: type[msgspec.Struct], depth: int) -> dict[str, Any]:
    fields = _fields(kind)
    result: dict[str, Any] = {}
    for key, item in value.items():
        known = fields.get(_fold(str(key)))
        if known is None:
            if item is not None and kind.__struct_config__.forbid_unknown_fields:
                raise BadJson(f"Request decode failed: {str(key)[:80]!r}: there is no such field")
            continue
        name, hint, nullable = known
        if item is None and not nullable:
            continue
        try:
            result[name] = _conform(item, hint, depth + 1)
        except BadJson:
            raise
        except ValueError as error:
            raise BadJson(f"Request decode failed: {name}: {error}") from error
    return result


_Exact = Callable[[Any], bool]


class _NotBySpelling(Exception):
    """Exact keys do not make a value of this type what it says: durations are parsed, or the type holds itself."""


@lru_cache(maxsize=256)
def _exact_for(kind: Any) -> _Exact | None:
    """Return what tells whether a value's keys are all spelled as ``kind`` has them; None: always fold."""
    try:
        return _exact(kind, ()) or _always
    except _NotBySpelling:
        return None


def _always(_: Any) -> bool:
    return True


def _exact(hint: Any, within: tuple[Any, ...]) -> _Exact | None:
    """Follow the type as `_conform` does; None where there are no keys to look at."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if DURATION in hint.__metadata__:
            raise _NotBySpelling
        return None
    if origin in (types.UnionType, Union):
        return _exact(next((argument for argument in arguments if argument is not type(None)), Any), within)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if hint in within:
            raise _NotBySpelling
        return _exact_struct(hint, (*within, hint))
    if origin in (list, tuple, set, frozenset) and (item := _exact(arguments[0], within)) is not None:
        return partial(_exact_items, item)
    if origin is dict and (item := _exact(arguments[1], within)) is not None:
        return partial(_exact_values, item)
    return None


# What is of another kind than its type says has no keys to look at, and is judged by the conversion.


def _exact_items(fits: _Exact, value: Any) -> bool:
    return not isinstance(value, list) or all(map(fits, value))


def _exact_values(fits: _Exact, value: Any) -> bool:
    return not isinstance(value, dict) or all(map(fits, value.values()))


def _exact_struct(kind: type, within: tuple[Any, ...]) -> _Exact:
    fields = [(name, _exact(hint, within)) for name, hint, _ in _fields(kind).values()]
    names = frozenset(name for name, _ in fields)
    inner = [(name, exact) for name, exact in fields if exact is not None]

    def exact(value: Any) -> bool:
        if not isinstance(value, dict):
            return True
        if not names.issuperset(value):
            return False
        for name, fits in inner:
            item = value.get(name)
            if item is not None and not fits(item):
                return False
        return True

    return exact
