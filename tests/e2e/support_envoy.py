"""Envoys on a real cluster, the apps behind them and the connections through them, for the end-to-end tests."""

from __future__ import annotations

import http.client
import json
import os
import socket
import socketserver
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cli.envoy import find_binary
from cli.errors import CliError, Refused
from tests.e2e.support_e2e import Mesh
from tests.support.apps import QuietHandler, serving
from tests.support.promises import PATIENCE_S

TIMEOUT_S = PATIENCE_S
GREETING = b"welcome\n"
ENVOY, LICTOR = "envoy", "lictor"


def need_envoy() -> None:
    """Skip the test where Envoy is not installed; in CI that is a failure."""
    try:
        find_binary("")
    except CliError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


class _Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(GREETING)
        while line := self.rfile.readline():
            self.wfile.write(b"%s %s" % (self.server.name, line))  # type: ignore[attr-defined]


class Web(QuietHandler):
    def do_GET(self) -> None:
        self.answer(200, json.dumps(dict(self.headers.items())).encode())

    do_POST = do_GET


def echo(name: str = "one") -> Any:
    """An app that speaks first, then echoes lines."""
    return serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo), name)


class Line:
    """One connection to the echo app."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._socket = socket.socket()
        self._socket.settimeout(TIMEOUT_S)
        self._reset = False
        """It was taken, refused and reset before this thread came to look: connecting itself tells of the reset."""
        try:
            self._socket.connect((host, int(port)))
        except (ConnectionResetError, BrokenPipeError):  # not ConnectionRefusedError
            self._reset = True
        self._file = self._socket.makefile("rb")

    def hear(self) -> bytes:
        """Return a line, empty when the connection has ended."""
        try:
            return b"" if self._reset else self._file.readline()
        except ConnectionError:
            return b""

    def ask(self, text: bytes = b"hello\n") -> bytes:
        try:
            if not self._reset:
                self._socket.sendall(text)
        except ConnectionError:
            return b""
        return self.hear()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def call(address: str) -> bytes:
    """Return the echo of one new connection, empty when it is refused; a refused caller hears nothing at all."""
    line = Line(address)
    try:
        heard = line.hear()
        assert heard in (GREETING, b"")
        answer = line.ask()
        assert bool(answer) <= bool(heard)
        return answer or heard
    finally:
        line.close()


def stand(mesh: Mesh, kind: str, name: str, port: int, *arguments: str, host: int = 0) -> str:
    """Register an instance and stand a sidecar of a kind before it; returns the instance's id."""
    instance = f"{name}-{host + 1}"
    (mesh.directory / instance).mkdir(exist_ok=True)
    mesh.api(host).put("/v1/agent/service/register", {"Name": name, "ID": instance, "Port": port})
    flags = ["envoy", "-sidecar-for", instance] if kind == ENVOY else ["-service-id", instance]
    mesh.sidecar(instance, host, [*flags, *arguments], {})
    return instance


def upstream(mesh: Mesh, instance: str, name: str, host: int = 0) -> str:
    """Return where the app behind a sidecar reaches an upstream."""
    rows = mesh.api(host).get(f"/v1/agent/service/{instance}-sidecar-proxy").json()["Proxy"]["Upstreams"]
    return f"127.0.0.1:{next(row['LocalBindPort'] for row in rows if row['DestinationName'] == name)}"


def allow(mesh: Mesh, source: str, destination: str, *permissions: Any) -> None:
    body = {"Permissions": permissions} if permissions else {"Action": "allow"}
    mesh.api().put("/v1/connect/intentions/exact", body, {"source": source, "destination": destination})


def forbid(mesh: Mesh, source: str, destination: str) -> None:
    mesh.api().write("DELETE", "/v1/connect/intentions/exact", None, {"source": source, "destination": destination})


def revoke(mesh: Mesh, instance: str) -> None:
    """Revoke an instance's identity. A measured promise begins here, where the command's own start is not in it."""
    mesh.api().put("/v1/connect/revocations", {"Kind": "instance", "Value": instance})


def restore(mesh: Mesh, instance: str) -> None:
    mesh.api().write("DELETE", "/v1/connect/revocations", params={"kind": "instance", "value": instance})


def tls_of(mesh: Mesh, service: str) -> ssl.SSLContext:
    """Return what a caller that is no sidecar shows: a leaf of a service, of host A's agent."""
    leaf = mesh.api().get(f"/v1/agent/connect/ca/leaf/{service}").json()
    files = mesh.directory / f"{service}.pem"
    files.write_text(leaf["CertPEM"] + leaf["PrivateKeyPEM"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    roots = mesh.api().get("/v1/agent/connect/ca/roots").json()["Roots"]
    tls.load_verify_locations(cadata="\n".join(root["RootCert"] for root in roots))
    tls.load_cert_chain(files)
    return tls


@contextmanager
def cleaned(lictor: Mesh) -> Iterator[Mesh]:
    """Give a mesh from which what a test, even one that failed, has written is gone afterwards."""
    yield lictor
    for one in reversed(lictor.backgrounds):
        one.end()
    lictor.backgrounds.clear()
    lictor.revive()
    for host in (0, 1):
        for instance in lictor.api(host).get("/v1/agent/services").json():
            try:
                lictor.api(host).put(f"/v1/agent/service/deregister/{instance}")
            except Refused as error:
                if error.status != 404:  # a sidecar that was ended takes itself out too
                    raise
    for row in lictor.api().get("/v1/connect/intentions").json():
        lictor.api().write("DELETE", f"/v1/connect/intentions/{row['ID']}")
    for row in lictor.api().get("/v1/connect/revocations").json():
        params = {name.lower(): row[name] for name in ("Kind", "Value", "Service") if row.get(name)}
        lictor.api().write("DELETE", "/v1/connect/revocations", params=params)
    for kind in (
        "service-router",
        "service-splitter",
        "service-resolver",
        "service-defaults",
    ):  # each rests on the next
        for row in lictor.api().get(f"/v1/config/{kind}").json():
            lictor.api().write("DELETE", f"/v1/config/{kind}/{row['Name']}")


def http_call(address: str, method: str, path: str) -> tuple[int, Any]:
    host, _, port = address.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    try:
        connection.request(method, path, headers={"x-forwarded-client-cert": "forged"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    except (ConnectionError, http.client.HTTPException):
        return 0, None
    except ValueError:
        return answer.status, None
    finally:
        connection.close()


def envoy_admin(mesh: Mesh, instance: str, path: str) -> str:
    text = next(one for one in mesh.backgrounds if one.name == instance).text()
    base = text.partition("admin     ")[2].split()[0]
    with urllib.request.urlopen(base + path, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())
