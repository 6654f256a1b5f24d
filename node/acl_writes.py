"""Writes to access control itself, checked where they are made: on a server, whoever asked it.

An agent's certificate is not enough: with it alone, one stolen host could make a token that opens every API. So the
secret travels with the command, over the servers' own port, and the server looks at it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from node.backend import Applied, Backend
from node.errors import BadRequest, Refused
from node.tokens import Tokens
from raftstate.acl import WRITE
from raftstate.state import commands as c

log = logging.getLogger("lictor.acl")

RESET_FILE = "acl-bootstrap-reset"
"""In a server's data directory: the index in it lets the first token be made again, once (Consul's file)."""

AclCommand = (
    c.UpsertToken | c.DeleteToken | c.BootstrapACL | c.UpsertPolicy | c.DeletePolicy | c.UpsertRole | c.DeleteRole
)
_decoder = msgspec.msgpack.Decoder(AclCommand)
_encoder = msgspec.msgpack.Encoder()


def encode_write(token: str, command: AclCommand, request_id: str) -> dict[str, Any]:
    """Return the parameters of the verb ``acl.write``."""
    return {"token": token, "command": _encoder.encode(command), "request_id": request_id}


def decode_write(params: dict[str, Any]) -> tuple[str, AclCommand, str]:
    """Return (secret, command, request id). Raises BadRequest."""
    token, request_id, data = params.get("token"), params.get("request_id"), params.get("command")
    if not isinstance(token, str) or not isinstance(request_id, str) or not isinstance(data, bytes):
        raise BadRequest("acl.write needs token and request_id, texts, and command, bytes")
    try:
        command: AclCommand = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequest(f"acl.write: not a command of access control: {error}") from None
    return token, command, request_id


def outcome(applied: Applied) -> dict[str, Any]:
    """Return an outcome in the form in which a verb gives it."""
    refusal = applied.refusal
    told = None if refusal is None else [refusal.code, refusal.message, refusal.http_status]
    return {"index": applied.index, "value": applied.value, "refusal": told}


class AclWrites:
    """The verb ``acl.write`` of a server."""

    def __init__(self, apply: Callable[..., Awaitable[Applied]], tokens: Tokens, data_dir: Path) -> None:
        self._apply, self._tokens, self._reset_file = apply, tokens, data_dir / RESET_FILE

    async def run(self, params: dict[str, Any]) -> dict[str, Any]:
        """Check and write. Raises Refused (403)."""
        token, command, request_id = decode_write(params)
        if isinstance(command, c.BootstrapACL):
            reset_index = await asyncio.to_thread(self._reset_index)
            command = c.BootstrapACL(command.token, reset_index)
        else:
            bearer = await self._tokens.resolve(token)
            if not bearer.authorizer.allows("acl", "", WRITE):
                raise Refused("Permission denied: the token lacks permission 'acl:write'", http_status=403)
        applied = await self._apply(command, request_id=request_id or None)
        if isinstance(command, c.BootstrapACL) and applied.value is True:
            await asyncio.to_thread(self._reset_file.unlink, missing_ok=True)
        return outcome(applied)

    def _reset_index(self) -> int:
        try:
            text = self._reset_file.read_text().strip()
        except OSError:
            return 0  # there is none: the usual case
        if not (text.isascii() and text.isdigit()) or len(text) > 18:
            log.warning("%s is ignored: it must hold the reset index that the refusal names", self._reset_file)
            return 0
        return int(text)


async def write_acl(backend: Backend, token: str, command: AclCommand, request_id: str | None = None) -> Any:
    """Write a command of access control from any node; return its value. Raises Refused."""
    told = await backend.operator("acl.write", encode_write(token, command, request_id or ""))
    if told["refusal"] is not None:
        code, message, http_status = told["refusal"]
        raise Refused(message, reason=code, http_status=http_status)
    return told["value"]
