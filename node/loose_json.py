"""JSON as Consul's clients send it, made into typed values at the edge.

Consul accepts keys in any case and in snake_case (``enabletagoverride``, ``tagged_addresses``), ``null`` for
"not given", and durations as Go strings or nanoseconds. :func:`loads` folds all of that into a struct; keys of
user-owned maps (``Meta``, ``Config``) are left as they are, unknown keys are ignored as Consul does.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

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


def _conform_struct(value: dict[Any, Any], kind: type, depth: int) -> dict[str, Any]:
    fields = _fields(kind)
    result: dict[str, Any] = {}
    for key, item in value.items():
        known = fields.get(_fold(str(key)))
        if known is None:
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
