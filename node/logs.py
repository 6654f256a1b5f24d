"""Log lines of a node: one line each, ``key=value``, to stderr. A secret has no place in any of them."""

from __future__ import annotations

import datetime
import logging
import sys
import traceback

_LEVELS = {"WARNING": "warn", "CRITICAL": "crit"}


def quoted(text: str) -> str:
    """Return text as a value: in quotes when it needs them, always on one line."""
    if text and text.isprintable() and not any(mark in text for mark in ' "=\\'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return (
        '"'
        + "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in escaped)
        + '"'
    )


class KeyValueFormatter(logging.Formatter):
    """``time=… level=… from=… msg=…``, and ``error=…`` with where it was raised."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        level = _LEVELS.get(record.levelname, record.levelname.lower())
        line = (
            f"time={moment.isoformat(timespec='milliseconds').replace('+00:00', 'Z')} level={level} "
            f"from={record.name} msg={quoted(record.getMessage())}"
        )
        if record.exc_info and record.exc_info[1] is not None:
            line += f" trace={quoted(''.join(traceback.format_exception(record.exc_info[1]))[-4000:])}"
        return line


def set_up_logging(level: str) -> None:
    """Send every logger's lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(getattr(logging, level.upper()))
    # Its warnings name our own shutdown; what matters of them is logged by us.
    logging.getLogger("aiohttp.access").setLevel(logging.ERROR)
