"""What commands print: plain tables, JSON, and colour on a terminal only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_CODES = {"green": "32", "red": "31", "yellow": "33", "bold": "1", "dim": "2", "cyan": "36"}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as columns two spaces apart, as Consul's commands print them."""
    cells = [list(map(str, head)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def colourful(stream: TextIO | None = None) -> bool:
    """Tell whether to colour: on a terminal, unless NO_COLOR (no-color.org) is set."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str) -> str:
    """Return the text in a colour (or bold, dim) if stdout takes it."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if colourful() else text


def note(text: str) -> None:
    """Tell the user something that is not the command's output: to stderr."""
    print(text, file=sys.stderr, flush=True)
