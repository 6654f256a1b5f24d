"""L7 permissions as Envoy's RBAC permissions. Pure.

The meaning is that of :mod:`proxy.authz.permission`. Where Envoy cannot decide as finely, it decides more strictly:

- Envoy matches a path with its escapes, Lictor one that is decoded. So where permissions apply, a path that can be
  read in several ways is never allowed, and behind a ``deny`` with a path no escape is allowed at all.
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
    if http.path_exact:
        rules.append({"url_path": {"path": {"exact": quote(http.path_exact, safe=_PATH_SAFE)}}})
    elif http.path_prefix:
        rules.append({"url_path": {"path": {"prefix": quote(http.path_prefix, safe=_PATH_SAFE)}}})
    elif http.path_regex:
        rules.append(_path_regex(http.path_regex))
    return rules + [_header(match, deny=deny) for match in http.header]


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
        return re.escape(match.exact)
    if match.prefix:
        return re.escape(match.prefix) + "[^,]*"
    if match.suffix:
        return "[^,]*" + re.escape(match.suffix)
    if match.contains:
        return "[^,]*" + re.escape(match.contains) + "[^,]*"
    return match.regex


def _exact(name: str, value: str) -> Rule:
    return {"name": name, "string_match": {"exact": value}}


def _path_regex(regex: str) -> Rule:
    return {"url_path": {"path": {"safe_regex": {"regex": regex}}}}


def _not(rule: Rule) -> Rule:
    return {"not_rule": rule}


def _all(rules: list[Rule]) -> Rule:
    if not rules:
        return {"any": True}
    return rules[0] if len(rules) == 1 else {"and_rules": {"rules": rules}}
