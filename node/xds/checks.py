"""The health checks by which Envoys ask this agent about the instances that they call.

The first request of a connection is answered at once, because Envoy leads no call to an instance that was not found
healthy yet; those after it are held until their instance is withdrawn, and fail then. What is not known is healthy:
a check ends calls and allows none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from urllib.parse import unquote

import httptools

from proxy.logs import LimitedLog

log = logging.getLogger("lictor.xds")

CHECKS_MAX = 4096
"""Connections of all Envoys of this node; more are dropped, and Envoy goes on with what it knows."""
HEAD_BYTES_MAX = 4096
ASK_S = 30.0
"""Within which a check must come whole, after the connection was made or the last one was answered: whoever does not
ask keeps no place from an Envoy. One that comes late, from a process that was stopped, makes a new connection."""
HOLD_S = 600.0
"""After so long a held request is answered all the same; Envoy asks again."""
FAILED, PASSED = b"HTTP/1.1 503 Withdrawn\r\n", b"HTTP/1.1 200 OK\r\n"
_NO_BODY = b"content-length: 0\r\n\r\n"
Name = tuple[str, str]
"""An Envoy's sidecar, and an instance as :func:`node.xds.leaving.label` names it."""


class Checks:
    """What is withdrawn, and who awaits it."""

    def __init__(self) -> None:
        self.connections: set[CheckConnection] = set()
        self._held: dict[Name, set[CheckConnection]] = {}
        self._withdrawn: dict[str, set[str]] = {}
        self._told: dict[Name, set[CheckConnection]] = {}
        """Of what is withdrawn, the connections on which it was said."""
        self._owing: dict[Name, set[CheckConnection]] = {}
        """Those of them, held when it was withdrawn, on which nothing was asked since. Nobody can answer for them."""
        self._acknowledged: dict[str, set[str]] = {}
        self._changed: dict[str, Callable[[], None]] = {}
        self._unasked: dict[str, set[str]] = {}
        self._log = LimitedLog(log)

    def follow(self, envoy: str, changed: Callable[[], None]) -> None:
        """Call ``changed`` when :meth:`acknowledged` grows, and when nothing is :meth:`unasked` any more."""
        self._changed[envoy] = changed

    def forget(self, envoy: str) -> None:
        """The Envoy's stream has ended: nothing is known of its instances."""
        self.withdraw(envoy, ())
        for table in (self._withdrawn, self._acknowledged, self._changed, self._unasked):
            table.pop(envoy, None)

    def withdraw(self, envoy: str, labels: Collection[str]) -> None:
        """Fail the checks of these instances, all that are withdrawn, and no others of the Envoy."""
        before, now = self._withdrawn.get(envoy, set()), set(labels)
        self._withdrawn[envoy] = now
        self._acknowledged[envoy] = self._acknowledged.get(envoy, set()) & now
        for one in before - now:
            self._told.pop((envoy, one), None)
            self._owing.pop((envoy, one), None)
        for one in now - before:
            held = set(self._held.get((envoy, one), ()))
            self._told[envoy, one], self._owing[envoy, one] = set(), set(held)
            for connection in held:
                connection.end_hold()

    def acknowledged(self, envoy: str) -> set[str]:
        """Return the instances whose checks have failed and were made once more: Envoy has ended the calls."""
        return set(self._acknowledged.get(envoy, ()))

    def expect(self, envoy: str, labels: Collection[str]) -> None:
        """Look out for the first checks of these instances."""
        self._unasked[envoy] = self._unasked.get(envoy, set()) | set(labels)

    def unasked(self, envoy: str) -> set[str]:
        """Return the instances that are expected to be asked about and were not yet."""
        return self._unasked.get(envoy, set())

    def fails(self, name: Name, connection: CheckConnection) -> bool:
        """Answer a check that was made: whether it fails."""
        envoy, one = name
        unasked = self._unasked.get(envoy, set())
        if one in unasked:
            unasked.discard(one)
            if not unasked and (changed := self._changed.get(envoy)) is not None:
                changed()
        if one not in self._withdrawn.get(envoy, ()):
            return False
        if connection in self._told[name]:
            self._acted(name, connection)
        self._told[name].add(connection)
        return True

    def closed(self, connection: CheckConnection) -> None:
        """A connection has ended: who was told something on it has read it, or is no more."""
        for name, told in self._told.items():
            if connection in told:
                self._acted(name, connection)

    def _acted(self, name: Name, connection: CheckConnection) -> None:
        envoy, one = name
        self._owing[name].discard(connection)
        if self._owing[name] or one in self._acknowledged[envoy]:
            return
        self._acknowledged[envoy].add(one)
        if (changed := self._changed.get(envoy)) is not None:
            changed()

    def is_withdrawn(self, name: Name) -> bool:
        """Whether a check would fail."""
        return name[1] in self._withdrawn.get(name[0], ())

    def hold(self, name: Name, connection: CheckConnection) -> None:
        """A request awaits its instance's withdrawal."""
        self._held.setdefault(name, set()).add(connection)

    def release(self, name: Name, connection: CheckConnection) -> None:
        """It does not any more."""
        if (held := self._held.get(name)) is not None:
            held.discard(connection)
            if not held:
                del self._held[name]

    def take(self, transport: asyncio.Transport, early: bytes) -> None:
        """Serve a connection whose first bytes are ``early``."""
        if len(self.connections) >= CHECKS_MAX:
            self._log.warning("full", f"more than {CHECKS_MAX} checks of instances by Envoys: one is dropped")
            transport.abort()
            return
        connection = CheckConnection(self, transport)
        transport.set_protocol(connection)
        connection.data_received(early)

    def close(self) -> None:
        """End all connections."""
        for connection in tuple(self.connections):
            connection.abort()


class CheckConnection(asyncio.Protocol):
    """One instance's checks by one Envoy."""

    def __init__(self, checks: Checks, transport: asyncio.Transport) -> None:
        self._checks, self._transport = checks, transport
        self._parser = httptools.HttpRequestParser(self)
        self._head_bytes = 0
        self._path, self._host = b"", b""
        self._ready = False
        """The last answer was no failure and there was one: the next waits."""
        self._name: Name | None = None
        self._timer = asyncio.get_running_loop().call_later(ASK_S, self.abort)
        """Until the next check must have come, or the one that is held is answered."""
        checks.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        try:
            if self._name is not None or self._head_bytes > HEAD_BYTES_MAX:
                raise ValueError
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        self._checks.connections.discard(self)
        self._checks.closed(self)

    def abort(self) -> None:
        """Drop the connection."""
        self._let_go()
        self._checks.connections.discard(self)
        self._transport.abort()

    def end_hold(self) -> None:
        """Answer the request that is held."""
        if (name := self._name) is not None:
            self._let_go()
            self._answer(name)

    # httptools' callbacks

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"host":
            self._host = value

    def on_message_complete(self) -> None:
        if self._name is not None:
            raise ValueError("a request behind one that is held")
        name = (unquote(self._path.decode("latin-1").removeprefix("/")), self._host.decode("latin-1"))
        self._path, self._host, self._head_bytes = b"", b"", 0
        if not self._ready or self._checks.is_withdrawn(name):
            self._answer(name)
            return
        self._name = name
        self._checks.hold(name, self)
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(HOLD_S, self.end_hold)

    def _answer(self, name: Name) -> None:
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(ASK_S, self.abort)
        failed = self._checks.fails(name, self)
        self._ready = not failed
        self._transport.write((FAILED if failed else PASSED) + _NO_BODY)

    def _let_go(self) -> None:
        self._timer.cancel()
        if self._name is not None:
            self._checks.release(self._name, self)
            self._name = None
