"""L7 permissions, compiled: does one cover a request?

Source of the forms: Consul's service-intentions config entry, ``Permissions``. Where Consul is silent:

- A header that comes several times satisfies a condition of an ``allow`` only if each of its values does, and that
  of a ``deny`` if any does: whichever the app picks, nothing opens.
- ``invert`` is plain negation: an absent header is not equal to anything.
- ``path_prefix`` is a prefix of the text, as in Consul: ``/admin`` covers ``/administrator``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.authz.request import AmbiguousPath, Request, normal_path
from raftstate.model.intention import ALLOW, DENY, HeaderMatch, HTTPMatch, Permission

REGEX_MEMORY_BYTES = 1 << 20
"""Bound of one compiled expression; RE2 refuses a larger one."""

Condition = Callable[[Request], bool]


class InvalidPermission(ValueError):
    """The permission cannot be compiled; the text says which part is wrong."""


@dataclass(frozen=True, slots=True)
class CompiledPermission:
    """A permission ready to be asked. ``problem`` says why an invalid one denies whatever reaches it."""

    allow: bool
    methods: frozenset[str]
    conditions: tuple[Condition, ...]
    problem: str = ""

    def covers(self, request: Request) -> bool:
        """Return whether the permission decides this request."""
        if self.methods and request.method not in self.methods:
            return False
        for condition in self.conditions:  # noqa: SIM110  (a generator would cost more)
            if not condition(request):
                return False
        return True


def compile_permission(permission: Permission) -> CompiledPermission:
    """Compile a permission; an invalid one becomes a denial of every request that reaches it."""
    try:
        if permission.action not in (ALLOW, DENY):
            raise InvalidPermission(f"action {permission.action!r} is neither allow nor deny")
        allow = permission.action == ALLOW
        path = _path_condition(permission.http, every=allow)
        headers = tuple(_header_condition(match, every=allow) for match in permission.http.header)
    except InvalidPermission as error:
        return CompiledPermission(False, frozenset(), (), problem=str(error))
    methods = frozenset(method.upper() for method in permission.http.methods)
    return CompiledPermission(allow, methods, ((path,) if path else ()) + headers)


def check_permission(permission: Permission) -> str:
    """Return what is wrong with a permission, empty when nothing is. For whoever accepts one from a user."""
    return compile_permission(permission).problem


def _path_condition(http: HTTPMatch, *, every: bool) -> Condition | None:
    """``every``: all readings of a path must be covered, not only one of them."""
    given = [name for name in ("path_exact", "path_prefix", "path_regex") if getattr(http, name)]
    if len(given) > 1:
        raise InvalidPermission(f"only one of {', '.join(given)} can be set")
    if http.path_exact:
        exact = http.path_exact if http.path_exact == "*" else _rule_path(http.path_exact)
        if every or ";" in exact:
            return lambda request: request.path == exact
        return lambda request: request.path == exact or request.bare_path == exact
    if http.path_prefix == "/":
        return lambda request: request.path[:1] == "/"
    if http.path_prefix:
        prefix = _rule_path(http.path_prefix)
        if ";" in prefix:
            return lambda request: request.path.startswith(prefix)
        if every:
            return lambda request: (
                request.path.startswith(prefix) and (not request.bare_path or request.bare_path.startswith(prefix))
            )
        return lambda request: request.path.startswith(prefix) or request.bare_path.startswith(prefix)
    if http.path_regex:
        fullmatch = _regex(http.path_regex)
        if ";" in http.path_regex:
            return lambda request: fullmatch(request.path)
        if every:
            return lambda request: fullmatch(request.path) and (not request.bare_path or fullmatch(request.bare_path))
        return lambda request: fullmatch(request.path) or (bool(request.bare_path) and fullmatch(request.bare_path))
    return None


def _rule_path(path: str) -> str:
    """Return a rule's path as requests' paths are matched: decoded."""
    escaped = "".join(c if " " < c < "\x7f" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in path)
    try:
        matched, _ = normal_path(escaped)
    except AmbiguousPath as error:
        raise InvalidPermission(f"path {path!r} can match nothing: {error}") from error
    if "//" in path or any(segment in (".", "..") for segment in path.split("/")):
        raise InvalidPermission(f"path {path!r} can match nothing: write it without // and dot segments")
    return matched


def _regex(pattern: str) -> Callable[[str | bytes], bool]:
    import re2  # 3 MiB with libstdc++: few permissions have a pattern

    options = re2.Options()
    options.max_mem = REGEX_MEMORY_BYTES
    options.log_errors = False
    try:
        fullmatch = re2.compile(pattern, options).fullmatch
    except re2.error as error:
        reason = error.args[0] if error.args else "does not compile"
        raise InvalidPermission(
            f"regular expression {pattern!r}: {reason.decode() if isinstance(reason, bytes) else reason}"
        ) from error
    return lambda text: fullmatch(text) is not None


def _header_condition(match: HeaderMatch, *, every: bool) -> Condition:
    kinds = [kind for kind in ("exact", "prefix", "suffix", "contains", "regex") if getattr(match, kind)]
    if match.present:
        kinds.append("present")
    if not match.name:
        raise InvalidPermission("a header match has no name")
    if len(kinds) != 1:
        raise InvalidPermission(
            f"header {match.name!r}: exactly one of present, exact, prefix, suffix, contains and regex must be set"
        )
    name = match.name.lower().replace("_", "-").encode()
    invert = match.invert
    if match.present:
        return lambda request: bool(request.values(name)) is not invert
    if match.ignore_case and kinds[0] == "regex":
        raise InvalidPermission(f"header {match.name!r}: ignore_case does not go with regex: write (?i) there")
    test = _value_test(kinds[0], getattr(match, kinds[0]), fold=match.ignore_case)
    combine = all if every else any

    def condition(request: Request) -> bool:
        values = request.values(name)
        if not values:
            return invert
        return combine(test(value) is not invert for value in values)

    return condition


def _value_test(kind: str, text: str, *, fold: bool) -> Callable[[bytes], bool]:
    value = text.encode()
    if fold:
        value = value.lower()
        if kind == "exact":
            return lambda given: given.lower() == value
        if kind == "prefix":
            return lambda given: given.lower().startswith(value)
        if kind == "suffix":
            return lambda given: given.lower().endswith(value)
        return lambda given: value in given.lower()
    if kind == "exact":
        return lambda given: given == value
    if kind == "prefix":
        return lambda given: given.startswith(value)
    if kind == "suffix":
        return lambda given: given.endswith(value)
    if kind == "contains":
        return lambda given: value in given
    fullmatch = _regex(text)
    # Bytes that are not UTF-8 stand as their Latin-1 characters, or a "." would not match them.
    return lambda given: fullmatch(_text(given))


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
