"""From a policy's text to its rules: which access to what, by exact name or by prefix.

Source: Consul's "ACL rules" reference. HCL and JSON are taken alike. What is unknown is refused by its name rather
than skipped: a rule that silently does nothing is a hole, or a lock-out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raftstate.acl.hcl import BadSyntax, parse_hcl

RULES_CHARS_MAX = 64 * 1024
RULES_MAX = 4096
NAME_CHARS_MAX = 2048

DENY, READ, LIST, WRITE = 0, 1, 2, 3
"""What a rule grants; each grants the ones before it, but for DENY."""
_LEVELS = {"deny": DENY, "read": READ, "list": LIST, "write": WRITE}
_WORDS = {level: word for word, level in _LEVELS.items()}

WHOLE = ("acl", "keyring", "mesh", "operator", "peering")
"""Resources of which there is one: ``operator = "read"``."""
NAMED = ("agent", "event", "key", "node", "query", "service", "session")
"""Resources with names: ``node "web-1" {…}``, and ``node_prefix "web-" {…}``."""
INTENTION = "intention"
"""Named by service; no block of its own: ``service "web" { intentions = "read" }``."""


class BadRules(ValueError):
    """The text cannot be enforced as it stands; the message names the rule."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Access to one name, or to all that begin with it. None where a service's rule says nothing of it."""

    resource: str
    name: str
    prefix: bool
    access: int | None
    intentions: int | None = None


@lru_cache(maxsize=1024)
def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return a policy's rules. Raises BadRules."""
    if len(text) > RULES_CHARS_MAX:
        raise BadRules(
            f"the rules are {len(text)} characters long, the most is {RULES_CHARS_MAX}: use several policies"
        )
    rules = tuple(_rules(text))
    if len(rules) > RULES_MAX:
        raise BadRules(f"there are {len(rules)} rules, the most is {RULES_MAX}: use several policies")
    return rules


def word(access: int) -> str:
    """Return the word of the language for an access."""
    return _WORDS[access]


def _rules(text: str) -> Iterator[Rule]:
    for resource, labels, value in _entries(text):
        prefix = resource.endswith("_prefix")
        kind = resource.removesuffix("_prefix")
        if resource in WHOLE:
            if labels or not isinstance(value, str):
                raise BadRules(f'{resource}: write {resource} = "read", "write" or "deny"')
            yield Rule(resource, "", False, _access(resource, "", value))
        elif kind in NAMED:
            if len(labels) != 1 or not isinstance(value, list):
                raise BadRules(f'{resource}: write {resource} "NAME" {{ policy = "read" }}')
            if len(labels[0]) > NAME_CHARS_MAX:
                raise BadRules(f"{resource}: a name is longer than {NAME_CHARS_MAX} characters")
            yield _named(resource, kind, labels[0], prefix, value)
        else:
            known = ", ".join((*WHOLE, *(f"{name}, {name}_prefix" for name in NAMED)))
            raise BadRules(f"{resource[:60]!r} is not a resource that rules are for; known: {known}")


def _named(resource: str, kind: str, name: str, prefix: bool, body: list[Any]) -> Rule:
    where = f'{resource} "{name[:80]}"'
    access = intentions = None
    for field, labels, value in body:
        if field not in ("policy", "intentions") or (field == "intentions" and kind != "service"):
            raise BadRules(f"{where}: there is no field {field[:60]!r}")
        if labels or not isinstance(value, str):
            raise BadRules(f'{where}: {field} must be a text such as "read"')
        if field == "policy":
            access = _access(kind, where, value)
        else:
            intentions = _access(INTENTION, where, value)
    if access is None and intentions is None:
        raise BadRules(f"{where}: policy is missing")
    return Rule(kind, name, prefix, access, intentions)


def _access(kind: str, where: str, value: str) -> int:
    access = _LEVELS.get(value)
    if access is None or (access == LIST and kind != "key"):
        words = '"read", "list", "write" or "deny"' if kind == "key" else '"read", "write" or "deny"'
        raise BadRules(f"{where or kind}: {value[:60]!r} is no access: use {words}")
    return access


def _entries(text: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield (resource, labels, value) of either syntax; the value of a block is a list of such triples."""
    if text.lstrip().startswith("{"):
        yield from _json_entries(text)
        return
    try:
        entries = parse_hcl(text)
    except BadSyntax as error:
        raise BadRules(str(error)) from None
    for resource, labels, value in entries:
        if not labels and isinstance(value, list):
            # key = { "foo" = { policy = "read" } }, or key { "foo" {…} }: HCL 1 takes both for labels.
            for name, more, body in value:
                yield resource, (name, *more), body
        else:
            yield resource, labels, value


def _json_entries(text: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    try:
        document = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise BadRules(f"not valid JSON: {error}") from None
    if not isinstance(document, _Pairs):
        raise BadRules("JSON rules must be an object")
    for resource, value in document:
        if not isinstance(value, list):
            yield resource, (), value
            continue
        # {"key": {"foo": {…}}}, or, as some tools write HCL's blocks, {"key": [{"foo": {…}}, …]}
        for group in [value] if isinstance(value, _Pairs) else value:
            if not isinstance(group, _Pairs):
                raise BadRules(f"{resource[:60]}: must be an object of names")
            for name, body in group:
                for one in body if isinstance(body, list) and not isinstance(body, _Pairs) else [body]:
                    if not isinstance(one, _Pairs):
                        raise BadRules(
                            f'{resource[:60]} "{name[:80]}": must be an object such as {{"policy": "read"}}'
                        )
                    yield resource, (name,), [(field, (), access) for field, access in one]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs: a name that stands twice is two rules, as in HCL."""
