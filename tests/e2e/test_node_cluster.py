"""Three servers and an agent in one loop, over real TLS and disks: what the backends promise."""

from __future__ import annotations

from pathlib import Path

from raftstate.state.commands import KVSet
from tests.support.cluster import cluster


async def test_a_write_through_a_follower_is_read_everywhere(tmp_path: Path) -> None:
    async with cluster(tmp_path) as running:
        follower = await running.follower()
        applied = await follower.backend.apply(KVSet("a", b"1"))
        assert applied.unwrap() is True
        for server in running.servers.values():
            for mode in ("default", "consistent"):
                result = await server.backend.query("kv.get", {"key": "a"}, mode=mode)  # type: ignore[arg-type]
                assert result.value["Value"] == b"1"
        stale = await follower.backend.query("kv.get", {"key": "a"}, mode="stale")
        assert stale.value["Value"] == b"1"
