"""Typed reading of a TOML table: every fault is collected, naming its key and the fix; unknown keys are faults."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from node.durations import parse_duration_s

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class TableReader:
    """One table of the file. Each getter returns the value or its default; a fault is noted, never raised."""

    def __init__(self, path: str, table: Any, problems: list[str]) -> None:
        self._path, self._problems = path, problems
        self._seen: set[str] = set()
        if not isinstance(table, Mapping):
            self.fault("", f"must be a table, like [{path}]")
            table = {}
        self._table: Mapping[str, Any] = table

    def fault(self, key: str, text: str) -> None:
        """Note a fault of `key`."""
        name = ".".join(part for part in (self._path, key) if part)
        self._problems.append(f"{name}: {text}")

    def _get(self, key: str, default: Any, kinds: type | tuple[type, ...], what: str) -> Any:
        self._seen.add(key)
        value = self._table.get(key, default)
        if value is default:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self.fault(key, f"must be {what}, not {value!r}")
            return default
        return value

    def has(self, key: str) -> bool:
        """Return whether the key is given."""
        return key in self._table

    def text(self, key: str, default: str = "") -> str:
        return str(self._get(key, default, str, "a string"))

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key, default)
        if value not in allowed:
            self.fault(key, f"must be one of {', '.join(allowed)}, not {value!r}")
            return default
        return value

    def boolean(self, key: str, default: bool) -> bool:
        return bool(self._get(key, default, bool, "true or false"))

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = int(self._get(key, default, int, "a whole number"))
        if not low <= value <= high:
            self.fault(key, f"must be between {low} and {high}, not {value}")
            return default
        return value

    def port(self, key: str, default: int) -> int:
        return self.integer(key, default, 0, 65535)

    def duration_s(self, key: str, default: str, low_s: float, high_s: float) -> float:
        text = self._get(key, default, str, 'a duration in quotes, like "500ms" or "10s"')
        try:
            value = round(parse_duration_s(text), 9)
        except ValueError as error:
            self.fault(key, str(error))
            return parse_duration_s(default)
        if not low_s <= value <= high_s:
            self.fault(key, f"must be between {low_s:g}s and {high_s:g}s, not {text}")
            return parse_duration_s(default)
        return value

    def address(self, key: str, default: str) -> str:
        """An IP address or a host name."""
        value = self.text(key, default)
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            if not _HOST.fullmatch(value):
                self.fault(key, f"must be an IP address or a host name, not {value!r}")
                return default
            return value

    def host_name(self, key: str) -> str:
        """A host name or nothing, lower case."""
        value = self.text(key).lower()
        if value and not _HOST.fullmatch(value):
            self.fault(key, f"must be a name like mesh.example, not {value!r}")
            return ""
        return value

    def text_map(self, key: str) -> dict[str, str]:
        value = self._get(key, {}, dict, "a table of strings")
        bad = [name for name, item in value.items() if not isinstance(item, str)]
        if bad:
            self.fault(f"{key}.{bad[0]}", f"must be a string in quotes, not {value[bad[0]]!r}")
        return {name: item for name, item in value.items() if isinstance(item, str)}

    def table(self, key: str) -> TableReader:
        """Return the reader of a sub-table; an empty one when it is left out."""
        self._seen.add(key)
        return TableReader(f"{self._path}.{key}" if self._path else key, self._table.get(key, {}), self._problems)

    def named_tables(self, key: str) -> Iterator[tuple[str, TableReader]]:
        """Yield each (name, reader) of a table of tables, names checked as DNS labels."""
        self._seen.add(key)
        tables = self._table.get(key, {})
        if not isinstance(tables, Mapping):
            self.fault(key, f"must hold tables, like [{key}.server-1]")
            return
        for name, table in tables.items():
            reader = TableReader(f"{key}.{name}", table, self._problems)
            if not _NAME.fullmatch(name):
                reader.fault("", "a node's name is letters, digits and inner dashes, 63 at most")
            yield name, reader

    def finish(self) -> None:
        """Note every key that nothing asked for, with the nearest that exists."""
        for key in self._table:
            if key not in self._seen:
                near = difflib.get_close_matches(key, self._seen, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(self._seen))}"
                self.fault(key, f"unknown key; {hint}")
