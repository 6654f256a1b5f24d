"""No client takes the HTTP listener away from the others, by slowness or by the number of its connections."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.http.context import HttpOptions
from node.http.front import listener
from node.http.front.guards import Admission, FrontOptions, client_of
from tests.support.http_api import eventually, serving
from tests.support.raw_http import RawClient

GET = b"GET /v1/status/leader HTTP/1.1\r\nHost: localhost\r\n\r\n"
PUT = b"PUT /v1/kv/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n"
CHUNKED = b"PUT /v1/kv/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


async def trickle(client: RawClient, byte: bytes) -> None:
    """Send a byte at a time for as long as the other side takes them."""
    while not client.writer.is_closing():
        client.send(byte)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("options", "sent", "status"),
    [
        pytest.param(FrontOptions(head_timeout_s=0.3), b"GET /v1/kv/a HTTP/1.1\r\nHost: x\r\nX: ", 408, id="a head"),
        pytest.param(FrontOptions(body_timeout_s=0.3), PUT, 408, id="a body"),
        pytest.param(FrontOptions(head_timeout_s=0.3), GET + b"GET", 200, id="a second head"),
    ],
)
async def test_a_request_that_comes_too_slowly_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: FrontOptions, sent: bytes, status: int
) -> None:
    monkeypatch.setattr(listener, "LINGER_S", 0.2)
    async with serving(tmp_path, front_options=options) as node:
        async with await RawClient.open(node.port) as client:
            client.send(sent)
            slow = asyncio.create_task(trickle(client, b"x"))
            try:
                if status == 200:
                    assert (await client.answer()).status == 200
                answer = await client.answer()
                assert (answer.status, answer.header("Connection")) == (408, "close")
                await eventually(lambda: node.runner.front.admission.open == 0)
            finally:
                slow.cancel()
        async with await RawClient.open(node.port) as good:
            good.send(GET)
            assert (await good.answer()).status == 200


async def test_a_connection_on_which_nothing_comes_ends(tmp_path: Path) -> None:
    async with serving(tmp_path, front_options=FrontOptions(head_timeout_s=0.2)) as node:
        async with await RawClient.open(node.port) as client:
            assert await client.ended() == b""


async def test_a_chunked_body_that_does_not_come_ends(tmp_path: Path) -> None:
    async with serving(tmp_path, http_options=HttpOptions(body_timeout_s=0.3)) as node:
        async with await RawClient.open(node.port) as client:
            client.send(CHUNKED + b"5\r\nab")
            assert (await client.answer()).status == 408


async def test_an_idle_connection_ends_and_a_parked_one_does_not(tmp_path: Path) -> None:
    options = FrontOptions(idle_timeout_s=0.3, head_timeout_s=0.2, body_timeout_s=0.2)
    async with serving(tmp_path, front_options=options) as node:
        async with await RawClient.open(node.port) as idle, await RawClient.open(node.port) as parked:
            parked.send(b"GET /v1/kv/none?index=1&wait=1s HTTP/1.1\r\nHost: localhost\r\n\r\n")
            idle.send(GET)
            assert (await idle.answer()).status == 200
            assert await idle.ended() == b""
            answer = await parked.answer()
            assert (answer.status, answer.header("X-Consul-Index") != "") == (404, True)


async def test_a_client_that_does_not_read_its_answers_is_cut(tmp_path: Path) -> None:
    async with serving(tmp_path, front_options=FrontOptions(write_timeout_s=0.3)) as node:
        await node.put("/v1/kv/big", "x" * 400_000)
        async with await RawClient.open(node.port, limit=1024) as greedy:
            for _ in range(200):
                greedy.send(b"GET /v1/kv/big?stale HTTP/1.1\r\nHost: localhost\r\n\r\n")
            greedy.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await eventually(lambda: node.runner.front.admission.open == 1)


async def test_requests_sent_ahead_without_end_are_not_all_taken_in(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        async with await RawClient.open(node.port) as client:
            client.send(b"GET /v1/kv/none?index=1&wait=60s HTTP/1.1\r\nHost: localhost\r\n\r\n")
            transport = client.writer.transport
            for _ in range(2000):
                client.send(b"x" * 16384)
                await asyncio.sleep(0)
            assert transport.get_write_buffer_size() > 16_000_000  # of 32 MB; the rest is in the sockets' buffers
            (held,) = [one for one in node.runner.front.connections if one._ahead]
            assert len(held._ahead) < 1_000_000
            transport.abort()


async def test_connections_are_bounded_by_client_and_in_all(tmp_path: Path) -> None:
    async with serving(tmp_path, front_options=FrontOptions(connections_max=10)) as node:
        front = node.runner.front
        await node.http.get(node.url + "/v1/status/leader", headers={"Connection": "close"})
        await eventually(lambda: front.admission.open == 0)
        open_ones = [await RawClient.open(node.port, local_addr=("127.0.0.2", 0)) for _ in range(8)]
        for client in open_ones:
            client.send(GET)
            assert (await client.answer()).status == 200
        async with await RawClient.open(node.port, local_addr=("127.0.0.2", 0)) as refused:
            answer = await refused.answer()
            assert (answer.status, answer.header("Connection")) == (429, "close")
            refused.send(GET)  # answered already: nothing more comes
            assert await refused.ended() == b""
        others = [await RawClient.open(node.port) for _ in range(2)]
        for client in others:
            client.send(GET)
            assert (await client.answer()).status == 200
        async with await RawClient.open(node.port, local_addr=("127.0.0.3", 0)) as refused:
            assert (await refused.answer()).status == 503
        assert (front.admission.open, front.admission.refused) == (10, 2)
        for client in open_ones + others:
            client.writer.close()
        await eventually(lambda: front.admission.open == 0)
        await node.get("/v1/status/leader")


async def test_those_turned_away_are_few_while_they_linger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LINGERING_MAX", 3)
    async with serving(tmp_path, front_options=FrontOptions(connections_max=1)) as node:
        async with await RawClient.open(node.port):
            await eventually(lambda: node.runner.front.admission.open == 1)
            crowd = [await RawClient.open(node.port) for _ in range(20)]
            await eventually(lambda: node.runner.front.admission.refused == 20)
            await eventually(lambda: len(node.runner.front.connections) <= 4)
            for one in crowd:
                one.writer.close()


def test_an_address_is_counted_for_its_client() -> None:
    assert client_of("127.0.0.1") == ("127.0.0.1", True)
    assert client_of("::1") == ("::1", True)
    assert client_of("::ffff:10.1.2.3") == client_of("10.1.2.3") == ("10.1.2.3", False)
    assert client_of("2001:db8:0:1::5") == client_of("2001:db8:0:1:ffff::9%eth0")
    assert client_of("2001:db8:0:1::5") != client_of("2001:db8:0:2::5")


async def test_a_remote_client_has_fewer_places_than_this_host() -> None:
    admission = Admission(FrontOptions(connections_max=100, connections_per_client_max=3))
    assert [admission.enter("10.0.0.1") is None for _ in range(5)] == [True] * 3 + [False] * 2
    assert [admission.enter("127.0.0.1") is None for _ in range(81)] == [True] * 80 + [False]
    assert admission.enter("10.0.0.2") is None
    admission.leave("10.0.0.1")
    assert admission.enter("10.0.0.1") is None
    assert admission.open == 84


def certificate(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


async def test_the_tls_listener_has_the_same_bounds(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path)
    options = FrontOptions(connections_max=4, head_timeout_s=2.0)
    async with serving(tmp_path / "agent", front_options=options) as node:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(cert_file, key_file)
        site = web.TCPSite(node.runner, "127.0.0.1", 0, ssl_context=server)
        await site.start()
        port = node.runner.addresses[1][1]
        trust = ssl.create_default_context(cafile=str(cert_file))
        tls = {"ssl": trust, "server_hostname": "localhost"}
        async with await RawClient.open(port, **tls) as client:
            client.send(GET + GET)
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]
            assert not any(one.is_slow() for one in node.runner.front.connections)
            async with await RawClient.open(port, **tls) as slow:
                slow.send(b"GET / HTTP/1.1\r\n")
                assert (await slow.answer()).status == 408
        await eventually(lambda: node.runner.front.admission.open == 0)
        crowd = [await RawClient.open(port, **tls) for _ in range(3)]
        async with await RawClient.open(port, **tls) as refused:
            assert (await refused.answer()).status == 429
        for one in crowd:
            one.writer.close()
        async with aiohttp.ClientSession() as session:
            await eventually(lambda: node.runner.front.admission.open == 0)
            async with session.get(f"https://localhost:{port}/v1/status/leader", ssl=trust) as answer:
                assert answer.status == 200
