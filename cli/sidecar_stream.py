"""The sidecar's stream of configuration from the local agent, dialled again for ever when it breaks.

While there is no agent the sidecar keeps what it has: nothing opens that was closed, nothing closes that was open.
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from cli.client import Api, quote
from cli.errors import CliError, NoAgent, NoLeader, Refused
from cli.sidecar_left import Left
from raftstate.model.sidecar import SidecarAnswer, SidecarUpdate
from raftstate.model.wire import to_json

PID_HEADER = "X-Lictor-Pid"
ANSWERS_HEADER = "X-Lictor-Answers"
ANSWER_TIMEOUT_S = 5.0
SILENCE_S = 30.0
"""The agent sends a line now and then; after this long without one the connection is taken for dead."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
CONNECT_TIMEOUT_S = 5.0
MAX_LINE_BYTES = 64 << 20


class Broken(Exception):
    """The stream ended or could not be opened; it may be tried again."""


class UpdateStream:
    """Opens the stream, yields its updates, opens it again. One per sidecar."""

    def __init__(
        self,
        api: Api,
        sidecar_id: str,
        definition: dict[str, Any],
        *,
        say: Callable[[str], None],
        applied: Callable[[], None],
    ) -> None:
        self._api = api
        self._url = f"{_http_base(api)}/v1/agent/connect/proxy/{quote(sidecar_id)}/stream"
        self._answer_url = f"{_http_base(api)}/v1/agent/connect/answer/{quote(sidecar_id)}"
        self._answering: asyncio.Task[None] | None = None
        self._body = msgspec.json.encode(definition)
        self._say = say
        self._applied = applied
        """Called after the sidecar has taken an update."""
        self._left = Left()
        self._reminded = True
        """Whether the agent that has opened the stream knows what calls were led to before it did."""
        self._upstreams_came = False
        """Whether it has said where they are led to."""
        self._decoder = msgspec.json.Decoder(SidecarUpdate)
        self._session: aiohttp.ClientSession | None = None
        self._response: aiohttp.ClientResponse | None = None

    async def open(self, wait_s: float) -> None:
        """Open the stream for the first time. Raises :class:`CliError` when it is refused or nobody answers."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                self._response = await self._dial()
                return
            except Broken as error:
                raise NoAgent(
                    f"no agent answers at {self._api.address} ({error}). Start one: lictor cluster up"
                ) from None
            except NoLeader:
                if loop.time() + pause_s > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.6, LONGEST_PAUSE_S)

    async def updates(self) -> AsyncGenerator[SidecarUpdate, None]:
        """Yield updates for ever; never ends by itself."""
        pause_s = FIRST_PAUSE_S
        lost = ""
        """What was last said of the agent's absence; empty while it is followed."""
        while True:
            try:
                response = self._response or await self._dial()
                self._response = None
                self._reminded = self._upstreams_came = False
                async with aclosing(self._lines(response)) as lines:
                    async for line in lines:
                        if lost:
                            self._say("the agent is back; following it again")
                        lost, pause_s = "", FIRST_PAUSE_S
                        update = self._decoder.decode(line)
                        yield update
                        self._applied()
                        if update.upstreams is not None:
                            self._left.follow(update.upstreams)
                            self._upstreams_came = True
                        self._answer()
                news = "lost the agent: it closed the stream"
            except Refused as error:
                news = f"the agent takes this sidecar no longer: {error}"
            except (Broken, CliError) as error:
                news = lost or f"lost the agent: {error}"
            except msgspec.DecodeError as error:
                news = f"the agent sent what can't be read: {error}"
            if news != lost:
                lost = news
                self._say(f"{news}; going on with what is known, and trying again")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 1.6, LONGEST_PAUSE_S)

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        if self._answering is not None:
            answering, self._answering = self._answering, None
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        if self._response is not None:
            self._response.close()
            self._response = None
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def _dial(self) -> aiohttp.ClientResponse:
        """Send the registration. Raises :class:`Broken`, or a :class:`CliError` when the agent says no."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S)
            self._session = aiohttp.ClientSession(connector=_connector(self._api), timeout=timeout)
        headers = {"Content-Type": "application/json", **self._headers()}
        try:
            response = await self._session.post(self._url, data=self._body, headers=headers)
            if response.status == 200:
                return response
            text = (await response.text()).strip()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Broken(str(error) or type(error).__name__) from None
        if "no cluster leader" in text.lower() or response.status in (429, 503):
            raise NoLeader(text)
        raise Refused(text or f"the agent answered with status {response.status}", response.status)

    def _answer(self) -> None:
        """Tell the agent that the line was taken, which so knows a stopped sidecar; one answer may do for several."""
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._send_answer())

    async def _send_answer(self) -> None:
        while self._session is not None:
            left = self._left.told() if self._upstreams_came and not self._reminded else {}
            timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
            body = to_json(SidecarAnswer(left=left)) if left else None
            try:
                async with self._session.put(
                    self._answer_url, data=body, headers=self._headers(), timeout=timeout
                ) as response:
                    await response.read()
                    taken = response.status == 200
            except (aiohttp.ClientError, TimeoutError, OSError):
                return  # whether the agent is there shows on the stream; the next line is answered anew
            if self._reminded or not self._upstreams_came:
                return
            if left == self._left.told():
                self._reminded = taken
                return

    def _headers(self) -> dict[str, str]:
        headers = {PID_HEADER: str(os.getpid()), ANSWERS_HEADER: "1"}
        if self._api.token:
            headers["X-Consul-Token"] = self._api.token
        return headers

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        # Not StreamReader.readline: a line that names thousands of endpoints exceeds its limit.
        kept = bytearray()
        try:
            async for chunk in response.content.iter_any():
                kept += chunk
                if b"\n" not in chunk:
                    if len(kept) > MAX_LINE_BYTES:
                        raise Broken(f"a line of more than {MAX_LINE_BYTES} bytes")
                    continue
                *whole, rest = bytes(kept).split(b"\n")
                kept = bytearray(rest)
                for line in whole:
                    if line.strip():
                        yield line
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Broken(str(error) or type(error).__name__) from None
        finally:
            response.close()


def _http_base(api: Api) -> str:
    return "http://localhost" if urlsplit(api.base_url).scheme == "unix" else api.base_url


def _connector(api: Api) -> aiohttp.BaseConnector:
    url = urlsplit(api.base_url)
    if url.scheme == "unix":
        return aiohttp.UnixConnector(url.path)
    if url.scheme == "https":
        return aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=api.ca_file or None))
    return aiohttp.TCPConnector()
