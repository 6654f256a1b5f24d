"""Flags as the walkthrough types them: ``-name X``, ``-name=X``, ``--name X``, anywhere among the arguments.

argparse can not do it: it matches prefixes of single-dash long options and reads ``-http`` as ``-h ttp``.
Nouns: a *command* is a leaf that runs (``services register``); a *family* is a word with commands under it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cli.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def duration(text: str) -> float:
    """Parse ``250ms``, ``10s``, ``1.5m``, ``2h`` or plain seconds. Returns seconds; raises :class:`ValueError`."""
    total, position = 0.0, 0
    for part in _DURATION.finditer(text):
        if part.start() != position:
            break
        total, position = total + float(part[1]) * _SECONDS[part[2]], part.end()
    if not text or position != len(text):
        raise ValueError("a duration such as 500ms, 10s or 2m")
    return total


def whole(text: str) -> int:
    """Parse a whole number of at least 0. Raises :class:`ValueError`."""
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number")
    return int(text)


def port(text: str) -> int:
    """Parse a TCP port, 0 meaning none. Raises :class:`ValueError`."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError("a port number from 0 to 65535")
    return int(text)


def ratio(text: str) -> float:
    """Parse a number from 0 to 1. Raises :class:`ValueError`."""
    if not re.fullmatch(r"[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20}", text, re.ASCII) or float(text) > 1:
        raise ValueError("a number from 0 to 1, such as 0.01")
    return float(text)


def truth(text: str) -> bool:
    """Parse a boolean as Go's flag package does. Raises :class:`ValueError`."""
    if text in ("1", "t", "T", "true", "True", "TRUE"):
        return True
    if text in ("0", "f", "F", "false", "False", "FALSE"):
        return False
    raise ValueError("true or false")


@dataclass(frozen=True)
class Flag:
    """One flag. A ``switch`` needs no value (``-x``, ``-x=false``); ``many`` may be given several times."""

    name: str
    help: str
    value: str = "VALUE"
    """How the help names the value."""
    parse: Callable[[str], Any] = str
    switch: bool = False
    many: bool = False
    aliases: tuple[str, ...] = ()
    required: bool = False


class Args:
    """The parsed arguments of one command."""

    def __init__(self, values: Mapping[str, Any], words: Sequence[str], rest: Sequence[str]) -> None:
        self._values = values
        self.words = list(words)
        """Arguments that are no flags, up to ``--``."""
        self.rest = list(rest)
        """What follows ``--``."""

    def given(self, name: str) -> bool:
        """Tell whether the flag was typed."""
        return name in self._values

    def text(self, name: str, default: str = "") -> str:
        """Return a flag's text."""
        return str(self._values.get(name, default))

    def number(self, name: str, default: int = 0) -> int:
        """Return a flag's whole number."""
        return int(self._values.get(name, default))

    def seconds(self, name: str, default: float) -> float:
        """Return a flag's duration in seconds."""
        return float(self._values.get(name, default))

    def share(self, name: str) -> float:
        """Return a flag's number from 0 to 1."""
        return float(self._values.get(name, 0.0))

    def on(self, name: str) -> bool:
        """Return a switch."""
        return bool(self._values.get(name, False))

    def many(self, name: str) -> list[str]:
        """Return every value of a flag that may be repeated."""
        return [str(value) for value in self._values.get(name, ())]


@dataclass(frozen=True)
class Command:
    """A leaf of the command tree. ``run`` returns the exit code."""

    summary: str
    run: Callable[[Args], int]
    flags: tuple[Flag, ...] = ()
    words: str = ""
    """How the usage line shows the positional arguments, such as ``SOURCE DESTINATION``."""
    words_least: int = 0
    words_most: int | None = 0
    """None: any number."""
    rest: bool = False
    """Whether ``-- CMD ARGS`` may follow."""
    details: str = ""
    """Help text below the summary."""


@dataclass(frozen=True)
class Family:
    """Commands under one word. ``alone`` runs when the next argument is none of their names."""

    summary: str
    commands: Mapping[str, Command] = field(default_factory=dict)
    alone: Command | None = None


HELP = ("-h", "-help", "--help", "--h")


class HelpWanted(Exception):
    """``-h``, ``-help`` or ``--help`` stands among the arguments."""


def suggest(word: str, known: Sequence[str]) -> str:
    """Return `` Did you mean …?`` for a word close to a known one, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse(command: Command, name: str, argv: Sequence[str]) -> Args:
    """Parse ``argv`` for ``command``. Raises :class:`UsageError` with one clear sentence, or :class:`HelpWanted`."""
    known = {spelling: flag for flag in command.flags for spelling in (flag.name, *flag.aliases)}
    values: dict[str, Any] = {}
    words: list[str] = []
    rest: list[str] = []
    where = f"lictor {name}"
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            rest = arguments
            break
        if argument in HELP:
            raise HelpWanted
        if not argument.startswith("-") or argument == "-" or re.fullmatch(r"-\d+", argument):
            words.append(argument)
            continue
        spelled, has_value, text = argument.removeprefix("-").removeprefix("-").partition("=")
        flag = known.get(spelled)
        if flag is None:
            dashed = [f"-{spelling}" for spelling in known]
            raise UsageError(f"{where}: unknown flag -{spelled}.{suggest('-' + spelled, dashed)} See: {where} -help")
        if flag.switch and not has_value:
            text = "true"
        elif not has_value:
            if not arguments:
                raise UsageError(f"{where}: flag -{spelled} needs a value ({flag.value})")
            text = arguments.pop(0)
        try:
            value = truth(text) if flag.switch else flag.parse(text)
        except ValueError as error:
            raise UsageError(f"{where}: flag -{spelled} must be {error}, not {text!r}") from None
        if flag.many:
            values.setdefault(flag.name, []).append(value)
        elif flag.name in values and values[flag.name] != value:
            raise UsageError(f"{where}: flag -{spelled} is given twice, as {values[flag.name]} and as {value}")
        else:
            values[flag.name] = value
    _check(command, where, values, words, rest)
    return Args(values, words, rest)


def _check(command: Command, where: str, values: Mapping[str, Any], words: list[str], rest: list[str]) -> None:
    missing = [f"-{flag.name}" for flag in command.flags if flag.required and flag.name not in values]
    if missing:
        raise UsageError(f"{where}: missing {' and '.join(missing)}. See: {where} -help")
    if len(words) < command.words_least:
        raise UsageError(f"{where}: expects {command.words}. See: {where} -help")
    if command.words_most is not None and len(words) > command.words_most:
        extra = words[command.words_most]
        raise UsageError(f"{where}: unexpected argument {extra!r}. See: {where} -help")
    if rest and not command.rest:
        raise UsageError(f"{where}: nothing may follow --. See: {where} -help")


def usage(command: Command, name: str) -> str:
    """Return the help text of a command."""
    line = f"Usage: lictor {name} [flags]"
    if command.words:
        line += f" {command.words}"
    if command.rest:
        line += " [-- CMD ARGS]"
    lines = [line, "", f"  {command.summary}"]
    if command.details:
        lines += ["", *(f"  {text}".rstrip() for text in command.details.strip("\n").split("\n"))]
    if command.flags:
        lines += ["", "Flags:"]
        shown = [f"  -{flag.name}" + ("" if flag.switch else f" {flag.value}") for flag in command.flags]
        width = min(max(len(text) for text in shown), 34)
        for text, flag in zip(shown, command.flags, strict=True):
            needed = " (required)" if flag.required else ""
            lines.append(f"{text:<{width}}  {flag.help}{needed}")
    return "\n".join(lines)


def family_usage(family: Family, name: str) -> str:
    """Return the help text of a family: its commands and what they do."""
    lines = [f"Usage: lictor {name} COMMAND [flags]", "", f"  {family.summary}", "", "Commands:"]
    width = max((len(word) for word in family.commands), default=0)
    lines += [f"  {word:<{width}}  {command.summary}" for word, command in family.commands.items()]
    lines += ["", f"lictor {name} COMMAND -help tells more of each."]
    return "\n".join(lines)
