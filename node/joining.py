"""How a server that is no member comes in: it asks the others for it, once it is up and hears no leader.

That is a server with ``join = true`` that starts for the first time, and one that was removed while it was dead. One
that lost its raft data first has itself removed (`node.rejoin`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from node.config import NodeConfig
from node.errors import NodeError
from node.peers import PeerConnections
from node.protocol import OPERATOR, OperatorRequest, encode
from node.rpc.client import ClientConnection
from raftstate.errors import RaftError
from raftstate.replica import Replica

log = logging.getLogger("lictor.server")

PATIENCE_S = 3.0
"""A member hears of a leader within this time, unless there is none."""
ASK_TIMEOUT_S = 5.0
ADD_TIMEOUT_S = 60.0
REMOVE_TIMEOUT_S = 30.0
PAUSE_S = 1.0


async def leave_first(
    node: NodeConfig, others: Sequence[NodeConfig], peers: PeerConnections, rng: random.Random
) -> None:
    """Return once the committed membership is without this server; until then it must not take part in raft.

    Tries for ever: the others may be down, or electing, or so few that they have no quorum without this one.
    """
    request = encode(OperatorRequest("raft.leave", {"id": node.name}))
    while True:
        for other in rng.sample(others, len(others)):
            try:
                connection = await peers.get(other.name, other.rpc_endpoint)
                await connection.call(OPERATOR, request, REMOVE_TIMEOUT_S)
                log.warning(
                    "server: %s is out of the membership: it comes in anew, without a vote at first", node.name
                )
                return
            except NodeError as error:
                log.warning("server: %s does not take %s out of the membership yet: %s", other.name, node.name, error)
        await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.5))


async def ask_members(
    node: NodeConfig, others: Sequence[NodeConfig], peers: PeerConnections
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the members as a leader confirms them with a quorum, and why each server that was asked did not tell."""
    failures: list[str] = []
    for other in others:
        try:
            return await _members(await peers.get(other.name, other.rpc_endpoint)), failures
        except NodeError as error:
            failures.append(f"{other.name} at {other.rpc_endpoint}: {error}")
    return [], failures


async def _members(connection: ClientConnection) -> list[dict[str, Any]]:
    request = OperatorRequest("raft.configuration", {"consistent": True})  # a lease may outlive its quorum a little
    body = await connection.call(OPERATOR, encode(request), ASK_TIMEOUT_S)
    servers: list[dict[str, Any]] = msgspec.msgpack.decode(body)["Servers"]
    return servers


async def join_if_unknown(
    node: NodeConfig,
    others: Sequence[NodeConfig],
    replica: Replica,
    peers: PeerConnections,
    rng: random.Random,
    *,
    patience_s: float = PATIENCE_S,
) -> None:
    """Return once this server has heard from a leader; ask to be added if the cluster does not know it."""
    while True:
        try:
            await replica.wait_leader(patience_s)
            return
        except RaftError:
            patience_s = PATIENCE_S
        for other in rng.sample(others, len(others)):
            try:
                connection = await peers.get(other.name, other.rpc_endpoint)
                if any(server["ID"] == node.name for server in await _members(connection)):
                    break  # known: the leader will come to us
                log.warning("server: %s is no member of the cluster: asking %s to be added", node.name, other.name)
                request = OperatorRequest("raft.add_peer", {"id": node.name, "address": node.rpc_endpoint})
                await connection.call(OPERATOR, encode(request), ADD_TIMEOUT_S)
                return
            except NodeError as error:
                log.info("server: %s cannot tell whether we are a member: %s", other.name, error)
        await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.5))
