"""A sidecar that has no descriptor left: connections wait or fail, and nobody else is blamed for it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.http_filter import App, simple
from tests.support.loops import with_mesh
from tests.support.sidecars import Mesh, naming, until


@contextmanager
def left(count: int) -> Iterator[None]:
    """Let this process open ``count`` more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free: list[int] = []
    while len(free) < count + 1:
        free.append(os.dup(0))
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("protocol", ["tcp", "http", "grpc"])
@with_mesh
async def test_an_instance_is_not_blamed_for_what_we_have_not(mesh: Mesh, protocol: str) -> None:
    client, server, _ = await mesh.pair(naming("b1") if protocol == "tcp" else App(answer=simple(b"b1")).handle)
    await client.route("backend", server.endpoint, protocol=protocol)
    upstream = client.sidecar._upstreams["backend"]
    with socket.create_connection(("127.0.0.1", client.ports.upstreams["backend"]), 10) as call:
        with left(1):  # which accepting takes
            if protocol == "grpc":
                call.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
                # GET / of http://b, by the static table alone
                call.sendall(bytes.fromhex("0000040105000000018286") + b"\x84\x81")
            else:
                call.sendall(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n")
            await until(lambda: upstream.stats.total == 1)
            await until(lambda: not upstream.connections or upstream.http_counters.latency_count == 1)
    (instance,) = upstream.balancer.instances.values()
    assert (instance.failures, instance.ejections, instance.active) == (0, 0, 0)
    if protocol == "tcp":
        assert await client.ask() == b"b1\n"


@with_mesh
async def test_connections_wait_for_descriptors_without_a_busy_loop_and_the_others_go_on(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    live = [await client.dial() for _ in range(5)]
    for reader, writer in live:
        writer.write(b"one\n")
        assert await reader.readline() == b"one\n"
    address = ("127.0.0.1", client.ports.upstreams["backend"])
    waiting = [socket.create_connection(address, 10) for _ in range(20)]
    for call in waiting:
        call.setblocking(False)
        call.sendall(b"two\n")
    loop = asyncio.get_running_loop()
    began, spent = loop.time(), time.process_time()
    with left(0):
        while loop.time() < began + 1.0:
            for reader, writer in live:
                writer.write(b"three\n")
                assert await asyncio.wait_for(reader.readline(), 10) == b"three\n"
            await asyncio.sleep(0.1)
        assert time.process_time() - spent < 0.6
    for call in waiting:
        assert await asyncio.wait_for(loop.sock_recv(call, 10), 10) == b"two\n"
        call.close()
    for _, writer in live:
        writer.close()


@with_mesh
async def test_a_certificate_is_renewed_once_there_are_descriptors_again(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contexts take one; a sidecar that has none goes on with the certificate before."""

    def none_left(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    client, _, _ = await mesh.pair()
    reader, writer = await client.talk()
    before = client.sidecar.config.material
    with monkeypatch.context() as wanting:
        wanting.setattr(os, "memfd_create", none_left)
        await client.push(leaf=mesh.ca.leaf("web", "web-1"))
        assert client.sidecar.config.material is before
        writer.write(b"still\n")
        assert await asyncio.wait_for(reader.readline(), 10) == b"still\n"
    await until(lambda: client.sidecar.config.material is not before)
    assert await client.ask() == b"hi\n"
    writer.close()
