"""How a server that is no member comes in: it asks the others for it, once it is up and hears no leader.

That is a server with ``join = true`` that starts for the first time, and one that was removed while it was dead.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

import msgspec

from node.config import NodeConfig
from node.errors import NodeError
from node.peers import PeerConnections
from node.protocol import OPERATOR, OperatorRequest, encode
from raftstate.errors import RaftError
from raftstate.replica import Replica

log = logging.getLogger("lictor.server")

PATIENCE_S = 3.0
"""A member hears of a leader within this time, unless there is none."""
ASK_TIMEOUT_S = 5.0
ADD_TIMEOUT_S = 60.0
PAUSE_S = 1.0


async def join_if_unknown(
    node: NodeConfig, others: Sequence[NodeConfig], replica: Replica, peers: PeerConnections, rng: random.Random
) -> None:
    """Return once this server has heard from a leader; ask to be added if the cluster does not know it."""
    while True:
        try:
            await replica.wait_leader(PATIENCE_S)
            return
        except RaftError:
            pass
        for other in rng.sample(others, len(others)):
            try:
                connection = await peers.get(other.name, other.rpc_endpoint)
                body = await connection.call(OPERATOR, encode(OperatorRequest("raft.configuration")), ASK_TIMEOUT_S)
                servers = msgspec.msgpack.decode(body)["Servers"]
                if any(server["ID"] == node.name for server in servers):
                    break  # known: the leader will come to us
                log.warning("server: %s is no member of the cluster: asking %s to be added", node.name, other.name)
                request = OperatorRequest("raft.add_peer", {"id": node.name, "address": node.rpc_endpoint})
                await connection.call(OPERATOR, encode(request), ADD_TIMEOUT_S)
                return
            except NodeError as error:
                log.info("server: %s cannot tell whether we are a member: %s", other.name, error)
        await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.5))
