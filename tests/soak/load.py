"""The load of a soak: one source's calls of each kind, each answer checked, each attempt told to the referee."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp
import grpc
import grpc.aio

from tests.soak.apps import BOTH, MAX_LINE, METHOD, SECRET, STREAM, pattern
from tests.soak.referee import DENIED, ERROR, OK, WRONG, Attempt, Referee

TIMEOUT_S = 15.0
BULK_BYTES = 2_000_000


class Load:
    """All calls of one source, until :meth:`stop`."""

    def __init__(self, referee: Referee, source: str, ports: dict[str, int], pause_s: float) -> None:
        self._referee = referee
        self._source = source
        self._ports = ports
        self._pause_s = pause_s
        self._numbers = itertools.count(1)
        self._ending = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._rng = random.Random(source)

    def start(self) -> None:
        """Begin."""
        works: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._lines, self._lines, self._lines, self._short, self._short, self._bulk,
            self._http, self._http, self._http_secret, self._websocket, self._websocket,
            self._grpc, self._grpc, self._grpc_both, self._grpc_both,
        ]  # fmt: skip
        self._tasks = [asyncio.get_running_loop().create_task(work()) for work in works]

    async def stop(self) -> None:
        """Let what is under way end."""
        self._ending.set()
        await asyncio.wait_for(asyncio.gather(*self._tasks), TIMEOUT_S * 3)

    def _ident(self) -> str:
        return f"{self._source}-{next(self._numbers)}"

    async def _rest(self) -> bool:
        """Pause; return whether to go on."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), self._pause_s * self._rng.uniform(0.5, 1.5))
        return not self._ending.is_set()

    @contextlib.asynccontextmanager
    async def _attempt(self, kind: str, service: str, since: float = float("inf")) -> AsyncIterator[Attempt]:
        """Note an attempt: it ends with the body, and what the body raises is an error.

        `since`: when what is kept open, a connection or a stream, was last known to be well. It may have ended before
        this attempt began, so a failure counts from there.
        """
        attempt = Attempt(kind, service, self._source, self._ident(), time.monotonic(), 0.0, OK)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                yield attempt
        except TimeoutError:
            attempt.outcome, attempt.detail = ERROR, f"no answer in {TIMEOUT_S:g} s"
            raise ConnectionError("timed out") from None
        except (OSError, EOFError, aiohttp.ClientError) as error:
            attempt.outcome, attempt.detail = ERROR, repr(error)
            raise ConnectionError(str(error)) from error
        finally:
            attempt.ended = time.monotonic()
            self._referee.note(attempt, since)

    # L4

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._ports["l4"], limit=MAX_LINE)

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, attempt: Attempt) -> None:
        payload = "x" * self._rng.randrange(2000)
        writer.write(f"{self._source} {attempt.ident} {payload}\n".encode())
        answer = (await reader.readline()).decode()
        if not answer:
            raise EOFError("connection closed")
        if answer.split(" ", 1)[1] != f"{attempt.ident} {payload}\n":
            attempt.outcome, attempt.detail = WRONG, answer[:80]

    async def _lines(self) -> None:
        """A connection that is kept."""
        while await self._rest():
            with contextlib.suppress(OSError):
                reader, writer = await self._connect()
                with contextlib.closing(writer):
                    well = time.monotonic()
                    while await self._rest():
                        async with self._attempt("l4", "l4", well) as attempt:
                            await self._line(reader, writer, attempt)
                        well = attempt.ended

    async def _short(self) -> None:
        """A connection for each call."""
        while await self._rest():
            with contextlib.suppress(OSError):
                async with self._attempt("l4-short", "l4") as attempt:
                    reader, writer = await self._connect()
                    with contextlib.closing(writer):
                        await self._line(reader, writer, attempt)

    async def _bulk(self) -> None:
        while await self._rest():
            with contextlib.suppress(OSError):
                async with self._attempt("l4-bulk", "l4") as attempt:
                    reader, writer = await self._connect()
                    with contextlib.closing(writer):
                        writer.write(f"{self._source} {attempt.ident} !{BULK_BYTES}\n".encode())
                        writer.write_eof()
                        if (data := await reader.read(-1)) != pattern(attempt.ident, BULK_BYTES):
                            short = pattern(attempt.ident, BULK_BYTES).startswith(data)
                            attempt.outcome = ERROR if short else WRONG
                            attempt.detail = f"{len(data)} of {BULK_BYTES} bytes"

    # HTTP

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._ports['http']}{path}"

    async def _http(self) -> None:
        headers = {"x-source": self._source}
        async with aiohttp.ClientSession(headers=headers) as session:
            while await self._rest():
                with contextlib.suppress(OSError):
                    async with self._attempt("http", "http") as attempt:
                        body = pattern(attempt.ident, self._rng.choice((0, 0, 500, 200_000)))
                        method = "POST" if body else "GET"
                        url = self._url(f"/echo/{attempt.ident}")
                        async with session.request(method, url, data=body or None) as answer:
                            got = await answer.read()
                            self._check(attempt, answer, got, body or pattern(attempt.ident, 2000))

    @staticmethod
    def _check(attempt: Attempt, answer: aiohttp.ClientResponse, got: bytes, wanted: bytes) -> None:
        if answer.status == 403:
            attempt.outcome, attempt.detail = DENIED, "403"
        elif answer.status != 200:
            attempt.outcome, attempt.detail = ERROR, f"{answer.status} {got[:100]!r}"
        elif got != wanted or answer.headers.get("x-ident") != attempt.ident:
            attempt.outcome, attempt.detail = WRONG, f"{len(got)} bytes, {answer.headers.get('x-ident')}"

    async def _http_secret(self) -> None:
        async with aiohttp.ClientSession(headers={"x-source": self._source}) as session:
            while await self._rest():
                with contextlib.suppress(OSError):
                    async with self._attempt("http-403", "http") as attempt:
                        async with session.get(self._url(f"/secret/{attempt.ident}")) as answer:
                            await answer.read()
                            if answer.status == 200:
                                attempt.outcome = WRONG
                            elif answer.status != 403:
                                attempt.outcome, attempt.detail = ERROR, str(answer.status)

    async def _websocket(self) -> None:
        async with aiohttp.ClientSession(headers={"x-source": self._source}) as session:
            while await self._rest():
                with contextlib.suppress(OSError):
                    async with self._attempt("ws-open", "http") as attempt:
                        try:
                            socket = await session.ws_connect(self._url(f"/ws/{attempt.ident}"))
                        except aiohttp.WSServerHandshakeError as error:
                            if error.status != 403:
                                raise
                            attempt.outcome, attempt.detail = DENIED, "403"
                            continue
                    try:
                        well = attempt.ended
                        while await self._rest():
                            async with self._attempt("ws", "http", well) as attempt:
                                sent = f"{attempt.ident} {'y' * self._rng.randrange(3000)}"
                                await socket.send_str(sent)
                                message = await socket.receive()
                                if message.type is not aiohttp.WSMsgType.TEXT:
                                    raise EOFError(f"WebSocket ended: {message.type!r}")
                                if message.data != sent:
                                    attempt.outcome = WRONG
                            well = attempt.ended
                    finally:
                        await socket.close()

    # gRPC

    def _channel(self) -> grpc.aio.Channel:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1),
        ]  # fmt: skip
        return grpc.aio.insecure_channel(f"127.0.0.1:{self._ports['grpc']}", options=options)

    @staticmethod
    def _ended(attempt: Attempt, code: grpc.StatusCode, details: str | None) -> None:
        attempt.outcome = DENIED if code is grpc.StatusCode.PERMISSION_DENIED else ERROR
        attempt.detail = f"{code} {details}"

    async def _grpc_both(self) -> None:
        """A stream that goes both ways and is kept."""
        async with self._channel() as channel:
            both = channel.stream_stream(BOTH)
            while await self._rest():
                call = both(wait_for_ready=True)
                try:
                    well = time.monotonic()
                    while await self._rest():
                        with contextlib.suppress(OSError):
                            async with self._attempt("grpc-both", "grpc", well) as attempt:
                                size = self._rng.choice((10, 3000, 150_000))
                                request = f"{self._source} {attempt.ident} {'z' * size}".encode()
                                try:
                                    await call.write(request)
                                    answer = await call.read()
                                    if answer is grpc.aio.EOF:
                                        self._ended(attempt, await call.code(), await call.details())
                                    elif answer != request:
                                        attempt.outcome = WRONG
                                except asyncio.InvalidStateError:  # how grpcio says that the call is over
                                    self._ended(attempt, await call.code(), await call.details())
                                except grpc.aio.AioRpcError as error:
                                    self._ended(attempt, error.code(), error.details())
                        if attempt.outcome != OK:
                            break
                        well = attempt.ended
                finally:
                    call.cancel()

    async def _grpc(self) -> None:
        async with self._channel() as channel:
            unary, secret = channel.unary_unary(METHOD), channel.unary_unary(SECRET)
            stream = channel.unary_stream(STREAM)

            async def down(attempt: Attempt, request: bytes) -> bytes:
                got = [part async for part in stream(request, wait_for_ready=True, timeout=TIMEOUT_S / 2)]
                return request if got == [f"{attempt.ident} {n}".encode() for n in range(20)] else b"".join(got)

            async def once(attempt: Attempt, request: bytes) -> bytes:
                return bytes(await unary(request, wait_for_ready=True, timeout=TIMEOUT_S / 2))

            async def forbidden(attempt: Attempt, request: bytes) -> bytes:
                try:
                    await secret(request, wait_for_ready=True, timeout=TIMEOUT_S / 2)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                        return request
                    raise
                return b"served"

            kinds = (("grpc", once), ("grpc", once), ("grpc-down", down), ("grpc-403", forbidden))
            for kind, call in itertools.cycle(kinds):
                if not await self._rest():
                    return
                with contextlib.suppress(OSError):
                    async with self._attempt(kind, "grpc") as attempt:
                        request = f"{self._source} {attempt.ident} {'z' * self._rng.randrange(3000)}".encode()
                        try:
                            if await call(attempt, request) != request:
                                attempt.outcome = WRONG
                        except grpc.aio.AioRpcError as error:
                            self._ended(attempt, error.code(), error.details())
