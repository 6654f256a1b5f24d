"""``PUT /v1/txn``: up to 64 operations, all or none."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from aiohttp import web

from node.http.acl_writes import denied_operations
from node.http.answers.txn import TxnAnswer
from node.http.catalog import CatalogCheck, CatalogServiceBody
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError
from node.http.respond import json_response
from node.http.writing import body_as, write
from raftstate.model.catalog import Check, Node, ServiceInstance
from raftstate.model.wire import Wire
from raftstate.state import commands

routes = Routes("txn")
OPERATIONS_MAX = 64


class KVOp(Wire, frozen=True):
    """``{"KV": …}``; the value is base64."""

    verb: str = ""
    key: str = ""
    value: str | None = None
    flags: int = 0
    index: int = 0
    session: str = ""


class NodeBody(Wire, frozen=True):
    """A node as a transaction gives it."""

    node: str = ""
    id: str = ""
    address: str = ""
    datacenter: str = ""
    tagged_addresses: dict[str, str] = {}
    meta: dict[str, str] = {}
    modify_index: int = 0


class NodeOp(Wire, frozen=True):
    """``{"Node": …}``."""

    verb: str = ""
    node: NodeBody = NodeBody()


class ServiceOp(Wire, frozen=True):
    """``{"Service": …}``."""

    verb: str = ""
    node: str = ""
    service: CatalogServiceBody = CatalogServiceBody()


class CheckBody(CatalogCheck, frozen=True, kw_only=True):
    """A check as a transaction gives it."""

    modify_index: int = 0


class CheckOp(Wire, frozen=True):
    """``{"Check": …}``."""

    verb: str = ""
    check: CheckBody = CheckBody()


class Operation(Wire, frozen=True):
    """One operation: exactly one of these."""

    kv: KVOp | None = None
    node: NodeOp | None = None
    service: ServiceOp | None = None
    check: CheckOp | None = None


@routes.add("PUT", "/v1/txn", body=tuple[Operation, ...], answer=TxnAnswer, statuses=(200, 409))
async def txn(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Run operations, all or none: 200, or 409 with the errors of those that failed."""
    body = await body_as(ctx, request, tuple[Operation, ...])
    if len(body) > OPERATIONS_MAX:
        raise HttpError(413, f"Transaction contains too many operations ({len(body)} > {OPERATIONS_MAX})")
    ops = tuple(_command(number, operation, ctx) for number, operation in enumerate(body))
    if denied := await denied_operations(ctx, request, ops):
        return json_response(request, {"Results": None, "Errors": denied}, status=409)
    outcome: dict[str, Any] = await write(ctx, request, commands.Txn(ops))
    return json_response(request, outcome, status=409 if outcome["Errors"] else 200)


def _command(number: int, operation: Operation, ctx: Context) -> commands.TxnOp:
    given = [part for part in (operation.kv, operation.node, operation.service, operation.check) if part is not None]
    if len(given) != 1:
        raise BadRequest(f"operation {number} must have exactly one of KV, Node, Service, Check")
    if (kv := operation.kv) is not None:
        try:
            value = base64.b64decode(kv.value or "", validate=True)
        except ValueError as error:
            raise BadRequest(f"operation {number}: Value is not base64: {error}") from error
        if len(value) > ctx.options.kv_value_bytes_max:
            raise HttpError(413, f"Value for key {kv.key[:100]!r} is too large")
        return commands.TxnKV(kv.verb, kv.key, value, kv.flags, kv.index, kv.session)
    if (node := operation.node) is not None:
        row = node.node
        return commands.TxnNode(
            node.verb,
            Node(
                node=row.node,
                address=row.address,
                id=row.id,
                datacenter=ctx.agent.options.datacenter,
                tagged_addresses=row.tagged_addresses,
                meta=row.meta,
            ),
            row.modify_index,
        )
    if (service := operation.service) is not None:
        fields = msgspec.structs.asdict(service.service)
        fields |= {"node": service.node, "id": service.service.id or service.service.service}
        return commands.TxnService(service.verb, ServiceInstance(**fields), service.service.modify_index)
    check = operation.check
    assert check is not None
    row_fields = msgspec.structs.asdict(check.check)
    index = row_fields.pop("modify_index")
    row_fields["check_id"] = row_fields["check_id"] or row_fields["name"]
    row_fields["status"] = row_fields["status"] or "critical"
    return commands.TxnCheck(check.verb, Check(**row_fields), index)
