"""HTTP/2 of others through two sidecars: curl and h2load (nghttp2) ask, nginx serves. They code by Huffman, keep
tables of their own and do what grpcio never does: many fields, HEAD, ranges, uploads and downloads of megabytes, and
hundreds of streams at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.e2e.support_e2e import need
from tests.support.ports import free_ports
from tests.support.sidecars import Mesh

ALLOWED = Intention(
    source_name="web",
    destination_name="backend",
    permissions=(
        Permission("deny", HTTPMatch(path_prefix="/secret")),
        Permission("allow", HTTPMatch(path_prefix="/", methods=("GET", "HEAD", "PUT"))),
    ),
)
LARGE_BYTES = 8 << 20


@asynccontextmanager
async def nginx(directory: Path) -> AsyncIterator[int]:
    """nginx that speaks HTTP/2 with prior knowledge, takes uploads and says what it was asked."""
    (port,) = free_ports(1)
    user = "user root;" if os.getuid() == 0 else ""  # else its worker may not read the test's files
    (directory / "large").write_bytes(os.urandom(LARGE_BYTES))
    config = directory / "nginx.conf"
    config.write_text(
        f"""
{user} worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log /dev/null;
events {{ worker_connections 500; }}
http {{
    access_log off; client_max_body_size 100m; client_body_temp_path {directory}/t1; proxy_temp_path {directory}/t2;
    fastcgi_temp_path {directory}/t3; uwsgi_temp_path {directory}/t4; scgi_temp_path {directory}/t5;
    server {{
        listen 127.0.0.1:{port} http2; root {directory}; large_client_header_buffers 4 64k;
        location /said {{ return 200 "$request_method $request_uri $http_x_number $http_cookie"; }}
        location /up {{ dav_methods PUT; create_full_put_path on; }}
    }}
}}
"""
    )
    process = await asyncio.create_subprocess_exec("nginx", "-c", str(config), "-e", "/dev/null")
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    break
        yield port
    finally:
        process.terminate()
        await process.wait()


async def run(*command: str) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out


async def curl(*arguments: str) -> tuple[int, bytes]:
    """Make one request: of several in one run, curl 7.88 loses all but the first, whoever serves them."""
    return await run("curl", "-sS", "--http2-prior-knowledge", "--max-time", "60", *arguments)


@pytest.mark.parametrize("protocol", ["http2", "grpc"])
async def test_curl_and_nginx_through_two_sidecars(protocol: str, tmp_path: Path) -> None:
    need("curl", "h2load", "nginx")
    async with nginx(tmp_path) as port, Mesh() as mesh:
        server = await mesh.member("backend", "backend-1", port=port)
        client = await mesh.member("web", "web-1", upstreams=("backend",))
        await server.push(intentions=(ALLOWED,))
        await client.route("backend", server.endpoint, protocol=protocol)
        base = f"http://127.0.0.1:{client.ports.upstreams['backend']}"

        for n in range(3):
            fields = [part for at in range(200) for part in ("-H", f"x-{n}-{at}: {'v' * at}")]
            code, out = await curl(*fields, "-H", f"x-number: {n}", "-b", "a=1; b=two", f"{base}/said/fields")
            assert (code, out) == (0, b"GET /said/fields %d a=1; b=two" % n)

        # Four connections with fifty streams at once each; the fields come again.
        code, out = await run("h2load", "-n", "2000", "-c", "4", "-m", "50", "-H", "x-number: 7", f"{base}/said/many")
        assert code == 0
        assert b"2000 succeeded, 0 failed, 0 errored, 0 timeout" in out, out

        code, out = await curl("-I", f"{base}/large")
        assert code == 0
        assert out.startswith(b"HTTP/2 200")
        assert b"content-length: %d" % LARGE_BYTES in out

        large = (tmp_path / "large").read_bytes()
        down = tmp_path / "down"
        code, out = await curl("-o", str(down), f"{base}/large")
        assert (code, hashlib.sha256(down.read_bytes()).digest()) == (0, hashlib.sha256(large).digest())

        code, out = await curl("-r", "100-199", f"{base}/large")
        assert (code, out) == (0, large[100:200])

        code, out = await curl("-o", "-", "-w", "%{http_code}", f"{base}/secret")
        assert out.endswith(b"403")
        code, out = await curl("-w", "%{http_code}", "-X", "DELETE", f"{base}/said")
        assert out.endswith(b"403")
        code, out = await curl("-w", "%{http_code}", "-T", str(tmp_path / "large"), f"{base}/up/loaded")
        assert (code, out[-3:]) == (0, b"201")
        assert (tmp_path / "up/loaded").read_bytes() == large
