"""Blocking queries that wait: requests with the same head wait in one place and get the same answer.

A request that waits is no task, only an entry in its place. When the place's query may have something newer the
handler runs once, for all who wait there, and its answer is handed out some connections a turn of the loop, so that
ten thousand readers do not hold up everyone else. The head holds all that an answer depends on, the token included,
and the handler's guards run again with it; the read is made after each of the requests came, so it is as fresh as any
of them asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from node.backend import WAIT_S_MAX
from node.errors import NodeError
from node.http.front.heads import Head
from node.http.front.repeats import Ask, Body, Parked
from node.http.options import wait_of
from node.tasks import Tasks

if TYPE_CHECKING:
    from node.http.front.connection import Connection

log = logging.getLogger("lictor.http")

ANSWERS_A_TURN = 50
"""Of the loop: each takes some 50 us, most of it the kernel's."""

Newer = Callable[[str, Mapping[str, Any], int, float], Awaitable[None]]
"""`Backend.newer`."""


class Place:
    """Where requests with one head wait, each until its own time is up."""

    __slots__ = ("head", "late", "parked", "readers", "task")

    def __init__(self, head: Head, parked: Parked) -> None:
        self.head, self.parked = head, parked
        self.readers: dict[Connection, asyncio.TimerHandle] = {}
        self.late: list[Connection] = []
        """Whose time has passed while their answer was being made."""
        self.task: asyncio.Task[None] | None = None


class Parking:
    """All places of a listener."""

    def __init__(self, newer: Newer, rng: random.Random | None = None) -> None:
        self._newer = newer
        self._rng = rng or random.Random()
        self._places: dict[bytes, Place] = {}
        self._by_reader: dict[Connection, Place] = {}
        self._tasks = Tasks("parked queries")

    def __len__(self) -> int:
        return len(self._by_reader)

    def enter(self, reader: Connection, head: Head, parked: Parked) -> None:
        """Let a request wait for ``parked.wait_s`` at most; it is then ``reader`` gets ``take`` or ``again``."""
        self._enter(reader, head, parked, parked.wait_s)

    def enter_at_once(self, reader: Connection, head: Head, ask: Ask) -> bool:
        """Let a request wait whose handler would find nothing newer; False: let the handler look."""
        parked = head.parked
        try:
            result = ask(parked.name, parked.params)
        except NodeError:
            return False  # the handler will meet it too, and has the words
        if result is None or result.ends_wait(parked.min_index):
            return False
        self._enter(reader, head, parked, wait_of(head.message.url.query, self._rng))
        return True

    def _enter(self, reader: Connection, head: Head, parked: Parked, wait_s: float) -> None:
        place = self._places.get(head.raw)
        if place is None:
            place = self._places[head.raw] = Place(head, parked)
            place.task = self._tasks.spawn(self._keep(place))
        place.readers[reader] = asyncio.get_running_loop().call_later(wait_s, self._time_up, reader)
        self._by_reader[reader] = place

    def leave(self, reader: Connection) -> None:
        """The reader is gone."""
        place = self._by_reader.pop(reader, None)
        if place is None:
            return
        place.readers.pop(reader).cancel()
        if not place.readers and self._places.get(place.head.raw) is place:
            del self._places[place.head.raw]
            if place.task is not None:
                place.task.cancel()

    def _time_up(self, reader: Connection) -> None:
        place = self._by_reader[reader]
        if self._places.get(place.head.raw) is place:
            self.leave(reader)
            reader.again(place.head)
        else:
            place.late.append(reader)  # its answer is being made

    async def _keep(self, place: Place) -> None:
        """Wait for something newer, then answer all who wait here."""
        head, parked = place.head, place.parked
        while place.readers:
            waits = True
            try:
                await self._newer(parked.name, parked.params, parked.min_index, WAIT_S_MAX)
            except NodeError as error:
                log.debug("http: waiting for %s: %s", parked.name, error)
                waits = False
            self._places.pop(head.raw, None)  # who comes from now on has to be told what is true from now on
            if not place.readers:
                return
            try:
                answer, ends = await next(iter(place.readers)).make(head, Body(b"", waits=waits))
            except Parked:
                if self._go_on(place):
                    continue
                return
            await self._hand_out(place, answer, ends=ends)
            return

    def _go_on(self, place: Place) -> bool:
        """Take a place up again whose query had nothing newer after all; False: there is nothing left to wait for."""
        late, place.late = place.late, []
        for reader in late:
            if reader in place.readers:
                self.leave(reader)
                reader.again(place.head)
        other = self._places.get(place.head.raw)
        if other is None:
            if place.readers:
                self._places[place.head.raw] = place
            return bool(place.readers)
        for reader, timer in place.readers.items():
            other.readers[reader] = timer
            self._by_reader[reader] = other
        place.readers.clear()
        return False

    async def _hand_out(self, place: Place, answer: bytes, *, ends: bool) -> None:
        given = 0
        while place.readers:
            reader, timer = place.readers.popitem()
            timer.cancel()
            del self._by_reader[reader]
            reader.take(answer, ends=ends)
            given += 1
            if given % ANSWERS_A_TURN == 0:
                await asyncio.sleep(0)

    async def close(self) -> None:
        """Wait for nothing any more; the connections are ended by their listener."""
        await self._tasks.close()
