"""``lictor lock``: run a program while a lock is held, on one machine out of many.

The lock is the key ``PREFIX/.lock`` with the flags of Consul's client library, so that ``consul lock`` and programs
written with that library respect it, and it respects theirs.

Its session ends by its TTL alone, not with the agent's node: otherwise the loss of an agent would pass the lock on
while the program here still runs. The time is counted from before each renewal was sent, so that the program is told
to end before the servers may give the lock to another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli.client import API_FLAGS, Api, quote
from cli.errors import CliError, NoAgent, NoLeader, OutcomeUnknown, Refused, UsageError
from cli.flags import Args, Command, Family, Flag, duration
from cli.output import note

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_FLAGS = 0x2DDCCBC058A50C18
"""The value by which Consul's client library tells that a key is a lock of this kind."""
TTL_S, TTL_S_MIN = 15.0, 10.0
RETRY_S = 0.5
KILL_AFTER_S = 5.0
"""A program that was told to end has this long."""
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PASSING = (NoLeader, NoAgent, OutcomeUnknown)


class _Stopped(CliError):
    """A signal came while we waited for the lock."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name} before the lock was ours")
        self.exit_code = 128 + number


class Lock:
    """One attempt to hold a key. Every method but :meth:`lost` asks the agent."""

    def __init__(self, api: Api, key: str, ttl_s: float, name: str) -> None:
        self.api = replace(api, wait_s=ttl_s / 3, query={})
        self.key, self.ttl_s = key, ttl_s
        self.path = f"/v1/kv/{'/'.join(quote(part) for part in key.split('/'))}"
        self._patient = api
        self._name = name
        self.good_until = 0.0
        self.session = ""

    def open(self) -> None:
        """Create the session that the lock hangs on."""
        body = {"Name": self._name, "TTL": f"{self.ttl_s:g}s", "NodeChecks": []}
        # A signal waits until we know the session's id: otherwise nobody would end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
        try:
            self.good_until = time.monotonic() + self.ttl_s
            self.session = self._patient.put("/v1/session/create", body).json()["ID"]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)

    def acquire(self, give_up_at: float) -> None:
        """Wait until the key is ours. Raises CliError at ``give_up_at`` (monotonic), or when it is not a lock."""
        index = 0
        while True:
            try:
                self.renew()
                row, index = self.read(index, min(self.ttl_s / 4, max(give_up_at - time.monotonic(), 0.0)))
                if row is not None and row["Flags"] != LOCK_FLAGS:
                    raise CliError(f"the key {self.key} is in use for something else; choose another PREFIX")
                if row is not None and row.get("Session") == self.session:
                    return
                if row is None or not row.get("Session"):
                    params = {"acquire": self.session, "flags": str(LOCK_FLAGS)}
                    if self.api.put(self.path, b"", params).json():
                        return
                    # Nobody holds it and we may not: it rests for its lock delay after its holder's failure.
                    index = 0
                    time.sleep(RETRY_S)
            except _PASSING as error:
                if time.monotonic() > self.good_until:
                    raise
                note(f"still waiting for {self.key}: {error}")
                time.sleep(RETRY_S)
            if time.monotonic() >= give_up_at:
                raise CliError(
                    f"the lock {self.key} was not free in time. Its holder: lictor kv get -detailed {self.key}"
                )

    def read(self, index: int, wait_s: float) -> tuple[dict[str, Any] | None, int]:
        """Return the key's row and index, once it differs from ``index`` or the time has passed."""
        params = {"consistent": ""} | ({"index": str(index), "wait": f"{wait_s * 1000:.0f}ms"} if index else {})
        answer = self.api.get(self.path, params, allow_404=True)
        row = answer.json()[0] if answer.status == 200 else None
        return row, int(answer.headers.get("X-Consul-Index", "0"))

    def renew(self) -> None:
        """Start the session's time again. Raises CliError if it has ended."""
        sent_at = time.monotonic()
        answer = self.api.write("PUT", f"/v1/session/renew/{self.session}", allow_404=True)
        if answer.status == 404:
            raise CliError(f"the session of {self.key} has ended, and the lock with it")
        self.good_until = sent_at + self.ttl_s

    def keep(self, over: threading.Event) -> str:
        """Keep the lock until ``over``; return why it is lost, or an empty text."""
        index = 0
        while not over.is_set():
            try:
                self.renew()
                row, index = self.read(index, self.ttl_s / 4)
                if row is None or row.get("Session") != self.session:
                    return "its key was released or deleted"
            except _PASSING as error:
                if time.monotonic() + RETRY_S > self.good_until:
                    return f"the servers could not be asked for {self.ttl_s:g} s ({error})"
                over.wait(RETRY_S)
            except CliError as error:
                return str(error)
        return ""

    def release(self) -> None:
        """Give the lock back at once and remove what is left of it. The session's end would do the same, later."""
        if not self.session:
            return
        try:
            self._patient.put(self.path, b"", {"release": self.session, "flags": str(LOCK_FLAGS)})
            self._patient.put(f"/v1/session/destroy/{self.session}")
            answer = self._patient.get(self.path, {"consistent": ""}, allow_404=True)
            if answer.status == 200 and not answer.json()[0].get("Session"):
                index = str(answer.json()[0]["ModifyIndex"])
                self._patient.write("DELETE", self.path, params={"cas": index})
        except (Refused, *_PASSING) as error:
            note(f"the lock {self.key} was not given back ({error}); it is free {self.ttl_s:g} s from now")


@contextmanager
def _signals(child: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand signals on to the program; before it runs they end the wait. A terminal's Ctrl-C reaches it by itself."""

    def handle(number: int, _: FrameType | None) -> None:
        if not child:
            raise _Stopped(number)
        if number != signal.SIGINT:
            child[0].send_signal(number)

    before = [signal.signal(number, handle) for number in _HANDED_ON]
    try:
        yield
    finally:
        for number, handler in zip(_HANDED_ON, before, strict=True):
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(lock: Lock, command: list[str], child: list[subprocess.Popen[bytes]]) -> int:
    held = {"CONSUL_LOCK_HELD": "true", "LICTOR_LOCK_HELD": "true"}
    try:
        process = subprocess.Popen(command, env={**os.environ, **held})
    except OSError as error:
        raise CliError(f"can't run {command[0]!r}: {error.strerror}") from None
    child.append(process)
    over, lost = threading.Event(), []

    def watch() -> None:
        if why := lock.keep(over):
            lost.append(why)
            _end(process)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    over.set()
    # The watcher may be parked at the agent for a quarter of the TTL; there is nothing left for it to do.
    if lost:
        watcher.join()
        raise CliError(f"the lock {lock.key} was lost, and {command[0]} was ended: {lost[0]}")
    return 128 - code if code < 0 else code


def lock(args: Args) -> int:
    """Hold the lock, run the program, give the lock back; the exit code is the program's."""
    prefix, command = args.words[0].strip("/"), [*args.words[1:], *args.rest]
    if not prefix:
        raise UsageError("lictor lock: PREFIX must be a key. See: lictor lock -help")
    if not command:
        raise UsageError("lictor lock: expects PREFIX -- CMD ARGS. See: lictor lock -help")
    ttl_s = args.seconds("ttl", TTL_S)
    if ttl_s < TTL_S_MIN:
        raise UsageError(f"lictor lock: flag -ttl must be at least {TTL_S_MIN:g}s")
    give_up_at = time.monotonic() + args.seconds("timeout", float("inf"))
    child: list[subprocess.Popen[bytes]] = []
    with _signals(child):
        held = Lock(Api.of(args), f"{prefix}/.lock", ttl_s, args.text("name", f"lictor lock for {prefix}"))
        try:
            held.open()
            held.acquire(give_up_at)
            return _run(held, command, child)
        finally:
            held.release()


FAMILIES = {
    "lock": Family(
        "Run a program while holding a lock",
        alone=Command(
            "Run CMD while the lock PREFIX/.lock is held; only one of all that ask holds it",
            lock,
            (
                Flag(
                    "timeout",
                    "give up when the lock is not free in this time (default: wait)",
                    "TIME",
                    parse=duration,
                ),
                Flag("ttl", "how soon the lock is free if this machine dies (default 15s)", "TIME", parse=duration),
                Flag("name", "name of the session"),
                *API_FLAGS,
            ),
            "PREFIX",
            1,
            None,
            rest=True,
            details="When the lock is lost, CMD is told to end (SIGTERM, after 5 s SIGKILL) and the exit code is 1;\n"
            "otherwise the exit code is CMD's.",
        ),
    )
}
