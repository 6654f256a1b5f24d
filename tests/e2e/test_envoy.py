"""The real Envoy as a sidecar, configured by xDS, on a real cluster: alone, and beside Lictor's own sidecars."""

from __future__ import annotations

import socket
import socketserver
import ssl
import struct
from http.server import ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import (
    ENVOY,
    GREETING,
    LICTOR,
    TIMEOUT_S,
    Line,
    Web,
    allow,
    call,
    echo,
    envoy_admin,
    forbid,
    http_call,
    stand,
    tls_of,
    upstream,
)
from tests.support.apps import serving


def test_a_caller_who_is_refused_at_once_hears_nothing() -> None:
    class Refusal(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset

    with serving(socketserver.TCPServer(("127.0.0.1", 0), Refusal)) as port:
        # In some of them the reset is there before the caller looks whether it is connected.
        assert {call(f"127.0.0.1:{port}") for _ in range(300)} == {b""}


def test_intentions_open_and_close_the_way(stage: Mesh) -> None:
    with echo() as port:
        stand(stage, LICTOR, "store", port, host=1)
        stand(stage, ENVOY, "vault", port, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store,vault")
        stand(stage, LICTOR, "till", 0, "-upstreams", "vault")
        ways = [("shop", "store"), ("shop", "vault"), ("till", "vault")]
        addresses = [upstream(stage, f"{source}-1", destination) for source, destination in ways]
        assert [call(address) for address in addresses] == [b""] * 3
        for way in ways:
            allow(stage, *way)
        assert wait_until(lambda: all(call(address) == b"one hello\n" for address in addresses), TIMEOUT_S)
        live = [Line(address) for address in addresses]
        assert [(one.hear(), one.ask(b"1\n")) for one in live] == [(GREETING, b"one 1\n")] * 3
        allow(stage, "other", "vault")
        forbid(stage, "shop", "store")
        assert wait_until(lambda: live[0].ask() == b"", TIMEOUT_S), "Lictor's sidecar cuts Envoy's call"
        assert call(addresses[0]) == b""
        assert [one.ask(b"2\n") for one in live[1:]] == [b"one 2\n"] * 2, "a grant to somebody else cuts nobody"
        forbid(stage, "shop", "vault")
        assert wait_until(lambda: call(addresses[1]) == b"", TIMEOUT_S)
        assert wait_until(lambda: live[1].ask() == b"", TIMEOUT_S), "Envoy ends a live call that is no longer allowed"
        assert call(addresses[2]) == b"one hello\n", "who is still allowed may come again"
        forbid(stage, "till", "vault")
        assert wait_until(lambda: call(addresses[2]) == b"", TIMEOUT_S)
        for one in live:
            one.close()


class _Counting(socketserver.StreamRequestHandler):
    """Says how much came, once the caller has said all it has to say."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % len(self.rfile.read()))


@pytest.mark.parametrize(("caller", "instance"), [(LICTOR, ENVOY), (ENVOY, LICTOR)])
def test_a_caller_that_ends_its_side_is_answered(stage: Mesh, caller: str, instance: str) -> None:
    source, destination = f"asks-by-{caller}", f"counts-by-{instance}"
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Counting)) as port:
        stand(stage, instance, destination, port, host=1)
        stand(stage, caller, source, 0, "-upstreams", destination)
        allow(stage, source, destination)
        host, _, number = upstream(stage, f"{source}-1", destination).partition(":")

        def answer(size: int) -> bytes:
            try:
                with socket.create_connection((host, int(number)), TIMEOUT_S) as sock:
                    sock.sendall(bytes(size))
                    sock.shutdown(socket.SHUT_WR)
                    return sock.makefile("rb").read()
            except ConnectionError:
                return b""

        assert wait_until(lambda: answer(10) == b"10\n", TIMEOUT_S)
        assert [answer(size) for size in (1, 1_000_000, 5)] == [b"1\n", b"1000000\n", b"5\n"]


def test_requests_are_decided_by_method_and_path(stage: Mesh) -> None:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Web)) as port:
        stand(stage, ENVOY, "site", port, "-protocol", "http", host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "site")
        stand(stage, LICTOR, "till", 0, "-upstreams", "site")
        for source in ("shop", "till"):
            allow(stage, source, "site", {"Action": "allow", "HTTP": {"PathPrefix": "/api", "Methods": ["GET"]}})
            address = upstream(stage, f"{source}-1", "site")
            assert wait_until(lambda at=address: http_call(at, "GET", "/api/x")[0] == 200, TIMEOUT_S)
            headers = {name.lower(): value for name, value in http_call(address, "GET", "/api/x")[1].items()}
            cert = headers["x-forwarded-client-cert"]
            assert "URI=spiffe://" in cert
            assert cert.endswith(f"/svc/{source}")
            assert "forged" not in cert
            assert http_call(address, "POST", "/api/x") == (403, {"error": "destination 'site' denies this request"})
            for path in ("/", "/api/../admin", "//admin", "/api/%2e%2e/admin", "/%61dmin", "/api%2f..%2fadmin"):
                assert http_call(address, "GET", path)[0] in (400, 403), path
        rules = [("deny", "/admin"), ("deny", "/v1/keys"), ("allow", "/")]
        allow(stage, "shop", "site", *({"Action": what, "HTTP": {"PathPrefix": path}} for what, path in rules))
        address = upstream(stage, "shop-1", "site")
        assert wait_until(lambda: http_call(address, "GET", "/v1")[0] == 200, TIMEOUT_S)
        for path in ("/admin", "/;/admin", "/;a=1/admin;b", "/v1;x/keys", "/v1/;/keys/1"):
            assert http_call(address, "GET", path)[0] == 403, path
        for path in ("/;/admi", "/v1;x/key", "/a;b/c;d", "/v1"):
            assert http_call(address, "GET", path)[0] == 200, path


def test_an_instance_that_comes_is_called_and_one_that_goes_is_not(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    with echo("one") as first, echo("two") as second:
        stand(stage, ENVOY, "store", first)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        address = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(address) == b"one hello\n", TIMEOUT_S)
        stand(stage, LICTOR, "store", second, host=1)
        assert wait_until(lambda: call(address) == b"two hello\n", TIMEOUT_S)
        stage.end_background("store-1")
        assert wait_until(lambda: {call(address) for _ in range(6)} == {b"two hello\n"}, TIMEOUT_S)


def test_requests_take_the_way_that_configuration_entries_say(stage: Mesh) -> None:
    def configure(kind: str, name: str, **more: Any) -> None:
        stage.api().put("/v1/config", {"Kind": kind, "Name": name, **more})

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Web)) as port:
        for service in ("site", "news"):
            configure("service-defaults", service, Protocol="http")
            allow(stage, "shop", service)
        to_news = {"Match": {"HTTP": {"PathPrefix": "/news"}}, "Destination": {"Service": "news"}}
        configure("service-router", "site", Routes=[to_news])
        stand(stage, ENVOY, "site", port, host=1)
        stand(stage, ENVOY, "news", port, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "site")
        address = upstream(stage, "shop-1", "site")

        def answered_by(path: str) -> str:
            """Return the service whose sidecar passed a request on."""
            status, headers = http_call(address, "GET", path)
            cert = {name.lower(): value for name, value in (headers or {}).items()}.get("x-forwarded-client-cert", "")
            return cert.partition("By=")[2].partition(";")[0].rpartition("/")[2] if status == 200 else ""

        try:
            assert wait_until(lambda: answered_by("/") == "site", TIMEOUT_S)
            assert wait_until(lambda: answered_by("/news/1") == "news", TIMEOUT_S)
            forbid(stage, "shop", "news")
            assert wait_until(lambda: answered_by("/news/1") == "", TIMEOUT_S)
            assert answered_by("/") == "site"
        finally:
            stage.api().write("DELETE", "/v1/config/service-router/site")
            for service in ("site", "news"):
                stage.api().write("DELETE", f"/v1/config/service-defaults/{service}")


def test_a_rotation_of_the_authority_loses_no_call(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    with echo() as port:
        stand(stage, ENVOY, "store", port, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        address = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(address) == b"one hello\n", TIMEOUT_S)

        def serials() -> set[str]:
            """The serial numbers of what the Envoys show and trust."""
            text = envoy_admin(stage, "shop-1", "certs") + envoy_admin(stage, "store-2", "certs")
            return {line for line in text.splitlines() if "serial_number" in line}

        before = serials()
        live = Line(address)
        assert live.hear() == GREETING
        answers: set[bytes] = set()
        stage.lictor("ca", "rotate", host=0, quiet=True)

        def rotated() -> bool:
            answers.update((call(address), live.ask()))
            # Both leaves are new, and the old root is trusted beside the new one.
            return len(serials() - before) >= 3

        assert wait_until(rotated, 3 * TIMEOUT_S)
        answers.update(call(address) for _ in range(5))
        assert answers == {b"one hello\n"}
        live.close()


def test_a_revoked_certificate_is_refused_and_its_connection_ended(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    leaf = stage.api().get("/v1/agent/connect/ca/leaf/shop").json()
    tls = tls_of(stage, "shop")

    def connect(port: int) -> Any:
        raw = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        try:
            return tls.wrap_socket(raw)
        except OSError:
            raw.close()
            raise

    def asks(stream: Any) -> bytes:
        try:
            stream.sendall(b"hello\n")
            return bytes(stream.recv(99))
        except (OSError, ssl.SSLError):
            return b""

    with echo() as port:
        stand(stage, ENVOY, "store", port)
        public = stage.api().get("/v1/agent/service/store-1-sidecar-proxy").json()["Port"]
        with connect(public) as live:
            assert asks(live)
            stage.lictor("identity", "revoke", "-serial", leaf["SerialNumber"], host=0, quiet=True)

            def refused() -> bool:
                try:
                    other = connect(public)
                except ConnectionError:
                    return False  # Envoy just then replaces the listener; a refusal comes after the handshake
                with other:
                    # It may hear the app's greeting: the handshake goes by the service, the serial by the first byte.
                    return all(asks(other) in (b"", GREETING) for _ in range(2)) and not asks(other)

            assert wait_until(refused, TIMEOUT_S)
            assert wait_until(lambda: asks(live) == b"", TIMEOUT_S)
        # No key is in a file of the sidecar's, nor shown to whoever may read its admin endpoint.
        home = stage.directory / "store-1"
        assert "PRIVATE KEY" not in "".join(path.read_text(errors="replace") for path in home.iterdir())
        assert "PRIVATE KEY" not in envoy_admin(stage, "store-1", "config_dump")
        stage.lictor("identity", "restore", "-serial", leaf["SerialNumber"], host=0, quiet=True)


def streaming(mesh: Mesh) -> set[str]:
    """Return the instances whose sidecars hold a stream to host A's agent."""
    checks = mesh.api().get("/v1/agent/checks").json().values()
    held = [one["ServiceID"] for one in checks if "holds its stream" in one["Output"] and one["Status"] == "passing"]
    return {one.removesuffix("-sidecar-proxy") for one in held}


def test_an_agent_that_restarts_disturbs_no_envoy(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    with echo() as port:
        stand(stage, ENVOY, "store", port)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        address = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(address) == b"one hello\n", TIMEOUT_S)
        live = Line(address)
        assert live.hear() == GREETING
        stage.cluster("kill", "client-1")
        assert live.ask() == b"one hello\n"
        assert call(address) == b"one hello\n"
        stage.cluster("start", "client-1")
        # Both follow the new agent, which takes their sidecars for passing.
        assert wait_until(lambda: streaming(stage) == {"shop-1", "store-1"}, TIMEOUT_S)
        assert live.ask() == b"one hello\n"
        forbid(stage, "shop", "store")
        assert wait_until(lambda: call(address) == b"", TIMEOUT_S), "it is followed again"
        assert wait_until(lambda: live.ask() == b"", TIMEOUT_S)
        live.close()


def test_an_envoy_that_is_stopped_is_no_longer_passing_until_it_goes_on(stage: Mesh) -> None:
    with echo() as port:
        stand(stage, ENVOY, "store", port)
        assert wait_until(lambda: streaming(stage) == {"store-1"}, TIMEOUT_S)
        command = next(one for one in stage.backgrounds if one.name == "store-1")
        (envoy,) = psutil.Process(command.process.pid).children()
        envoy.suspend()
        try:
            assert wait_until(lambda: streaming(stage) == set(), TIMEOUT_S), "a stopped Envoy answers no ping"
        finally:
            envoy.resume()
        assert wait_until(lambda: streaming(stage) == {"store-1"}, TIMEOUT_S)


def test_calls_go_to_the_near_instance_and_are_bound_as_configuration_entries_say(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    limits = {"UpstreamConfig": {"Overrides": [{"Name": "store", "Limits": {"MaxConnections": 2}}]}}
    stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": "shop", **limits})
    prefer = {"PrioritizeByLocality": {"Mode": "failover"}}
    stage.api().put("/v1/config", {"Kind": "service-resolver", "Name": "store", **prefer})
    try:
        with echo("near") as near, echo("far") as far:
            for host, (port, zone) in enumerate(((near, "a"), (far, "b"))):
                row = {"Name": "store", "ID": f"store-{host + 1}", "Port": port, "Locality": {"Zone": zone}}
                stage.api(host).put("/v1/agent/service/register", row)
                (stage.directory / row["ID"]).mkdir(exist_ok=True)
                stage.sidecar(row["ID"], host, ["envoy", "-sidecar-for", row["ID"]], {})
            shop = {"Name": "shop", "ID": "shop-1", "Locality": {"Zone": "a"}}
            stage.api().put("/v1/agent/service/register", shop)
            (stage.directory / "shop-1").mkdir(exist_ok=True)
            stage.sidecar("shop-1", 0, ["envoy", "-sidecar-for", "shop-1", "-upstreams", "store"], {})
            address = upstream(stage, "shop-1", "store")
            assert wait_until(lambda: {call(address) for _ in range(6)} == {b"near hello\n"}, TIMEOUT_S)
            live: list[Line] = []

            def two_at_a_time() -> bool:
                """Envoy may still count a connection that has just ended."""
                while len(live) < 2:
                    line = Line(address)
                    if line.hear() != GREETING:
                        line.close()
                        return False
                    live.append(line)
                return True

            assert wait_until(two_at_a_time, TIMEOUT_S)
            assert [call(address) for _ in range(5)] == [b""] * 5, "a third connection at a time is one too many"
            live.pop().close()
            assert wait_until(lambda: call(address) == b"near hello\n", TIMEOUT_S)
            live.pop().close()
            assert wait_until(lambda: call(address) == b"near hello\n", TIMEOUT_S)
            stage.end_background("store-1")
            assert wait_until(lambda: {call(address) for _ in range(6)} == {b"far hello\n"}, TIMEOUT_S)
    finally:
        stage.api().write("DELETE", "/v1/config/service-resolver/store")
        stage.api().write("DELETE", "/v1/config/service-defaults/shop")
