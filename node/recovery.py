"""``lictor operator raft recover``: let a stopped server whose raft data is damaged or lost rejoin its peers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from node import pki
from node.config import ClusterConfig, NodeConfig
from node.data_dir import DataDir
from node.errors import NodeError, Refused
from node.joining import ask_members
from node.peers import PeerConnections
from node.rejoin import RejoinMarker
from raftstate.disk import RealDisk

_BACKUP = "restore a backup instead: empty all servers' data directories, start them, `lictor snapshot restore FILE`"


def recover(config: ClusterConfig, node: NodeConfig) -> Path | None:
    """Set the server's raft data aside so that its next start rejoins; return where it is now, if there was any.

    Raises NodeError: DataDirBusy while the node runs, Refused when its peers could not take it back, and then
    nothing has changed.
    """
    if not node.is_server:
        raise Refused(f"{node.name} is a client: it keeps no raft data")
    data_dir = DataDir(node.data_dir)
    data_dir.open()
    try:
        asyncio.run(_refuse_if_hopeless(config, node))
        return RejoinMarker(RealDisk(), node.data_dir).begin()
    except OSError as error:
        raise NodeError(f"{node.data_dir} cannot be changed: {error}; free or replace the disk first") from error
    finally:
        data_dir.close()


async def _refuse_if_hopeless(config: ClusterConfig, node: NodeConfig) -> None:
    """Its peers must have a leader and a quorum without it: otherwise its data may be needed yet."""
    others = [server for server in config.servers() if server.name != node.name]
    if not others:
        raise Refused(f"{node.name} is the cluster's only server, so nobody has the state: {_BACKUP}")
    context = pki.client_context(pki.TlsFiles(config.tls_dir), node.name, pki.ALPN_RPC)
    peers = PeerConnections(context, config.datacenter)
    try:
        random.shuffle(others)
        members, failures = await ask_members(node, others, peers)
    finally:
        peers.drop_all_but("")
        await peers.close()
        await asyncio.sleep(0.01)  # the loop closes sockets in its next turns, and it ends with this coroutine
    voters = [member["ID"] for member in members if member["Voter"] and member["ID"] != node.name]
    if not members:
        few = (
            f" A cluster of two has no quorum without {node.name}: if its data is beyond repair, {_BACKUP}."
            if len(others) == 1
            else ""
        )
        raise Refused(
            f"no other server has a leader, so none can take {node.name} back; nothing was changed. Start the "
            f"others, see that they have one (`lictor operator raft list-peers`), and try again.{few} "
            f"Asked: {'; '.join(failures)}"
        )
    if len(voters) < 2 and any(member["ID"] == node.name for member in members):
        raise Refused(
            f"{node.name} can be taken out of the membership and rejoin only where at least two other servers vote; "
            f"here {', '.join(voters) or 'none'} does. Nothing was changed: {_BACKUP}"
        )
