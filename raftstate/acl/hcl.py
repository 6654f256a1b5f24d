"""The part of HCL that policies are written in: attributes and labelled blocks, with comments.

Source: HashiCorp's HCL 1 specification, of which policies use attributes with texts, and blocks with one label. The
parser is table-driven and builds from the inside out, so that no depth of nesting costs it its stack.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lark

_GRAMMAR = r"""
start: entry*
entry: name "=" value ","?          -> attribute
     | name STRING* body ","?       -> block
body: "{" entry* "}"
?value: STRING -> text
      | body
      | WORD -> word
      | NUMBER -> number
      | "[" [value ("," value)* ","?] "]" -> listing
name: WORD | STRING -> quoted
WORD: /[A-Za-z_][A-Za-z0-9_-]*/
STRING: /"(?:[^"\\\x00-\x1f]|\\.)*"/
NUMBER: /-?[0-9]+(?:\.[0-9]+)?/
COMMENT: /(?:#|\/\/)[^\n]*/ | /\/\*(?:[^*]|\*(?!\/))*\*\//
%import common.WS
%ignore WS
%ignore COMMENT
"""

Entry = tuple[str, tuple[str, ...], Any]
"""(name, labels, value): the value of a block is a list of entries; that of an attribute a text, number, word or
list."""


class BadSyntax(ValueError):
    """The text is not HCL as policies use it; the message names line and column."""


@functools.cache
def _parser() -> lark.Lark:
    import lark  # some 3 MiB with the grammar's tables: most nodes never see a policy

    def unquoted(token: Any) -> str:
        try:
            return str(json.loads(str(token)))
        except ValueError:
            raise BadSyntax(
                f"line {token.line}: {str(token)[:60]} is not a text (escapes are those of JSON)"
            ) from None

    @lark.v_args(inline=True)
    class Build(lark.Transformer[Any, Any]):
        """Makes entries while the parser goes along."""

        def start(self, *entries: Entry) -> list[Entry]:
            return list(entries)

        body = start

        def attribute(self, name: str, value: Any) -> Entry:
            return name, (), value

        def block(self, name: str, *rest: Any) -> Entry:
            return name, tuple(unquoted(label) for label in rest[:-1]), rest[-1]

        def name(self, word: Any) -> str:
            return str(word)

        def quoted(self, text: Any) -> str:
            return unquoted(text)

        text = quoted

        def word(self, word: Any) -> Any:
            return ("word", str(word))

        def number(self, text: Any) -> float:
            return float(text)

        def listing(self, *values: Any) -> Any:
            return ("list", values)

    return lark.Lark(_GRAMMAR, parser="lalr", transformer=Build(), maybe_placeholders=False)


def parse_hcl(text: str) -> list[Entry]:
    """Return the entries of a text. Raises BadSyntax."""
    import lark

    try:
        entries: Any = _parser().parse(text)
    except BadSyntax:
        raise
    except lark.exceptions.UnexpectedInput as error:
        line, column = getattr(error, "line", "?"), getattr(error, "column", "?")
        raise BadSyntax(f'line {line}, column {column}: expected NAME = "…" or NAME "…" {{ … }}') from None
    except lark.exceptions.VisitError as error:
        if isinstance(error.orig_exc, BadSyntax):
            raise error.orig_exc from None
        raise
    found: list[Entry] = entries
    return found
