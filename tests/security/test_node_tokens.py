"""With acl_enabled, the management token of the file opens everything, and nothing else does what it is not given."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import aiohttp
import pytest

from node import pki
from node.config import parse_config
from node.errors import PkiError
from node.main import NodeProcess
from node.tokens import load_secret
from raftstate.model.acl import MANAGEMENT_ID, Token
from raftstate.state.commands import DeleteToken, UpsertToken
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S

SECRET = "0123456789abcdef0123456789abcdef"


async def test_no_request_passes_without_a_token_that_may(tmp_path: Path) -> None:
    rpc, http = free_ports(2)
    secret = tmp_path / "token"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    config = parse_config(
        '[cluster]\nacl_enabled = true\nacl_token_file = "token"\n'
        f'[nodes.server-1]\nrole = "server"\nrpc_port = {rpc}\nhttp_port = {http}\ndns_port = 0\n',
        tmp_path / "cluster.toml",
    )
    pki.ensure_local_pki(config)
    node = NodeProcess(config, config.node("server-1"), on_stop=lambda why: None)
    await node.start()
    try:
        assert node.side is not None
        base = f"http://127.0.0.1:{http}"
        async with aiohttp.ClientSession() as session:

            async def status(path: str, **headers: str) -> tuple[int, str]:
                async with session.get(base + path, headers=headers) as response:
                    return response.status, await response.text()

            for path in ("/v1/operator/usage", "/v1/kv/a", "/v1/agent/self", "/v1/snapshot", "/v1/acl/tokens"):
                assert (await status(path))[0] == 403, path
            assert await status("/v1/catalog/nodes") == (200, "[]"), "nothing that anonymous may see"
            assert await status("/v1/catalog/nodes", **{"X-Consul-Token": "wrong"}) == (403, "ACL not found")
            assert await status("/v1/catalog/nodes", Authorization=f"Basic {SECRET}") == (200, "[]")
            for headers in ({"X-Consul-Token": SECRET}, {"Authorization": f"Bearer {SECRET}"}):
                assert "server-1" in (await status("/v1/catalog/nodes", **headers))[1]
            assert "server-1" in (await status(f"/v1/catalog/nodes?token={SECRET}"))[1]
            other = hashlib.sha256(b"another secret").hexdigest()
            row = Token("00000000-0000-0000-0000-0000000000aa", other, policies=(MANAGEMENT_ID,))
            await node.side.backend.apply(UpsertToken(row))
            assert (await status("/v1/operator/usage", **{"X-Consul-Token": "another secret"}))[0] == 200
            await node.side.backend.apply(DeleteToken("00000000-0000-0000-0000-0000000000aa"))
            gone = await status("/v1/operator/usage", **{"X-Consul-Token": "another secret"})
            assert gone == (403, "ACL not found")
            listed: set[str] = set()
            async with asyncio.timeout(PATIENCE_S):  # the leader writes down the file's token when it has come to it
                while len(listed) < 2:
                    rows = json.loads((await status("/v1/acl/tokens", **{"X-Consul-Token": SECRET}))[1])
                    listed = {one["Description"] for one in rows}
            assert listed == {"Anonymous Token", "Initial Management Token"}
    finally:
        await node.stop()


def test_the_secret_must_be_long_and_private(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(PkiError, match="uuidgen"):
        load_secret(str(file))
    file.write_text("short")
    file.chmod(0o600)
    with pytest.raises(PkiError, match="at least 32"):
        load_secret(str(file))
    file.write_text(SECRET)
    file.chmod(0o644)
    with pytest.raises(PkiError, match="chmod 600"):
        load_secret(str(file))
