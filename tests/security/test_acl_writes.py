"""Writes to access control over RPC: an agent's certificate is not enough, a token that may is asked for anew."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from pathlib import Path

import pytest

from node.acl_writes import RESET_FILE, AclCommand, AclWrites, encode_write
from node.errors import BadRequest, Refused
from node.tokens import Tokens, hash_of
from raftstate.model.acl import MANAGEMENT_ID, Bootstrap, Policy, Role, Token
from raftstate.state import commands as c
from tests.support.acl import token_with
from tests.support.cluster import cluster
from tests.support.http_api import SigningBackend, TestCa
from tests.support.promises import PATIENCE_S
from tests.support.rpc import eventually

SECRET = "7d1f1f0e-4c0b-4f6a-9b9b-0f1f2f3f4f5f"
COMMANDS: list[AclCommand] = [
    c.UpsertToken(Token("t", hash_of("x"), policies=(MANAGEMENT_ID,))),
    c.DeleteToken("t"),
    c.UpsertPolicy(Policy("p", "p")),
    c.DeletePolicy("p"),
    c.UpsertRole(Role("r", "r", policies=(MANAGEMENT_ID,))),
    c.DeleteRole("r"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
async def test_each_takes_a_token_that_may_write(tmp_path: Path, command: AclCommand) -> None:
    backend = SigningBackend(TestCa())
    writes = AclWrites(backend.apply, Tokens(backend, default_allow=False), tmp_path)
    reader = await token_with(backend, 'acl = "read" operator = "write"')
    writer = await token_with(backend, 'acl = "write"')
    before = backend.machine.digest()
    writes_by_default = AclWrites(backend.apply, Tokens(backend, default_allow=True), tmp_path)
    with pytest.raises(Refused):
        await writes_by_default.run(encode_write("", command, ""))
    for token in ("", "no-such-token", reader, hash_of(writer)):
        with pytest.raises(Refused) as caught:
            await writes.run(encode_write(token, command, ""))
        assert caught.value.http_status == 403
    assert backend.machine.digest() == before
    assert (await writes.run(encode_write(writer, command, "")))["refusal"] is None
    await backend.close()


async def test_other_commands_do_not_go_this_way(tmp_path: Path) -> None:
    backend = SigningBackend(TestCa())
    writes = AclWrites(backend.apply, Tokens(backend, default_allow=True), tmp_path)
    for command in (c.KVSet("a"), c.RetireCARoot("r"), c.Restore("service", "web")):
        with pytest.raises(BadRequest, match="not a command of access control"):
            await writes.run(encode_write("", command, ""))  # type: ignore[arg-type]
    for params in (
        {},
        {"token": 1, "command": b"", "request_id": ""},
        {"token": "", "command": "", "request_id": ""},
    ):
        with pytest.raises(BadRequest):
            await writes.run(params)
    await backend.close()


async def test_the_first_token_is_made_anew_only_with_the_servers_own_file(tmp_path: Path) -> None:
    """What an agent says of the reset index counts for nothing: the file lies on the server's disk."""
    backend = SigningBackend(TestCa())
    writes = AclWrites(backend.apply, Tokens(backend), tmp_path)

    async def begin(reset_index: int = 0) -> bool:
        row = Token(str(uuid.uuid4()), hash_of(str(uuid.uuid4())), policies=(MANAGEMENT_ID,))
        return bool((await writes.run(encode_write("", c.BootstrapACL(row, reset_index), "")))["value"])

    assert await begin()
    index = (await backend.query("acl.bootstrap")).decode(Bootstrap).modify_index
    assert not await begin(index)
    file = tmp_path / RESET_FILE
    for text in ("", "soon", str(index + 1)):
        file.write_text(text)
        assert not await begin()
    file.write_text(f"{index}\n")
    assert await begin()
    assert not file.exists(), "it is good for one time"
    assert not await begin()
    await backend.close()


async def test_an_agent_writes_through_any_server_and_reads_what_it_wrote(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    extra = 'acl_enabled = true\nacl_token_file = "token"\n'
    async with cluster(tmp_path, clients=1, extra=extra) as made:
        leader = await made.leader()
        await eventually(lambda: leader.replica.machine.store.acl_bootstrap.rows)  # type: ignore[attr-defined]
        agent = made.clients["client-1"].backend
        tokens = Tokens(agent)
        assert (await tokens.resolve(SECRET)).authorizer.everything, "the file's token is there from the start"
        follower = await made.follower()
        for number, backend in enumerate((agent, follower.backend, leader.backend)):
            mine = str(uuid.uuid4())
            row = Token(str(uuid.uuid4()), hash_of(mine), policies=(MANAGEMENT_ID,))
            told = await backend.operator("acl.write", encode_write(SECRET, c.UpsertToken(row), f"request-{number}"))
            assert (told["value"], told["refusal"]) == (True, None)
            again = await backend.operator("acl.write", encode_write(SECRET, c.UpsertToken(row), f"request-{number}"))
            assert again["index"] == told["index"], "a write that is sent again happens once"
            assert (await tokens.resolve(mine)).authorizer.everything
            with pytest.raises(Refused, match=r"acl:write|ACL not found"):
                await backend.operator("acl.write", encode_write("wrong", c.DeleteToken(row.accessor_id), ""))
            await backend.operator("acl.write", encode_write(mine, c.DeleteToken(row.accessor_id), ""))
            assert await asyncio.wait_for(_until_refused(tokens, mine), PATIENCE_S) == "ACL not found"


async def _until_refused(tokens: Tokens, secret: str) -> str:
    while True:
        try:
            await tokens.resolve(secret)
        except Refused as error:
            return str(error)
        await asyncio.sleep(0.01)


async def test_the_leader_deletes_tokens_that_have_expired(tmp_path: Path) -> None:
    async with cluster(tmp_path, servers=1, extra="acl_enabled = true\n") as made:
        leader = await made.leader()
        now = datetime.datetime.now(datetime.UTC)
        for name, offset_s in (("past", -1), ("future", 3600), ("never", None)):
            ends = "" if offset_s is None else (now + datetime.timedelta(seconds=offset_s)).isoformat()
            await leader.backend.apply(c.UpsertToken(Token(name, hash_of(name), expiration_time=ends)))
        await leader.duties._delete_expired_tokens()
        rows = leader.replica.machine.store.tokens.rows  # type: ignore[attr-defined]
        await eventually(lambda: set(rows) == {"future", "never"})
