"""gRPC through a real cluster: a configuration entry and a withdrawn method are in force at sidecars at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from cli.demo_stage import wait_until
from cli.envoy import find_binary
from cli.errors import CliError
from cli.hclfile import entry_of
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import ENVOY, LICTOR, envoy_admin, stand, tls_of, upstream
from tests.support.promises import PATIENCE_S, Since

UNARY, BOTH = "/test.Echo/Unary", "/test.Echo/Both"
IN_FORCE_S = 1.0
"""How soon after it was acknowledged a write must be in force everywhere."""
DEFAULTS = 'Kind = "service-defaults"\nName = "grpc-echo"\nProtocol = "grpc"\n'
RESOLVER = """
Kind = "service-resolver"
Name = "grpc-echo"
Subsets = {
  one = { Filter = "Service.ID == \\"grpc-echo-1-sidecar-proxy\\"" }
  two = { Filter = "Service.ID == \\"grpc-echo-2-sidecar-proxy\\"" }
}
"""


def splitter(one: int) -> str:
    splits = f'{{ Weight = {one}, ServiceSubset = "one" }}, {{ Weight = {100 - one}, ServiceSubset = "two" }}'
    return f'Kind = "service-splitter"\nName = "grpc-echo"\nSplits = [{splits}]\n'


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers with its name."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return {
            UNARY: grpc.unary_unary_rpc_method_handler(lambda request, context: self.name),
            BOTH: grpc.stream_stream_rpc_method_handler(self.both),
        }.get(details.method)

    def both(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for _ in requests:
            yield self.name


class Caller:
    """Calls all the time, on one connection; ``calls`` are (when it began, who answered)."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.calls: list[tuple[float, bytes]] = []
        self.failures: list[grpc.RpcError] = []
        self._unary = channel.unary_unary(UNARY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            began = time.monotonic()
            try:
                self.calls.append((began, self._unary(b"", timeout=10)))
            except grpc.RpcError as error:
                self.failures.append(error)

    def latest(self, name: bytes, since: float) -> float:
        """Return how long after ``since`` the last call began that ``name`` answered."""
        return max((began - since for began, who in self.calls if who == name), default=0.0)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def allow(lictor: Mesh, *methods: str) -> None:
    permissions = [{"Action": "allow", "HTTP": {"PathExact": method}} for method in methods]
    pair = {"source": "grpc-client", "destination": "grpc-echo"}
    lictor.api().put("/v1/connect/intentions/exact", {"Permissions": permissions}, pair)


def write(lictor: Mesh, entry: str) -> None:
    """Write an entry with the command."""
    (lictor.directory / "entry.hcl").write_text(entry)
    assert "Config entry written" in lictor.lictor("config", "write", "entry.hcl", host=0, quiet=True).stdout


@pytest.fixture
def channel(lictor: Mesh) -> Iterator[grpc.Channel]:
    """Two instances on two hosts, and a connection to the caller's sidecar."""
    echoes = [Echo(b"one"), Echo(b"two")]
    for number, echo in enumerate(echoes, 1):
        lictor.stand("grpc-echo", f"grpc-echo-{number}", port=echo.port, host=number - 1, protocol="grpc")
    allow(lictor, UNARY, BOTH)
    write(lictor, DEFAULTS)
    write(lictor, RESOLVER)
    write(lictor, splitter(100))
    lictor.stand("grpc-client", "grpc-client-1", upstreams="backend=grpc-echo")
    with grpc.insecure_channel(lictor.upstream("grpc-client-1")) as made:
        yield made
    for echo in echoes:
        echo.server.stop(0)


def test_a_splitters_change_and_a_methods_withdrawal_are_in_force_at_once(
    lictor: Mesh, channel: grpc.Channel
) -> None:
    caller = Caller(channel)
    try:
        assert wait_until(lambda: len(caller.calls) > 20, PATIENCE_S), caller.failures[:3]
        assert {who for _, who in caller.calls} == {b"one"}
        delays = []
        for share, old in ((0, b"one"), (100, b"two"), (0, b"one"), (100, b"two"), (0, b"one"), (100, b"two")):
            lictor.api().put("/v1/config", json.dumps(entry_of(splitter(share))).encode())
            acknowledged = Since()
            done = acknowledged.at + IN_FORCE_S
            assert wait_until(lambda done=done: bool(caller.calls) and caller.calls[-1][0] > done, PATIENCE_S)
            latest = acknowledged.at + caller.latest(old, acknowledged.at)
            delays.append(acknowledged.took(IN_FORCE_S, "the split", at=latest))
        assert caller.failures == [], "no change cost a call"
    finally:
        caller.stop()
    requests = threading.Semaphore(1)
    ended = threading.Event()

    def keep_asking() -> Iterator[bytes]:
        while not ended.is_set():
            requests.acquire(timeout=0.01)
            yield b""

    both = channel.stream_stream(BOTH)(keep_asking())
    assert next(both) == b"one"
    allow(lictor, UNARY)
    acknowledged = Since()
    with pytest.raises(grpc.RpcError):
        deque(both, maxlen=0)  # whatever it still says, until its end
    withdrawn = acknowledged.took(IN_FORCE_S, "the withdrawal")
    ended.set()
    with pytest.raises(grpc.RpcError) as refused:
        next(channel.stream_stream(BOTH)(iter([b""])))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert channel.unary_unary(UNARY)(b"", timeout=10) == b"one"
    print(f"split in force after {[round(one, 3) for one in delays]} s, method withdrawn after {withdrawn:.3f} s")


@pytest.mark.parametrize(("caller", "instance"), [(LICTOR, ENVOY), (ENVOY, LICTOR)])
def test_grpc_passes_between_lictors_sidecar_and_envoy(lictor: Mesh, caller: str, instance: str) -> None:
    try:
        find_binary("")
    except CliError as error:
        pytest.skip(str(error))
    source, destination = f"from-{caller}", f"to-{instance}"
    lictor.api().put("/v1/config", {"Kind": "service-defaults", "Name": destination, "Protocol": "grpc"})
    permissions = [{"Action": "allow", "HTTP": {"PathExact": method}} for method in (UNARY, BOTH)]
    pair = {"source": source, "destination": destination}
    lictor.api().put("/v1/connect/intentions/exact", {"Permissions": permissions}, pair)
    echo = Echo(b"one")
    stand(lictor, instance, destination, echo.port, host=1)
    stand(lictor, caller, source, 0, "-upstreams", destination)
    with grpc.insecure_channel(upstream(lictor, f"{source}-1", destination)) as channel:
        unary = channel.unary_unary(UNARY)

        def answered() -> bool:
            try:
                return bool(unary(b"", timeout=10) == b"one")
            except grpc.RpcError:
                return False

        assert wait_until(answered, PATIENCE_S)
        assert [answer.result(20) for answer in [unary.future(b"x" * 100_000) for _ in range(50)]] == [b"one"] * 50
        assert list(channel.stream_stream(BOTH)(iter([b"1", b"2", b"3"]), timeout=20)) == [b"one"] * 3
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/test.Echo/Other")(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    if instance == ENVOY:
        assert agreed_protocol(lictor, source, f"{destination}-2") == "h2"
        stats = envoy_admin(lictor, f"{destination}-2", "stats?filter=^http.inbound.*downstream_cx_http")
        assert sum(int(one.split()[0]) for one in stats.split("downstream_cx_http2_total: ")[1:]) >= 1
    else:
        assert agreed_protocol(lictor, source, f"{destination}-2") == "h2"
        stats = envoy_admin(lictor, f"{source}-1", f"stats?filter=upstream.{destination}.upstream_cx_http")
        assert int(stats.partition("upstream_cx_http2_total: ")[2].split()[0]) >= 1
    http1 = [line for line in stats.splitlines() if "http1_total" in line]
    assert http1
    assert all(line.endswith(": 0") for line in http1), "HTTP/2 alone was spoken"
    echo.server.stop(0)


def agreed_protocol(lictor: Mesh, source: str, instance: str) -> str | None:
    """Return what an instance's sidecar agrees on with a caller that offers HTTP/2 before HTTP/1.1."""
    tls = tls_of(lictor, source)
    tls.set_alpn_protocols(["h2", "http/1.1"])
    port = lictor.api(1).get(f"/v1/agent/service/{instance}-sidecar-proxy").json()["Port"]
    with socket.create_connection(("127.0.0.1", port), 10) as raw, tls.wrap_socket(raw) as stream:
        return stream.selected_alpn_protocol()
