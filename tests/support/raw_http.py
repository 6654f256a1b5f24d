"""HTTP/1.1 by hand: bytes out, whole answers in. For what no client library would send."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from httptools import HttpResponseParser

from tests.support.promises import PATIENCE_S

TIMEOUT_S = PATIENCE_S


@dataclass
class RawAnswer:
    """An answer as it came."""

    status: int = 0
    reason: str = ""
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name.lower()), "")

    def stable(self) -> tuple[object, ...]:
        """Return everything but what tells the time."""
        moving = {"date": "a date", "x-consul-lastcontact": "an age", "x-cache": "a word"}
        fields = [(name, moving.get(name.lower(), value)) for name, value in self.fields]
        return self.status, self.reason, fields, self.body


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._answers: list[RawAnswer] = []
        self._now = RawAnswer()
        self._parser = HttpResponseParser(self)
        self._whole = False

    @classmethod
    async def open(cls, port: int, *, host: str = "127.0.0.1", **options: object) -> RawClient:
        return cls(*await asyncio.open_connection(host, port, **options))  # type: ignore[arg-type]

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, head_only: bool = False) -> RawAnswer:
        """Return the next answer; 1xx ones are answers too. ``head_only``: to a HEAD request."""
        if head_only:
            async with asyncio.timeout(TIMEOUT_S):
                lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            match = re.fullmatch(r"HTTP/1\.[01] (\d+) (.*)", lines[0])
            assert match is not None, lines[0]
            fields = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:-2])]
            return RawAnswer(int(match[1]), match[2], fields)
        async with asyncio.timeout(TIMEOUT_S):
            while not self._answers:
                data = await self.reader.read(65536)
                if not data:
                    raise EOFError("the connection ended before an answer")
                self._parser.feed_data(data)
        return self._answers.pop(0)

    async def ended(self) -> bytes:
        """Return what still comes until the other side has ended the connection."""
        async with asyncio.timeout(TIMEOUT_S):
            try:
                return await self.reader.read(-1)
            except ConnectionError:
                return b""

    # httptools' callbacks

    def on_message_begin(self) -> None:
        self._now = RawAnswer()

    def on_status(self, status: bytes) -> None:
        self._now.reason += status.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._now.fields.append((name.decode(), value.decode()))

    def on_body(self, body: bytes) -> None:
        self._now.body += body

    def on_message_complete(self) -> None:
        self._now.status = self._parser.get_status_code()
        self._answers.append(self._now)
