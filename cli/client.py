"""The HTTP API client that every command stands on: any HTTP client could do the same.

It waits a bounded time while an election runs, and tags each write with ``X-Lictor-Request-Id``, under which the
cluster applies it once however often it is sent, so that a retry is safe.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cli.errors import CliError, NoAgent, NoLeader, OutcomeUnknown, Refused, UsageError
from cli.flags import Args, Flag, duration

DEFAULT_ADDRESS = "127.0.0.1:8500"
DEFAULT_WAIT_S = 10.0
GRACE_S = 2.0
"""An agent waits for a leader itself; it gets this much longer than we wait, so that its own words reach the user."""
PROBE_TIMEOUT_S = 1.0
REQUEST_ID_HEADER = "X-Lictor-Request-Id"

API_FLAGS = (
    Flag("http-addr", "agent to ask; else LICTOR_HTTP_ADDR, CONSUL_HTTP_ADDR, 127.0.0.1:8500", "HOST:PORT"),
    Flag("wait", "how long to wait while the cluster elects a leader (default 10s)", "TIME", parse=duration),
    Flag("token", "access token; else LICTOR_HTTP_TOKEN, CONSUL_HTTP_TOKEN", "TOKEN"),
    Flag("token-file", "file with the token; else LICTOR_HTTP_TOKEN_FILE, CONSUL_HTTP_TOKEN_FILE", "FILE"),
    Flag("ca-file", "CA certificates for https; else LICTOR_CACERT, CONSUL_CACERT", "FILE"),
)
READ_FLAGS = (
    *API_FLAGS,
    Flag("stale", "let any node answer, leader or not", switch=True),
    Flag("consistent", "let the leader confirm with a quorum first", switch=True),
    Flag("json", "print the API's JSON", switch=True),
)


@dataclass(frozen=True)
class Answer:
    """A successful reply: its status (200, or 404 where a caller allows it), headers and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise CliError(f"the agent's answer is not JSON: {self.body[:80]!r}. Is this a Lictor agent?") from None

    @property
    def text(self) -> str:
        """Return the body as text."""
        return self.body.decode("utf-8", "replace").strip()


def _token(args: Args, pick: Callable[..., str]) -> str:
    """Return the access token; what was typed goes before the environment, and a token before a file."""
    if args.given("token") and args.given("token-file"):
        raise UsageError("-token and -token-file contradict each other; give one")
    if not args.given("token-file") and (token := pick("token", "LICTOR_HTTP_TOKEN", "CONSUL_HTTP_TOKEN")):
        return token
    path = pick("token-file", "LICTOR_HTTP_TOKEN_FILE", "CONSUL_HTTP_TOKEN_FILE")
    if not path:
        return ""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"the token file {path} cannot be read: {error}") from None


@dataclass
class Api:
    """One agent's HTTP API."""

    address: str = DEFAULT_ADDRESS
    """``host:port``, ``http://host:port``, ``https://host:port`` or ``unix:///path``."""
    wait_s: float = DEFAULT_WAIT_S
    token: str = ""
    ca_file: str = ""
    query: dict[str, str] = field(default_factory=dict)
    """Parameters that go with every read, such as ``stale``."""

    @classmethod
    def of(cls, args: Args) -> Api:
        """Make a client from the flags and the environment."""
        environment = os.environ

        def pick(flag: str, *names: str, default: str = "") -> str:
            return args.text(flag) or next((environment[n] for n in names if environment.get(n)), default)

        query = {mode: "" for mode in ("stale", "consistent") if args.on(mode)}
        if len(query) > 1:
            raise UsageError("-stale and -consistent contradict each other; give one")
        return cls(
            pick("http-addr", "LICTOR_HTTP_ADDR", "CONSUL_HTTP_ADDR", default=DEFAULT_ADDRESS),
            args.seconds("wait", DEFAULT_WAIT_S),
            _token(args, pick),
            pick("ca-file", "LICTOR_CACERT", "CONSUL_CACERT"),
            query,
        )

    @property
    def base_url(self) -> str:
        """Return the address as a URL without a trailing slash."""
        return (self.address if "://" in self.address else f"http://{self.address}").rstrip("/")

    def get(self, path: str, params: Mapping[str, str] | None = None, *, allow_404: bool = False) -> Answer:
        """Read. With ``allow_404`` a 404 is an answer and not an error."""
        return self._ask("GET", path, {**self.query, **(params or {})}, None, {}, allow_404)

    def put(self, path: str, body: Any = None, params: Mapping[str, str] | None = None) -> Answer:
        """Write with PUT; ``body`` is sent as JSON unless it is bytes."""
        return self.write("PUT", path, body, params)

    def write(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        *,
        allow_404: bool = False,
        once: bool = False,
    ) -> Answer:
        """Write. Sent again until it is known to be applied or the time is up; the request id makes that safe.

        `once` is for what twice would undo: it is not sent again where it may have been applied.
        """
        payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return self._ask(method, path, params or {}, payload, {REQUEST_ID_HEADER: _request_id()}, allow_404, once)

    def read_stream(self, path: str) -> Iterator[bytes]:
        """Yield the body of a GET in chunks, such as a snapshot's."""
        connection, response = self._once("GET", path, self.query, None, {}, timeout_s=60.0)
        try:
            if response.status != 200:
                raise _refusal(response.status, response.read())
            while chunk := response.read(65536):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"the answer broke off: {_describe(error)}; nothing usable was received") from None
        finally:
            connection.close()

    def put_file(self, path: str, file: BinaryIO) -> Answer:
        """PUT a file's content."""
        connection, response = self._once("PUT", path, {}, file, {REQUEST_ID_HEADER: _request_id()}, timeout_s=120.0)
        try:
            body = response.read()
            if response.status != 200:
                raise _refusal(response.status, body)
            return Answer(200, dict(response.headers), body)
        finally:
            connection.close()

    def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: bytes | None,
        headers: dict[str, str],
        allow_404: bool,
        once: bool = False,
    ) -> Answer:
        deadline = time.monotonic() + self.wait_s
        pause_s, sent = 0.05, False
        while True:
            left_s = max(deadline - time.monotonic(), 0.5)
            problem: CliError
            try:
                connection, response = self._once(method, path, params, body, headers, timeout_s=left_s + GRACE_S)
                try:
                    content = response.read()
                finally:
                    connection.close()
            except NoAgent as error:
                if not sent:
                    raise
                problem = OutcomeUnknown(f"{error}; an earlier attempt of this write may have been applied")
            except _Broken as error:
                sent = sent or method != "GET"
                problem = self._lost(method, str(error))
            else:
                if response.status == 200 or (allow_404 and response.status == 404):
                    return Answer(response.status, dict(response.headers), content)
                problem = _refusal(response.status, content)
                if isinstance(problem, _TimedOut) and method != "GET":
                    problem = OutcomeUnknown(f"{problem}; the write may or may not have been applied")
                if not isinstance(problem, NoLeader | OutcomeUnknown | _Busy):
                    raise problem
                sent = sent or isinstance(problem, OutcomeUnknown)
            if time.monotonic() + pause_s >= deadline or (once and sent):
                if sent and not isinstance(problem, OutcomeUnknown):
                    problem = OutcomeUnknown(f"{problem} (an earlier attempt may have been applied)")
                raise problem
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 1.6, 0.5)

    def _lost(self, method: str, reason: str) -> CliError:
        if method == "GET" and self._lives():
            return NoLeader(
                f"the agent at {self.address} lives, but had no answer from the cluster in time ({reason}). See:"
                " lictor members -stale; lictor cluster status"
            )
        if method == "GET":
            return NoAgent(f"the agent at {self.address} broke the connection: {reason}")
        return OutcomeUnknown(
            f"the agent at {self.address} went away before it answered ({reason}); the write may or may not have been"
            " applied. Look, then run the command again"
        )

    def _lives(self) -> bool:
        """Tell whether the agent answers what it needs no cluster for."""
        try:
            connection, response = self._once("GET", "/v1/agent/services", {}, None, {}, timeout_s=PROBE_TIMEOUT_S)
        except (_Broken, CliError):
            return False
        connection.close()
        return response.status < 600

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        url = urllib.parse.urlsplit(self.base_url)
        try:
            if url.scheme == "unix":
                return _UnixConnection(url.path, timeout_s)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError
            if url.scheme == "https":
                context = ssl.create_default_context(cafile=self.ca_file or None)
                return http.client.HTTPSConnection(url.hostname, url.port or 8501, timeout=timeout_s, context=context)
            return http.client.HTTPConnection(url.hostname, url.port or 8500, timeout=timeout_s)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"not an agent's address: {self.address!r}. Expected HOST:PORT, http(s)://HOST:PORT or unix:///PATH"
                + (f" ({error})" if str(error) else "")
            ) from None

    def _once(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: bytes | BinaryIO | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send one request. Raises :class:`NoAgent` if surely nothing was sent, else :class:`_Broken`."""
        connection = self._connection(timeout_s)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise NoAgent(
                f"no agent answers at {self.address} ({_describe(error)}). Start one: lictor cluster up, or lictor"
                " agent -config FILE -node NAME; or name another with -http-addr or LICTOR_HTTP_ADDR"
            ) from None
        target = path + ("?" + urllib.parse.urlencode(params) if params else "")
        sent_headers = dict(headers)
        if self.token:
            sent_headers["X-Consul-Token"] = self.token
        if body is not None:
            sent_headers["Content-Type"] = (
                "application/json" if isinstance(body, bytes) else "application/octet-stream"
            )
        try:
            connection.request(method, target, body, sent_headers, encode_chunked=False)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _Broken(_describe(error)) from error


class _Broken(Exception):
    """The connection broke after it stood."""


class _Busy(CliError):
    """The agent asks to try again later."""


class _TimedOut(NoLeader):
    """The agent had no answer from the servers within its own bound."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def quote(part: str) -> str:
    """Encode one segment of a path; ids may hold any character."""
    return urllib.parse.quote(part, safe="")


def _request_id() -> str:
    return os.urandom(16).hex()


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _refusal(status: int, body: bytes) -> CliError:
    """Translate an error reply. The texts of Consul's API are the contract: status 500 means many things."""
    text = body.decode("utf-8", "replace").strip() or http.client.responses.get(status, str(status))
    lowered = text.lower()
    if "no cluster leader" in lowered:
        return NoLeader(f"{text}: the servers have elected none in time. See: lictor members; lictor cluster status")
    if "outcome" in lowered and "unknown" in lowered:
        return OutcomeUnknown(text)
    if status == 503 and "no server" in lowered:
        return NoLeader(text)
    if status == 504 or "no answer within the deadline" in lowered:
        return _TimedOut(text)
    if status in (429, 503):
        return _Busy(text)
    return Refused(text, status)
