"""L7 permissions as Envoy's RBAC permissions. Pure.

The meaning is that of :mod:`proxy.authz.permission`. Where Envoy cannot decide as finely, it decides more strictly:

- Envoy matches a path with its escapes, Lictor one that is decoded. So where permissions apply, a path that can be
  read in several ways is never allowed, and behind a ``deny`` with a path no escape is allowed at all.
- A path with parameters of segments has two readings, and a ``deny`` covers either. Of a rule with an expression that
  is not known: it refuses every path with a ``;``, unless it has one itself.
- Envoy sees several values of a header joined by commas. A value with a comma in it counts as several: an ``allow``
  wants each of them to match, a ``deny`` one.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from proxy.authz.permission import check_permission
from raftstate.model.intention import ALLOW, HeaderMatch, HTTPMatch, Permission

Rule = dict[str, Any]

AMBIGUOUS_PATH = (
    r".*(?:[^!-~]|\\|%(?:[01][0-9a-fA-F]|7[fF]|2[fF]|5[cC]|25(?:2[eEfF]|5[cC])"
    r"|2[dDeE]|3[0-9]|4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aAeE]|[^0-9a-fA-F]|.[^0-9a-fA-F]|.?$)"
    r"|/\.\.?(?:;|%3[bB])).*"
)
"""Paths that apps read in different ways: what :func:`proxy.authz.request.normal_path` refuses or decodes."""
_PATH_SAFE = "/!$&'()*+,;=:@~"


def permission_rules(permissions: tuple[Permission, ...]) -> list[Rule]:
    """Return the RBAC permissions of which one must hold, for a list in which the first that covers decides."""
    allowed: list[Rule] = []
    refused: list[Rule] = []
    escapes_refused = False
    for permission in permissions:
        if check_permission(permission):
            break  # an invalid permission denies whatever reaches it, so nothing behind it can allow
        if permission.action == ALLOW:
            parts = [*_conditions(permission.http, deny=False), _not(_path_regex(AMBIGUOUS_PATH))]
            if escapes_refused:
                parts.append(_not({"url_path": {"path": {"contains": "%"}}}))
            allowed.append(_all([*parts, *(_not(rule) for rule in refused)]))
        else:
            conditions = _conditions(permission.http, deny=True)
            refused.append(_all(conditions))
            http = permission.http
            escapes_refused = escapes_refused or bool(http.path_exact or http.path_prefix or http.path_regex)
            if not conditions:
                break
    return allowed


def uses_headers(permissions: tuple[Permission, ...]) -> bool:
    """Whether a condition looks at a header."""
    return any(permission.http.header for permission in permissions)


def _conditions(http: HTTPMatch, *, deny: bool) -> list[Rule]:
    rules = []
    if http.methods:
        names = [{"header": _exact(":method", method.upper())} for method in sorted(set(http.methods))]
        rules.append(names[0] if len(names) == 1 else {"or_rules": {"rules": names}})
    if (path := _path(http, deny=deny)) is not None:
        rules.append(path)
    return rules + [_header(match, deny=deny) for match in http.header]


def _path(http: HTTPMatch, *, deny: bool) -> Rule | None:
    """Return the condition on the path: of a ``deny`` on either reading of a path that has parameters.

    What an ``allow`` names exactly has none, and a prefix of the one reading is a prefix of the other.
    """
    if http.path_exact:
        exact = quote(http.path_exact, safe=_PATH_SAFE)
        rule: Rule = {"url_path": {"path": {"exact": exact}}}
        return _or_bare(rule, exact, "") if deny and ";" not in exact else rule
    if http.path_prefix:
        prefix = quote(http.path_prefix, safe=_PATH_SAFE)
        rule = {"url_path": {"path": {"prefix": prefix}}}
        return _or_bare(rule, prefix, ".*") if deny and ";" not in prefix else rule
    if not http.path_regex:
        return None
    rule = _path_regex(http.path_regex)
    if ";" in http.path_regex:
        return rule
    # No expression is known for the other reading: a path that has two is covered by a deny, by an allow it is not.
    parameters = [{"url_path": {"path": {"contains": one}}} for one in (";", "%3b", "%3B")]
    return _any([rule, *parameters]) if deny else _all([rule, *map(_not, parameters)])


_PARAMETER = "(?:;[^/]*)?"
_EMPTY = "(?:/;[^/]*)*"
"""Segments of which nothing is left without their parameters."""


def _or_bare(rule: Rule, path: str, rest: str) -> Rule:
    """Return what a rule covers, or covers once parameters are taken away. Escapes are refused behind a ``deny``."""
    first, *segments = path.split("/")
    bare = re.escape(first) + "".join(f"{_EMPTY}/{re.escape(one)}{_PARAMETER}" for one in segments if one)
    if path.endswith("/"):
        bare += f"{_EMPTY}/{_PARAMETER}"
    return _any([rule, _all([{"url_path": {"path": {"contains": ";"}}}, _path_regex(bare + rest)])])


def _header(match: HeaderMatch, *, deny: bool) -> Rule:
    if match.present:
        rule: Rule = {"header": {"name": match.name, "present_match": True}}
        return _not(rule) if match.invert else rule
    one = _element(match)
    # The strict form: each value matches. The generous one: any does. A negation turns strict into generous.
    generous = deny is not match.invert
    regex = rf"(?:.*,)?\s*(?:{one})\s*(?:,.*)?" if generous else rf"(?:{one})(?:\s*,\s*(?:{one}))*"
    rule = {"header": {"name": match.name, "string_match": {"safe_regex": {"regex": regex}}}}
    return _not(rule) if match.invert else rule


def _element(match: HeaderMatch) -> str:
    if match.exact:
        return _text(match.exact, match)
    if match.prefix:
        return _text(match.prefix, match) + "[^,]*"
    if match.suffix:
        return "[^,]*" + _text(match.suffix, match)
    if match.contains:
        return "[^,]*" + _text(match.contains, match) + "[^,]*"
    return match.regex


def _text(value: str, match: HeaderMatch) -> str:
    return f"(?i:{re.escape(value)})" if match.ignore_case else re.escape(value)


def _exact(name: str, value: str) -> Rule:
    return {"name": name, "string_match": {"exact": value}}


def _path_regex(regex: str) -> Rule:
    return {"url_path": {"path": {"safe_regex": {"regex": regex}}}}


def _not(rule: Rule) -> Rule:
    return {"not_rule": rule}


def _any(rules: list[Rule]) -> Rule:
    return {"or_rules": {"rules": rules}}


def _all(rules: list[Rule]) -> Rule:
    if not rules:
        return {"any": True}
    return rules[0] if len(rules) == 1 else {"and_rules": {"rules": rules}}
