"""Writes where access control is on: each command is checked against its token, whatever way led to it."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.errors import Refused
from node.http.acl_commands import Ask, needs_of, txn_needs
from node.http.acl_needs import BEARER, COVERED, first_lacking, lacks, permit
from node.http.context import Context
from node.views import canonical
from raftstate.state import commands as c


async def permit_command(ctx: Context, request: web.Request, command: Any) -> None:
    """Turn a write away unless its token may do it; an endpoint whose own need covers it has been let in already.

    Raises Refused (403), and the backend's errors.
    """
    bearer = request.get(BEARER)
    if bearer is None:  # an endpoint for everyone writes nothing
        raise Refused("Permission denied: this endpoint writes for nobody: please report this", http_status=403)
    if bearer.authorizer.everything or request.get(COVERED):
        return
    permit(request, *await needs_of(command, _asker(ctx)))


async def denied_operations(ctx: Context, request: web.Request, ops: tuple[c.TxnOp, ...]) -> list[dict[str, Any]]:
    """Return the errors of a transaction's operations that its token may not do, in the form of its answer."""
    bearer = request.get(BEARER)
    if bearer is None or bearer.authorizer.everything:
        return []
    ask, errors = _asker(ctx), []
    for number, op in enumerate(ops):
        if lacking := first_lacking(bearer, await txn_needs(op, ask)):
            errors.append({"OpIndex": number, "What": lacks(bearer, lacking)})
    request[COVERED] = not errors
    return errors


def _asker(ctx: Context) -> Ask:
    """Return how the state is asked: each question once a request, however many operations it bears on."""
    told: dict[str, Any] = {}

    async def ask(query: str, params: dict[str, Any]) -> Any:
        key = canonical(query, params)
        if key not in told:
            told[key] = (await ctx.backend.query(query, params)).value
        return told[key]

    return ask
