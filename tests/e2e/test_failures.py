"""What servers' deaths may not do: lose what was acknowledged, or break a call that runs through sidecars."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo_stage import Client, answers_plainly, app, calls, wait_until
from tests.e2e.support_e2e import Mesh, Writer, a_free_port, running
from tests.support.promises import PATIENCE_S


@pytest.fixture
def echo(lictor: Mesh) -> Iterator[str]:
    """An echo server on host B, a client's sidecar on host A, calls allowed; the address to call."""
    port = a_free_port()
    with running([sys.executable, app("echo_server")], env=lictor.environment({"PORT": str(port)})):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        lictor.stand("echo-server", "echo-server-1", port=port, host=1)
        lictor.stand("echo-client", "echo-client-1", upstreams="backend=echo-server")
        lictor.lictor("intentions", "create", "echo-client", "echo-server", "-replace", host=0)
        address = lictor.upstream("echo-client-1")
        assert wait_until(lambda: lictor.call(address).returncode == 0, PATIENCE_S)
        yield address
        lictor.lictor("intentions", "delete", "echo-client", "echo-server", host=0)
        for host, instance in ((0, "echo-client-1"), (1, "echo-server-1")):
            lictor.lictor("services", "deregister", "-id", instance, host=host)


def _no_call_broke(load: Client, holding: Client) -> None:
    """Every call was answered, and the one that was held through it all still goes on."""
    found = calls(load.finish())
    assert len(found) > 20
    assert [call for call in found if call.failed] == []
    assert not any(line.startswith("ended") for line in holding.lines)
    assert holding.process.poll() is None
    holding.process.kill()
    holding.finish()


def test_killing_any_server_loses_nothing_and_breaks_no_call(lictor: Mesh, echo: str) -> None:
    holding, load = lictor.client("hold", echo), lictor.client("load", echo)
    holding.wait_line("holding", PATIENCE_S)
    with Writer(lictor.api(), "one") as writer:
        for _ in range(3):
            victim = lictor.wait_leader()
            before = len(writer.services)
            assert wait_until(lambda before=before: len(writer.services) > before + 3, PATIENCE_S)
            lictor.cluster("kill", victim)
            lictor.wait_leader(other_than=victim)
            after = len(writer.services)
            assert wait_until(lambda after=after: len(writer.services) > after + 3, PATIENCE_S), writer.failures[-3:]
            lictor.cluster("start", victim)
        follower = next(name for name, one in lictor.status().items() if one.raft == "follower")
        lictor.cluster("kill", follower)
        after = len(writer.services)
        assert wait_until(lambda: len(writer.services) > after + 3, PATIENCE_S), writer.failures[-3:]
        lictor.cluster("start", follower)
    assert len(writer.intentions) > 10
    lictor.wait_caught_up()
    for host in (0, 1):
        assert writer.lost(lictor.api(host)) == []
    _no_call_broke(load, holding)


def test_killing_all_servers_at_once_brings_everything_back(lictor: Mesh, echo: str) -> None:
    holding, load = lictor.client("hold", echo), lictor.client("load", echo)
    holding.wait_line("holding", PATIENCE_S)
    servers = [name for name, one in lictor.status().items() if one.role == "server"]
    with Writer(lictor.api(wait_s=20.0), "all") as writer:
        assert wait_until(lambda: len(writer.services) > 10, PATIENCE_S)
        lictor.cluster("kill", *servers)
        # Static stability: the sidecars go on with what they know while there is no server at all.
        length = len(load.lines)
        assert wait_until(lambda: len(load.lines) > length + 20, PATIENCE_S)
        lictor.cluster("start", *servers)
        after = len(writer.services)
        assert wait_until(lambda: len(writer.services) > after + 3, PATIENCE_S), writer.failures[-3:]
    lictor.wait_caught_up()
    assert writer.lost(lictor.api()) == []
    _no_call_broke(load, holding)


def test_without_a_leader_a_command_waits_a_bounded_time(lictor: Mesh) -> None:
    servers = [name for name, one in lictor.status().items() if one.role == "server"]
    lictor.cluster("kill", *servers[:2])
    try:
        done = lictor.lictor("kv", "put", "a", "b", "-wait", "1s", host=0, may_fail=True)
        assert done.returncode in (4, 5), done
        done = lictor.lictor("kv", "get", "a", "-wait", "1s", host=0, may_fail=True)
        assert done.returncode == 4, done
    finally:
        lictor.cluster("start", *servers[:2])
    assert lictor.lictor("kv", "put", "a", "b", host=0).returncode == 0


def test_an_isolated_leader_is_replaced_and_comes_back(lictor: Mesh) -> None:
    old = lictor.wait_leader()
    lictor.cluster("partition", old)
    try:
        new = lictor.wait_leader(other_than=old)
        assert lictor.lictor("kv", "put", "cut", "off", host=0).returncode == 0
        stale = lictor.lictor(
            "kv", "get", "cut", "-wait", "1s", "-http-addr", lictor.supervisor.http_addr(old), may_fail=True
        )  # fmt: skip
        assert stale.returncode != 0, "a leader that lost its followers must not answer a default read"
        assert new != old
    finally:
        lictor.cluster("heal")
    lictor.wait_caught_up()
    assert lictor.lictor("kv", "get", "cut", "-http-addr", lictor.supervisor.http_addr(old)).stdout == "off\n"


def test_a_paused_server_returns_without_deposing_the_leader(lictor: Mesh) -> None:
    leader = lictor.wait_leader()
    term = lictor.status()[leader].term
    follower = next(name for name, one in lictor.status().items() if one.raft == "follower")
    lictor.cluster("pause", follower)
    assert lictor.status()[follower].state == "paused"
    assert lictor.lictor("kv", "put", "while", "paused", host=0).returncode == 0
    lictor.cluster("resume", follower)
    lictor.wait_caught_up()
    now = lictor.status()[leader]
    assert (now.raft, now.term) == ("leader", term)


def test_an_agents_death_and_return_break_no_call(lictor: Mesh, echo: str) -> None:
    holding, load = lictor.client("hold", echo), lictor.client("load", echo)
    holding.wait_line("holding", PATIENCE_S)
    lictor.cluster("kill", "client-1", "client-2")
    length = len(load.lines)
    assert wait_until(lambda: len(load.lines) > length + 20, PATIENCE_S)
    lictor.cluster("start", "client-1", "client-2")
    assert wait_until(
        lambda: "echo-client-1-sidecar-proxy" in lictor.lictor("services", "list", host=0).stdout, PATIENCE_S
    )
    _no_call_broke(load, holding)
    # The sidecars follow their agents again: what is withdrawn now is withdrawn there.
    lictor.lictor("identity", "revoke", "-service-id", "echo-client-1", host=0)
    assert wait_until(lambda: lictor.call(echo).returncode != 0, PATIENCE_S)
    lictor.lictor("identity", "restore", "-service-id", "echo-client-1", host=0)
    assert wait_until(lambda: lictor.call(echo).returncode == 0, PATIENCE_S)


def test_a_stopped_sidecar_leaves_the_catalogs_healthy_ones_until_it_goes_on(lictor: Mesh) -> None:
    lictor.stand("halted", "halted-1", port=a_free_port(), host=1)
    sidecar = next(one for one in lictor.backgrounds if one.name == "halted-1")

    def healthy() -> list[str]:
        rows = lictor.api(0).get("/v1/health/connect/halted", {"passing": "true"}).json()
        return [row["Service"]["Proxy"]["DestinationServiceID"] for row in rows]

    assert wait_until(lambda: healthy() == ["halted-1"], PATIENCE_S)
    sidecar.signal(signal.SIGSTOP)
    try:
        assert wait_until(lambda: healthy() == [], PATIENCE_S)
    finally:
        sidecar.signal(signal.SIGCONT)
    assert wait_until(lambda: healthy() == ["halted-1"], PATIENCE_S)


def test_plain_text_gets_nowhere_and_leaves_one_line(lictor: Mesh, echo: str) -> None:
    (public,) = {
        row["Service"]["Port"] for row in lictor.api().get("/v1/health/connect/echo-server").json()
    }  # fmt: skip
    rpc = lictor.supervisor.config.servers()[0].rpc_port
    server = lictor.supervisor.config.servers()[0].name
    for port in (public, rpc):
        with socket.create_connection(("127.0.0.1", port), 5) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            peer.settimeout(10)
            try:
                received = b"".join(iter(lambda peer=peer: peer.recv(4096), b""))
            except ConnectionError:
                received = b""
            assert b"Hello" not in received
            address = "{}:{}".format(*peer.getsockname())
        log = lictor.layout.log(server) if port == rpc else _log_of(lictor, "echo-server-1")
        assert wait_until(lambda log=log, address=address: _lines(log, address) == 1, PATIENCE_S), (
            port,
            log.read_text()[-800:],
        )


def _log_of(mesh: Mesh, name: str) -> Path:
    return next(one.log for one in mesh.backgrounds if one.name == name)


def _lines(log: Path, address: str) -> int:
    return sum(address in line for line in log.read_text(errors="replace").splitlines())


def test_snapshots_are_saved_checked_and_restored(lictor: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "backup.snap"
    lictor.lictor("kv", "put", "kept", "yes", host=0)
    assert "Saved and verified" in lictor.lictor("snapshot", "save", str(file), host=0).stdout
    assert "verified, whole" in lictor.lictor("snapshot", "inspect", str(file)).stdout
    lictor.lictor("kv", "put", "kept", "no", host=0)
    lictor.lictor("snapshot", "restore", str(file), host=1)
    assert lictor.lictor("kv", "get", "kept", host=0).stdout == "yes\n"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0x40
    file.write_bytes(damaged)
    refused = lictor.lictor("snapshot", "restore", str(file), host=0, may_fail=True)
    assert refused.returncode == 1
    assert lictor.lictor("kv", "get", "kept", host=0).stdout == "yes\n"
