"""A configuration entry written in HCL, as Consul's users have them, read into the form that its JSON has. Pure.

Source of the reading: HCL 1 as Consul's ``consul config write`` takes it. A block is an object, one with labels an
object by label, and several blocks of one name are a list. Heredocs and expressions are not read.
"""

from __future__ import annotations

from typing import Any

from raftstate.acl.hcl import BadSyntax, parse_hcl

_WORDS = {"true": True, "false": False, "null": None}


def entry_of(text: str) -> dict[str, Any]:
    """Return the entry. Raises :class:`BadSyntax`, whose text says where and what."""
    return _object(parse_hcl(text), "")


def _object(entries: list[Any], at: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    blocks: set[str] = set()
    for name, labels, value in entries:
        where = ".".join(filter(None, (at, name, *labels)))
        if isinstance(value, list) and labels:
            _put_labelled(found, name, labels, _object(value, where), where)
        elif name not in found:
            found[name] = _value(value, where)
            if isinstance(value, list):
                blocks.add(name)
        elif isinstance(value, list) and name in blocks:
            earlier = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*earlier, _object(value, where)]
        else:
            raise BadSyntax(f"{where} is given twice")
    return found


def _put_labelled(found: dict[str, Any], name: str, labels: tuple[str, ...], value: Any, where: str) -> None:
    place: Any = found.setdefault(name, {})
    for label in labels[:-1]:
        place = place.setdefault(label, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict) or labels[-1] in place:
        raise BadSyntax(f"{where} is given twice")
    place[labels[-1]] = value


def _value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return _object(value, where)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, tuple) and value[0] == "list":
        return [_value(each, f"{where}[{number}]") for number, each in enumerate(value[1])]
    if isinstance(value, tuple):
        if value[1] not in _WORDS:
            raise BadSyntax(f"{where}: {value[1]} is neither true, false, null nor a text in quotes")
        return _WORDS[value[1]]
    return value
