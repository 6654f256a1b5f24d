"""An HTTP request as permissions see it, and the one rule by which its path is read.

A permission is only as good as the agreement between sidecar and app about what a path means, so:

1. What is matched is the path without the query, with percent-escapes decoded once (UTF-8), runs of ``/`` merged,
   then ``.`` and ``..`` segments removed (RFC 3986, section 5.2.4).
2. A path that was not in that form already is forwarded in it (escapes other than of unreserved characters kept),
   so that the app decides on the path that the permission was decided on.
3. A path that apps are known to read in different ways is *ambiguous* and never permitted: an escaped slash,
   backslash or control character, a bare backslash or ``#``, a broken escape, escapes that do not decode to UTF-8,
   a dot, slash or backslash escaped twice, a dot segment with a parameter (``/..;x/``), one that climbs above the
   root, a byte that is not ASCII.
4. A segment's parameters (what follows a ``;`` in it) are part of the path to some apps, and not to others. Where
   there are any, an ``allow`` must cover both readings, and a ``deny`` covers either; a rule that has a ``;`` itself
   means the path as it is.

The rule applies where permissions do; without them a path is passed on untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote_to_bytes

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@\-][A-Za-z0-9._~!$&'()*+,=:@\-]*)+/?|/")
"""Paths that are in normal form beyond doubt; nearly all are, and they skip the rest."""
_LEGAL = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/%\"<>\[\]^`{|}\-]*")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_TWICE = re.compile(r"%(?:2[eEfF]|5[cC])")
_PARAMETERS = re.compile(r";[^/]*")
_SLASHES = re.compile(r"/{2,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class AmbiguousPath(ValueError):
    """The path can be read in more than one way; the text says what makes it so."""


def normal_path(path: str) -> tuple[str, str]:
    """Return ``path`` (no query) in the form that is matched and in the form that is forwarded.

    Raises :class:`AmbiguousPath`.
    """
    if _PLAIN.fullmatch(path):
        return path, path
    if not path.startswith("/"):
        raise AmbiguousPath("path does not begin with /")
    if not _LEGAL.fullmatch(path):
        raise AmbiguousPath("path has a character that must be escaped")
    if _BROKEN_ESCAPE.search(path):
        raise AmbiguousPath("path has a broken percent-escape")
    encoded = _ESCAPE.sub(_reduce_escape, path)
    if "%2F" in encoded or "%5C" in encoded:
        raise AmbiguousPath("path has an escaped slash or backslash")
    segments: list[str] = []
    pieces = [piece for piece in encoded.split("/") if piece]
    directory = not pieces or encoded.endswith("/") or pieces[-1] in (".", "..")
    for piece in pieces:
        if piece == "..":
            if not segments:
                raise AmbiguousPath("path climbs above the root")
            segments.pop()
        elif piece.split(";", 1)[0].split("%3B", 1)[0] in (".", "..") and piece != ".":
            raise AmbiguousPath("path has a dot segment with a parameter")
        elif piece != ".":
            segments.append(piece)
    encoded = "/" + "/".join(segments) + ("/" if directory and segments else "")
    try:
        decoded = unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError as error:
        raise AmbiguousPath("path does not decode to UTF-8") from error
    if _CONTROL.search(decoded):
        raise AmbiguousPath("path has an escaped control character")
    if _TWICE.search(decoded):
        raise AmbiguousPath("path has a dot, slash or backslash that is escaped twice")
    return decoded, encoded


def _reduce_escape(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()


class Request:
    """What permissions can see of a request. Read-only for its users; the path's reading is kept once made."""

    __slots__ = ("_bare", "_encoded", "_matched", "_problem", "headers", "method", "target")

    def __init__(self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """``target`` is the path with or without query; ``headers`` are in order, names in lower case."""
        self.method = method
        self.target = target
        self.headers = headers
        self._matched: str | None = None
        self._bare = ""
        self._encoded = ""
        self._problem = ""

    @classmethod
    def of(cls, method: str, target: str, headers: Mapping[str, str] | None = None) -> Request:
        """Make a request of text, as API and command line have it."""
        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        return cls(method, target, pairs)

    def __repr__(self) -> str:
        return f"Request({self.method!r}, {self.target!r})"

    def _read(self) -> None:
        path = self.target.partition("?")[0]
        if path == "*":
            self._matched = self._encoded = path
            return
        try:
            self._matched, self._encoded = normal_path(path)
        except AmbiguousPath as error:
            self._matched, self._problem = "", str(error)
        else:
            if ";" in self._matched:
                self._bare = _SLASHES.sub("/", _PARAMETERS.sub("", self._matched))

    @property
    def path(self) -> str:
        """The path as it is matched; ``*`` for a request about the server itself; empty when ambiguous."""
        if self._matched is None:
            self._read()
        return self._matched or ""

    @property
    def bare_path(self) -> str:
        """The path as apps read it that know parameters of segments; empty when it has none."""
        if self._matched is None:
            self._read()
        return self._bare

    @property
    def ambiguity(self) -> str:
        """Why the path is ambiguous; empty when it is not."""
        if self._matched is None:
            self._read()
        return self._problem

    @property
    def forward_target(self) -> str:
        """The target with its path in normal form. Meaningless when the path is ambiguous."""
        if self._matched is None:
            self._read()
        _, mark, query = self.target.partition("?")
        return self._encoded + mark + query

    def values(self, name: bytes) -> list[bytes]:
        """Return all values of a header. Gateways to CGI-like apps take ``_`` for ``-``, so this does too."""
        return [value for key, value in self.headers if key == name or key.replace(b"_", b"-") == name]
