"""Consul's filter expressions: ``ServiceMeta.env == "prod" and (not "old" in ServiceTags or Port is empty)``.

:func:`compile_filter` parses once; the result is a predicate over rows in Consul's JSON shape (builtins). Selectors
are dotted names, ``Meta["a.b"]`` or JSON pointers ``"/Meta/a.b"``. A selector that a row does not have is empty,
since optional fields are left out of rows. A selector that leads through a list means any of its elements.
Work is bounded: length and nesting here, the time of ``matches`` by RE2.

Source: Consul's "Filtering" page and hashicorp/go-bexpr's description of its language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

MAX_EXPRESSION = 4096
MAX_DEPTH = 64

Predicate = Callable[[Any], bool]

_GRAMMAR = r"""
    ?start: any_of
    ?any_of: all_of ("or" all_of)*
    ?all_of: term ("and" term)*
    ?term: "not" term -> negate
         | "(" any_of ")"
         | operand "==" operand -> equal
         | operand "!=" operand -> not_equal
         | operand "is" "empty" -> empty
         | operand "is" "not" "empty" -> not_empty
         | operand "matches" operand -> matches
         | operand "not" "matches" operand -> not_matches
         | operand "contains" operand -> contains
         | operand "not" "contains" operand -> not_contains
         | operand "in" operand -> within
         | operand "not" "in" operand -> not_within
    operand: NAME part* -> path
           | STRING -> string
           | RAW -> raw
           | NUMBER -> number
    part: "." NAME | "." INDEX | "[" STRING "]" | "[" RAW "]"
    STRING: /"(?:[^"\\]|\\.)*"/
    RAW: /`[^`]*`/
    NUMBER: /-?[0-9]+(?:\.[0-9]+)?/
    INDEX: /[0-9]+/
    NAME: /[A-Za-z][A-Za-z0-9_\/-]*/
    %ignore /[ \t\r\n]+/
"""


@cache
def _parser() -> Any:
    import lark  # some 3 MiB with the grammar's tables: most agents never see a filter

    return lark.Lark(_GRAMMAR, parser="lalr", maybe_placeholders=False)


class BadFilter(ValueError):
    """The expression is malformed, or does not fit the values it meets; the text shows where."""


def compile_filter(expression: str) -> Predicate:
    """Return the predicate of an expression. Raises :class:`BadFilter`."""
    if len(expression) > MAX_EXPRESSION:
        raise BadFilter(f"filter is longer than {MAX_EXPRESSION} characters")
    return _compile(expression)


def apply_filter(expression: str, rows: list[Any]) -> list[Any]:
    """Return the rows for which the expression holds. Raises :class:`BadFilter`."""
    predicate = compile_filter(expression)
    return [row for row in rows if predicate(row)]


@lru_cache(maxsize=256)
def _compile(expression: str) -> Predicate:
    parser = _parser()
    import lark

    try:
        tree = parser.parse(expression)
    except lark.exceptions.UnexpectedInput as error:
        column = getattr(error, "column", 0)
        raise BadFilter(f"filter expression is malformed at column {column}: {expression[:200]!r}") from error
    except lark.exceptions.LarkError as error:
        raise BadFilter(f"filter expression is malformed: {expression[:200]!r}") from error
    return _predicate(tree, 0)


def _predicate(tree: Any, depth: int) -> Predicate:
    if depth > MAX_DEPTH:
        raise BadFilter(f"filter is nested deeper than {MAX_DEPTH}")
    kind = tree.data
    if kind in ("any_of", "all_of"):
        parts = [_predicate(child, depth + 1) for child in tree.children]
        if kind == "any_of":
            return lambda row: any(part(row) for part in parts)
        return lambda row: all(part(row) for part in parts)
    if kind == "negate":
        return _not(_predicate(tree.children[0], depth + 1))
    if kind.startswith("not_"):
        return _not(_comparison(kind[4:], tree.children))
    return _comparison(kind, tree.children)


def _not(inner: Predicate) -> Predicate:
    return lambda row: not inner(row)


def _comparison(kind: str, operands: list[Any]) -> Predicate:
    if kind == "empty":
        path = _path(operands[0])
        return lambda row: all(_is_empty(value) for value in _select(row, path))
    chosen, wanted = (operands[1], operands[0]) if kind == "within" else (operands[0], operands[1])
    path, text = _path(chosen), _text(wanted)
    if kind == "equal":
        return lambda row: any(_equals(value, text) for value in _select(row, path))
    if kind == "matches":
        import re2  # 3 MiB with libstdc++

        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        try:
            pattern = re2.compile(text, options)
        except re2.error as error:
            raise BadFilter(f"filter has a bad regular expression {text[:80]!r}: {error}") from error
        return lambda row: any(
            isinstance(value, str) and pattern.search(value) is not None for value in _select(row, path)
        )
    return lambda row: any(_holds(value, text) for value in _select(row, path))


def _path(operand: Any) -> tuple[str, ...]:
    """Return a selector's parts. A string that is a JSON pointer is a selector as well."""
    if operand.data == "path":
        first, *rest = operand.children
        parts = [str(first)]
        for part in rest:
            token = part.children[0]
            parts.append(_unquote(str(token)) if token.type in ("STRING", "RAW") else str(token))
        return tuple(parts)
    if operand.data == "string":
        text = _unquote(str(operand.children[0]))
        if text.startswith("/") and len(text) > 1:
            return tuple(part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/"))
    raise BadFilter(f"filter needs a field's name where it has {operand.children[0]!s}")


def _text(operand: Any) -> str:
    if operand.data == "path":
        return ".".join(str(part if isinstance(part, str) else part.children[0]) for part in operand.children)
    token = str(operand.children[0])
    return token if operand.data == "number" else _unquote(token)


def _unquote(token: str) -> str:
    if token.startswith("`"):
        return token[1:-1]
    out, characters = [], iter(token[1:-1])
    for character in characters:
        if character != "\\":
            out.append(character)
            continue
        escaped = next(characters, "\\")
        out.append({"n": "\n", "t": "\t", "r": "\r"}.get(escaped, escaped))
    return "".join(out)


def _select(row: Any, path: tuple[str, ...]) -> list[Any]:
    """Return the values a selector leads to; one ``None`` when the row has none."""
    values = [row]
    for part in path:
        following: list[Any] = []
        for value in values:
            if isinstance(value, dict):
                if part in value:
                    following.append(value[part])
            elif isinstance(value, list | tuple):
                if part.isdigit() and part.isascii():
                    following.extend(value[int(part) : int(part) + 1])
                else:
                    following.extend(item[part] for item in value if isinstance(item, dict) and part in item)
        values = following
    return values or [None]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _equals(value: Any, text: str) -> bool:
    if value is None:
        return text == ""
    if isinstance(value, bool):
        if text.lower() in ("true", "false", "1", "0", "t", "f"):
            return value == (text.lower() in ("true", "1", "t"))
        raise BadFilter(f"filter compares a boolean with {text[:40]!r}")
    if isinstance(value, int | float):
        try:
            return value == (int(text) if isinstance(value, int) else float(text))
        except ValueError:
            raise BadFilter(f"filter compares a number with {text[:40]!r}") from None
    if isinstance(value, str):
        return value == text
    raise BadFilter("filter compares a list or map with ==; use in, contains or is empty")


def _holds(value: Any, text: str) -> bool:
    if isinstance(value, str | dict):
        return text in value
    if isinstance(value, list | tuple):
        return any(isinstance(item, str | int | float) and _equals(item, text) for item in value)
    return False
