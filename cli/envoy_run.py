"""Runs one Envoy in the foreground: its bootstrap, signals, drain, deregistration."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from cli.client import Api, quote
from cli.errors import CliError, Refused
from cli.sidecar_run import DEREGISTER_WAIT_S, say

WITHDRAWAL_S = 1
"""Envoy's drain time: how long connections of a listener that was replaced may go on. Withdrawals wait for it."""
ADMIN_TIMEOUT_S = 2.0
POLL_S = 0.05
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class EnvoyPlan:
    """What to run."""

    binary: str
    row: dict[str, Any]
    """The sidecar's registration."""
    bootstrap: dict[str, Any]
    drain_s: float
    arguments: tuple[str, ...] = ()
    """More of Envoy's own arguments."""


@contextmanager
def _bootstrap_file(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Give Envoy its bootstrap, which may hold a token, in a file that has no name; (path, descriptor)."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(config).encode())
        file.flush()
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}", file.fileno()


def _end_with_parent() -> None:
    """In the child: be told to end when the parent is killed (Linux); nobody would deregister the sidecar then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class EnvoyRun:
    """One run of ``lictor connect envoy``."""

    def __init__(self, plan: EnvoyPlan, api: Api) -> None:
        self.plan, self.api = plan, api
        self._stopping = asyncio.Event()
        self._signals = 0
        self._ready = False
        self._admin_file = Path()
        """Envoy writes the address of its admin endpoint there."""

    async def run(self) -> int:
        """Run until a signal comes or Envoy ends. Returns the exit code; raises CliError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        with _bootstrap_file(self.plan.bootstrap) as (path, descriptor), tempfile.TemporaryDirectory() as directory:
            self._admin_file = Path(directory) / "admin"
            command = [
                self.plan.binary, "--config-path", path, "--use-dynamic-base-id",
                "--admin-address-path", str(self._admin_file), "--log-level", "warning",
                "--drain-time-s", str(WITHDRAWAL_S), "--drain-strategy", "immediate", *self.plan.arguments,
            ]  # fmt: skip
            try:
                # A session of its own: Ctrl-C at a terminal must not end Envoy before it is drained.
                process = await asyncio.create_subprocess_exec(
                    *command, pass_fds=(descriptor,), start_new_session=True, preexec_fn=_end_with_parent
                )
            except OSError as error:
                raise CliError(f"can't run {self.plan.binary}: {error.strerror}") from None
            ended = asyncio.ensure_future(process.wait())
            stopped = asyncio.ensure_future(self._stopping.wait())
            try:
                async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ADMIN_TIMEOUT_S)) as admin:
                    ready = asyncio.ensure_future(self._introduce(admin))
                    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    ready.cancel()
                    if not ended.done():
                        await self._drain(admin, ended)
            finally:
                stopped.cancel()
                if not ended.done():
                    with suppress(ProcessLookupError):
                        process.terminate()
                code = await ended
                await asyncio.to_thread(self._deregister)
        if self._stopping.is_set():
            return 0
        if not self._ready:
            raise CliError(f"Envoy ended with status {code} before it was ready; it said why above")
        return code if code > 0 else 128 - code

    def _on_signal(self) -> None:
        self._signals += 1
        self._stopping.set()

    async def _introduce(self, admin: aiohttp.ClientSession) -> None:
        """Wait until Envoy serves, and say what it is."""
        while not await self._public_listener_is_up(admin):  # noqa: ASYNC110 - another process' state
            await asyncio.sleep(POLL_S)
        self._ready = True
        row = self.plan.row
        proxy = row["Proxy"]
        service, instance = proxy["DestinationServiceName"], proxy["DestinationServiceID"]
        say(f"Envoy of {service} ({instance}) is ready, pid {os.getpid()}")
        say(f"  public    {proxy['Config']['bind_address']}:{row['Port']}")
        for one in proxy["Upstreams"] or ():
            name = one.get("UpstreamName") or one["DestinationName"]
            say(f"  upstream  {name} -> localhost:{one['LocalBindPort']}")
        say(f"  admin     http://{self._admin_address()}/")

    async def _public_listener_is_up(self, admin: aiohttp.ClientSession) -> bool:
        listeners = await self._ask(admin, "get", "listeners")
        return "public::" in listeners and (await self._ask(admin, "get", "ready")).strip() == "LIVE"

    def _admin_address(self) -> str:
        return self._admin_file.read_text().strip() if self._admin_file.exists() else ""

    async def _ask(self, admin: aiohttp.ClientSession, method: str, path: str) -> str:
        address = self._admin_address()
        if not address:
            return ""
        try:
            async with admin.request(method, f"http://{address}/{path}") as answer:
                return await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ""

    async def _drain(self, admin: aiohttp.ClientSession, ended: asyncio.Future[int]) -> None:
        """Let callers go elsewhere, and wait until the calls that live are over."""
        service = quote(self.plan.row["ID"])
        with suppress(CliError):
            await asyncio.to_thread(
                self._short_api().put, f"/v1/agent/service/maintenance/{service}", None, {"enable": "true"}
            )
        await self._ask(admin, "post", "drain_listeners?graceful&skip_exit")
        with suppress(TimeoutError):
            async with asyncio.timeout(self.plan.drain_s):
                while not ended.done() and self._signals < 2 and await self._live_calls(admin):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)

    async def _live_calls(self, admin: aiohttp.ClientSession) -> int:
        # listener.<address>.downstream_cx_active; not the admin listener's own.
        text = await self._ask(admin, "get", "stats?filter=^listener%5C..*downstream_cx_active$")
        rows = [line.rpartition(": ") for line in text.splitlines()]
        return sum(int(count) for name, _, count in rows if "admin" not in name and count.isdigit())

    def _short_api(self) -> Api:
        return Api(self.api.address, wait_s=DEREGISTER_WAIT_S, token=self.api.token, ca_file=self.api.ca_file)

    def _deregister(self) -> None:
        sidecar_id = self.plan.row["ID"]
        try:
            self._short_api().put(f"/v1/agent/service/deregister/{quote(sidecar_id)}")
        except CliError as error:
            if not (isinstance(error, Refused) and error.status == 404):
                say(f"the sidecar stays registered as {sidecar_id}, critical: {error}")


def run_envoy(plan: EnvoyPlan, api: Api) -> int:
    """Run one Envoy to its end. Returns the exit code; raises CliError."""
    return asyncio.run(EnvoyRun(plan, api).run())
