"""What a withdrawal ends at an Envoy, and what it leaves alone: the connections of both kinds of callers."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import pytest

from cli.demo_stage import wait_until
from raftstate.model.caller_name import caller_name
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
    restore,
    revoke,
    stand,
    tls_of,
    upstream,
)
from tests.support.apps import serving
from tests.support.promises import Since

ENDED_S = 2.5
"""A connection ends within Envoy's drain time, 1 s, and what the push takes."""


class Busy:
    """A connection that is in use all the time."""

    def __init__(self, address: str) -> None:
        self.line = Line(address)
        self.ended_at = 0.0
        self.exchanges = 0
        self.answered_by = b""
        self._stop = False
        assert self.line.hear() == GREETING
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            answer = self.line.ask(b"%d\n" % self.exchanges)
            if not answer.endswith(b" %d\n" % self.exchanges):
                self.ended_at = time.monotonic()
                return
            self.answered_by = answer.split()[0]
            self.exchanges += 1
            time.sleep(0.01)

    def close(self) -> None:
        self._stop = True
        self._thread.join(TIMEOUT_S)
        self.line.close()


@contextmanager
def busy(*addresses: str) -> Iterator[list[Busy]]:
    """Hold a busy connection to each of these."""
    for address in addresses:
        assert wait_until(lambda at=address: call(at) != b"", TIMEOUT_S), address
    found = [Busy(address) for address in addresses]
    try:
        yield found
    finally:
        for one in found:
            one.close()


def ends(one: Busy | _Stream, since: Since) -> None:
    """Await that a connection ends soon after something was withdrawn at ``since``."""
    assert wait_until(lambda: one.ended_at, TIMEOUT_S), "it goes on"
    since.took(ENDED_S, "the withdrawal", at=one.ended_at)


def untouched(mesh: Mesh, envoy: str, *lines: Busy) -> None:
    """Await that an Envoy has ended all that it is about to end, and that these connections go on."""
    assert wait_until(lambda: stat(mesh, envoy, "listener_manager.total_filter_chains_draining") == 0, TIMEOUT_S)
    counts = [one.exchanges for one in lines]
    assert wait_until(lambda: all(one.exchanges > n + 5 for one, n in zip(lines, counts, strict=True)), TIMEOUT_S), [
        one.ended_at for one in lines
    ]
    assert stat(mesh, envoy, "listener_manager.listener_modified") == stat(
        mesh, envoy, "listener_manager.listener_in_place_updated"
    ), "the listener itself was replaced, and all connections with it"


def stat(mesh: Mesh, envoy: str, name: str) -> int:
    text = envoy_admin(mesh, envoy, f"stats?filter=^{re.escape(name)}$")
    return int(text.rpartition(": ")[2])


def chains(mesh: Mesh, envoy: str) -> set[str]:
    """Return whom an Envoy's public listener tells apart."""
    dump = json.loads(envoy_admin(mesh, envoy, "config_dump?resource=dynamic_listeners"))
    states = [one["active_state"]["listener"] for one in dump["configs"] if one["name"] == "public"]
    return {chain["name"].rpartition(" #")[0] for one in states for chain in one["filter_chains"]}


@pytest.mark.parametrize("kind", [ENVOY, LICTOR])
def test_a_denial_ends_the_callers_connections_and_no_others(stage: Mesh, kind: str) -> None:
    other = LICTOR if kind == ENVOY else ENVOY
    with echo() as port:
        stand(stage, ENVOY, "vault", port, host=1)
        for name, of in (("shop", kind), ("till", kind), ("kiosk", other)):
            allow(stage, name, "vault")
            stand(stage, of, name, 0, "-upstreams", "vault")
        assert wait_until(
            lambda: {f"{name}:{name}-1" for name in ("shop", "till", "kiosk")} <= chains(stage, "vault-2"), TIMEOUT_S
        )
        shop, till, kiosk = (upstream(stage, f"{name}-1", "vault") for name in ("shop", "till", "kiosk"))
        with busy(shop, till, kiosk) as (shops, tills, kiosks):
            allow(stage, "somebody", "vault")
            untouched(stage, "vault-2", shops, tills, kiosks)
            since = Since()
            forbid(stage, "shop", "vault")
            ends(shops, since)
            assert call(shop) == b""
            untouched(stage, "vault-2", tills, kiosks)
            since = Since()
            body = {"Action": "deny"}
            stage.api().put("/v1/connect/intentions/exact", body, {"source": "kiosk", "destination": "vault"})
            ends(kiosks, since)
            untouched(stage, "vault-2", tills)
            allow(stage, "shop", "vault")
            assert wait_until(lambda: call(shop) != b"", TIMEOUT_S), "it may come again"
            untouched(stage, "vault-2", tills)


def test_where_anyone_may_come_a_denial_ends_the_connections_of_whom_it_denies(stage: Mesh) -> None:
    allow(stage, "*", "vault")
    with echo() as port:
        stand(stage, ENVOY, "vault", port, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "vault")
        stand(stage, LICTOR, "till", 0, "-upstreams", "vault")
        assert wait_until(lambda: {"shop", "till"} <= chains(stage, "vault-2"), TIMEOUT_S)
        with busy(upstream(stage, "shop-1", "vault"), upstream(stage, "till-1", "vault")) as (shops, tills):
            # A service that comes is told apart from now on, and nobody else notices.
            stage.api(1).put("/v1/agent/service/register", {"Name": "newcomer", "ID": "newcomer-2"})
            assert wait_until(lambda: "newcomer" in chains(stage, "vault-2"), TIMEOUT_S)
            untouched(stage, "vault-2", shops, tills)
            since = Since()
            body = {"Action": "deny"}
            stage.api().put("/v1/connect/intentions/exact", body, {"source": "till", "destination": "vault"})
            ends(tills, since)
            untouched(stage, "vault-2", shops)


@pytest.mark.parametrize(("gone", "stays"), [(ENVOY, LICTOR), (LICTOR, ENVOY)])
def test_a_revoked_instances_connections_end_and_those_of_its_services_others_go_on(
    stage: Mesh, gone: str, stays: str
) -> None:
    allow(stage, "shop", "vault")
    with echo() as port:
        stand(stage, ENVOY, "vault", port, host=1)
        stand(stage, gone, "shop", 0, "-upstreams", "vault")
        stand(stage, stays, "shop", 0, "-upstreams", "vault", host=1)
        assert wait_until(lambda: {"shop:shop-1", "shop:shop-2"} <= chains(stage, "vault-2"), TIMEOUT_S)
        first = upstream(stage, "shop-1", "vault")
        with busy(first, upstream(stage, "shop-2", "vault", host=1)) as (ones, twos):
            since = Since()
            revoke(stage, "shop-1")
            ends(ones, since)
            assert call(first) in (b"", GREETING), "it may hear the greeting of an app that speaks first"
            untouched(stage, "vault-2", twos)
            restore(stage, "shop-1")
            assert wait_until(lambda: call(first) == b"one hello\n", TIMEOUT_S)
            untouched(stage, "vault-2", twos)


class Stranger:
    """A caller that is no sidecar: it has a certificate of a service and says what it likes of its name."""

    def __init__(self, mesh: Mesh, service: str) -> None:
        self._tls = tls_of(mesh, service)

    def connect(self, port: int, name: str | None) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        try:
            return self._tls.wrap_socket(raw, server_hostname=name)
        except OSError:
            raw.close()
            raise

    def call(self, port: int, name: str | None) -> bytes:
        """Return what a call is answered, without the app's greeting."""
        with self.connect(port, name) as stream:
            return answer(stream)


def answer(stream: ssl.SSLSocket) -> bytes:
    """Return an echo, empty when the connection is ended."""
    heard = b""
    with contextlib.suppress(OSError):
        stream.sendall(b"hello\n")
        while not heard.endswith(b"hello\n") and (data := stream.recv(99)):
            heard += data
    return heard.removeprefix(GREETING)


def test_a_caller_that_lies_about_its_name_gains_nothing(stage: Mesh) -> None:
    allow(stage, "shop", "vault")
    allow(stage, "till", "vault")
    with echo() as port:
        stand(stage, ENVOY, "vault", port)
        stand(stage, LICTOR, "shop", 0, "-upstreams", "vault")
        public = stage.api().get("/v1/agent/service/vault-1-sidecar-proxy").json()["Port"]
        assert wait_until(lambda: {"shop:shop-1", "shop", "till"} <= chains(stage, "vault-1"), TIMEOUT_S)
        shop, till, other = (Stranger(stage, name) for name in ("shop", "till", "other"))
        echoed = b"one hello\n"
        assert wait_until(lambda: till.call(public, None) == echoed, TIMEOUT_S), "a name is not needed"
        assert till.call(public, "vault.default.dc1.internal") == echoed, "what others put there does not matter"
        assert till.call(public, caller_name("till", "till-7")) == echoed
        for lie in (caller_name("shop", "shop-1"), caller_name("shop", "shop-9")):
            assert till.call(public, lie) == b"", "another service's name"
            assert other.call(public, lie) == b"", "of one that may not come at all"
        assert shop.call(public, caller_name("shop", "shop-1")) == b"", "another instance's name"
        assert shop.call(public, caller_name("shop", "shop-9")) == echoed
        with contextlib.ExitStack() as held:
            names = (None, "vault.example", caller_name("till", "till-7"))
            lives = [held.enter_context(till.connect(public, name)) for name in names]
            assert [answer(one) for one in lives] == [echoed] * 3
            since = Since()
            forbid(stage, "till", "vault")
            for live in lives:
                assert wait_until(lambda one=live: answer(one) == b"", TIMEOUT_S)
            since.took(ENDED_S, "the withdrawal, whatever name it gave,")


class _Streaming(Web):
    """Answers at once, and below ``/stream`` for as long as the caller listens."""

    wbufsize = 0  # what is written is sent

    def do_GET(self) -> None:
        if "/stream" not in self.path:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"1\r\n.\r\n")
                time.sleep(0.02)


class _Stream:
    """One answer that goes on."""

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.partition(":")
        self.ended_at = 0.0
        self.exchanges = 0
        self._connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
        self._connection.request("GET", path)
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self._answer.read(1):
                self.exchanges += 1
        self.ended_at = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self._connection.close()


def told_apart(mesh: Mesh, envoy: str, *addresses: str) -> None:
    """Await that all calls take connections of their callers' own chains, and none that is older than its chain."""

    def left() -> bool:
        answers = [http_call(address, "GET", "/b")[0] for address in addresses]
        return answers == [200] * len(answers) and not stat(mesh, envoy, "http.inbound_shared.downstream_cx_active")

    assert wait_until(left, TIMEOUT_S)


def test_a_permission_that_is_withdrawn_ends_what_it_allowed_and_no_other_callers_requests(stage: Mesh) -> None:
    def permit(source: str, *prefixes: str) -> None:
        rules = [{"Action": "allow", "HTTP": {"PathPrefix": prefix}} for prefix in prefixes]
        allow(stage, source, "site", *rules)

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Streaming)) as port:
        stand(stage, ENVOY, "site", port, "-protocol", "http", host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "site")
        stand(stage, LICTOR, "till", 0, "-upstreams", "site")
        for source in ("shop", "till"):
            permit(source, "/a", "/b")
        shop, till = (upstream(stage, f"{source}-1", "site") for source in ("shop", "till"))
        for address in (shop, till):
            assert wait_until(lambda at=address: http_call(at, "GET", "/b")[0] == 200, TIMEOUT_S)
        assert wait_until(lambda: {"shop:shop-1", "till:till-1"} <= chains(stage, "site-2"), TIMEOUT_S)
        told_apart(stage, "site-2", shop, till)
        ours, theirs = _Stream(shop, "/b/stream"), _Stream(till, "/b/stream")
        try:
            permit("shop", "/a", "/b", "/c")
            assert wait_until(lambda: http_call(shop, "GET", "/c")[0] == 200, TIMEOUT_S)
            untouched(stage, "site-2", ours, theirs)
            since = Since()
            permit("shop", "/a")
            ends(ours, since)
            assert http_call(shop, "GET", "/b")[0] == 403
            assert http_call(shop, "GET", "/a")[0] == 200
            assert http_call(till, "GET", "/b")[0] == 200
            untouched(stage, "site-2", theirs)
        finally:
            ours.close()
            theirs.close()


@pytest.mark.parametrize("kind", [ENVOY, LICTOR])
def test_calls_to_an_instance_that_is_revoked_end_and_those_to_other_services_go_on(stage: Mesh, kind: str) -> None:
    for name in ("store", "vault"):
        allow(stage, "shop", name)
    with echo("one") as first, echo("two") as second:
        stand(stage, kind, "store", first)
        stand(stage, ENVOY, "vault", second)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store,vault")
        store, vault = (upstream(stage, "shop-1", name) for name in ("store", "vault"))
        with busy(store, vault) as (stores, vaults):
            stand(stage, kind, "store", second, host=1)
            assert wait_until(lambda: {call(store) for _ in range(4)} == {b"one hello\n", b"two hello\n"}, TIMEOUT_S)
            since = Since()
            revoke(stage, "store-1")
            try:
                ends(stores, since)
                # The callee may have ended them before the caller's Envoy knew: a call may yet come to it, in vain.
                assert wait_until(lambda: {call(store) for _ in range(6)} == {b"two hello\n"}, TIMEOUT_S)
                untouched(stage, "shop-1", vaults)
            finally:
                restore(stage, "store-1")


@pytest.mark.parametrize("kind", [ENVOY, LICTOR])
def test_calls_to_an_instance_that_is_deregistered_are_ended_by_its_envoy(stage: Mesh, kind: str) -> None:
    allow(stage, "shop", "store")
    with echo("one") as first, echo("two") as second:
        stand(stage, ENVOY, "store", first)
        stand(stage, kind, "shop", 0, "-upstreams", "store")
        store = upstream(stage, "shop-1", "store")
        with busy(store) as (ones,):
            stand(stage, ENVOY, "store", second, host=1)
            assert wait_until(lambda: call(store) == b"two hello\n", TIMEOUT_S)
            with busy(*[store] * 4) as more:
                since = Since()
                stage.api().put("/v1/agent/service/deregister/store-1")
                ends(ones, since)
                # The callee's own Envoy may have ended them before the caller's knew, as above.
                assert wait_until(lambda: {call(store) for _ in range(6)} == {b"two hello\n"}, TIMEOUT_S)
                untouched(stage, "store-2", *(one for one in more if not one.ended_at))


def test_a_cluster_that_changes_is_in_force_at_once(stage: Mesh) -> None:
    """Envoy waits for its instances to be told anew, for 15 s when nobody does."""
    allow(stage, "shop", "store")
    with echo() as port:
        stand(stage, ENVOY, "store", port)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        address = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(address) == b"one hello\n", TIMEOUT_S)
        since = Since()
        limits = {"UpstreamConfig": {"Overrides": [{"Name": "store", "Limits": {"MaxConnections": 0}}]}}
        stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": "shop", **limits})
        try:
            assert wait_until(lambda: call(address) == b"", TIMEOUT_S)
            since.took(5.0, "the change")
        finally:
            stage.api().write("DELETE", "/v1/config/service-defaults/shop")


def test_requests_under_way_to_an_instance_that_is_revoked_end(stage: Mesh) -> None:
    for name in ("site", "news"):
        allow(stage, "shop", name)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Streaming)) as port:
        for name in ("site", "news"):
            stand(stage, ENVOY, name, port, "-protocol", "http")
        stand(stage, ENVOY, "shop", 0, "-upstreams", "site,news")
        site, news = (upstream(stage, "shop-1", name) for name in ("site", "news"))
        for address in (site, news):
            assert wait_until(lambda at=address: http_call(at, "GET", "/b")[0] == 200, TIMEOUT_S)
        ours, theirs = _Stream(site, "/stream"), _Stream(news, "/stream")
        try:
            stand(stage, ENVOY, "site", port, "-protocol", "http", host=1)
            since = Since()
            revoke(stage, "site-1")
            ends(ours, since)
            assert wait_until(lambda: http_call(site, "GET", "/b")[0] == 200, TIMEOUT_S), "the other one answers"
            untouched(stage, "shop-1", theirs)
        finally:
            ours.close()
            theirs.close()
            restore(stage, "site-1")


@pytest.mark.parametrize("kind", [LICTOR, ENVOY])
def test_requests_under_way_at_an_instance_that_is_deregistered_end(stage: Mesh, kind: str) -> None:
    """Their caller's Envoy ends none of them: the instance's own sidecar does."""
    for name in ("site", "news"):
        stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": name, "Protocol": "http"})
        allow(stage, "shop", name)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Streaming)) as port:
        for name in ("site", "news"):
            stand(stage, kind, name, port)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "site,news")
        site, news = (upstream(stage, "shop-1", name) for name in ("site", "news"))
        for address in (site, news):
            assert wait_until(lambda at=address: http_call(at, "GET", "/b")[0] == 200, TIMEOUT_S)
        ours, theirs = _Stream(site, "/stream"), _Stream(news, "/stream")
        try:
            since = Since()
            stage.api().put("/v1/agent/service/deregister/site-1")
            ends(ours, since)
            assert http_call(site, "GET", "/b")[0] == 503
            untouched(stage, "shop-1", theirs)
        finally:
            ours.close()
            theirs.close()
