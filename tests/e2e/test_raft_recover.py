"""A server whose raft data is damaged or lost comes back from its peers, and nobody ever counts its vote twice."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cli.client import Api
from node.config import ClusterConfig
from node.data_dir import DataDirBusy
from node.errors import Refused
from node.recovery import recover
from raftstate.errors import JournalDamaged, Stopped
from raftstate.state.commands import KVSet
from tests.e2e.support_e2e import Mesh, mesh, wait_until
from tests.support.cluster import cluster, make_config
from tests.support.promises import PATIENCE_S
from tests.support.rpc import eventually


def damage(raft: Path) -> None:
    """Turn a bit in the middle of what the journal certainly held durably."""
    segment = max((raft / "journal").glob("*"), key=lambda path: len(path.read_bytes().rstrip(b"\0")))
    data = bytearray(segment.read_bytes())
    data[len(data.rstrip(b"\0")) // 2] ^= 0x10
    segment.write_bytes(data)


async def recovered(config: ClusterConfig, name: str) -> Path | None:
    return await asyncio.to_thread(recover, config, config.node(name))


async def test_it_takes_part_in_nothing_until_the_others_have_let_it_go(tmp_path: Path) -> None:
    async with cluster(tmp_path) as running:
        lost = (await running.follower()).node
        leader = await running.leader()
        for number in range(30):
            (await leader.backend.apply(KVSet(f"k/{number}", b"x" * 100))).unwrap()
        await eventually(lambda: running.servers[lost.name].replica.applied_index >= leader.replica.applied_index)
        await running.stop_server(lost.name)
        damage(lost.data_dir / "raft")
        with pytest.raises(JournalDamaged, match="lictor operator raft recover"):
            await running.start_server(lost.name)
        aside = await recovered(running.config, lost.name)
        assert aside == lost.data_dir / "raft.damaged-1"
        assert aside is not None
        assert list((aside / "journal").iterdir())

        others = list(running.servers)
        await running.stop_server(others[0])
        await running.stop_server(others[1])
        back = await running.start_server(lost.name)
        await running.start_server(others[0])
        await asyncio.sleep(1.5)  # two of three run, so it would be elected with the vote that must not be given
        with pytest.raises(Stopped):
            back.replica.status()
        assert running.servers[others[0]].replica.leader is None
        assert back.backend is not None

        await running.start_server(others[1])
        await eventually(lambda: back.replica.leader is not None if back.replica._core else False, 30)
        leader = await running.leader()

        def votes() -> bool:
            return [one.voter for one in leader.replica.members() if one.id == lost.name] == [True]

        await eventually(votes, 20)
        keys = (await back.backend.query("kv.keys", {"prefix": "k/"})).value
        assert len(keys) == 30
        # From then on it is a server as any other: a restart asks nobody.
        await running.stop_server(lost.name)
        again = await running.start_server(lost.name)
        await eventually(lambda: again.replica.leader is not None, 10)
        keys = (await again.backend.query("kv.keys", {"prefix": "k/"}, mode="stale")).value
        assert len(keys) == 30


async def test_recovery_is_refused_where_it_would_lose_or_cannot_work(tmp_path: Path) -> None:
    async with cluster(tmp_path / "three", clients=1) as running:
        await running.leader()
        names = list(running.servers)
        await running.stop_server(names[0])
        await running.stop_server(names[1])
        raft = running.config.node(names[0]).data_dir / "raft"
        with pytest.raises(Refused, match=r"no other server has a leader.*list-peers"):
            await recovered(running.config, names[0])
        assert raft.is_dir(), "nothing was changed"
        with pytest.raises(Refused, match="is a client"):
            await recovered(running.config, "client-1")
        await running.start_server(names[1])
        await running.leader()
        lock = running.config.node(names[0]).data_dir / "lock"
        holder = await asyncio.create_subprocess_exec("flock", str(lock), "sleep", "60")
        try:
            await eventually(lambda: _locked(lock))
            with pytest.raises(DataDirBusy, match="stop it first"):
                await recovered(running.config, names[0])
        finally:
            holder.kill()
            await holder.wait()
        assert raft.is_dir()
    alone = make_config(tmp_path / "one", 1, 0)
    with pytest.raises(Refused, match="only server"):
        await recovered(alone, "server-1")
    async with cluster(tmp_path / "two", servers=2) as pair:
        await pair.leader()
        await pair.stop_server("server-1")
        with pytest.raises(Refused, match="A cluster of two has no quorum"):
            await recovered(pair.config, "server-1")


def _locked(path: Path) -> bool:
    import fcntl

    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def test_a_damaged_server_recovers_by_the_command_it_names(tmp_path: Path) -> None:
    with mesh(tmp_path) as lictor:
        lictor.wait_leader()
        for number in range(20):
            lictor.api().put(f"/v1/kv/kept/{number}", b"x" * 200)
        lictor.wait_caught_up()
        supervisor = lictor.supervisor
        victim = next(one.name for one in supervisor.status() if one.raft == "follower")
        supervisor.kill(victim)
        damage(supervisor.config.node(victim).data_dir / "raft")
        config = str(lictor.layout.config)
        supervisor.start([victim])
        assert wait_until(lambda: supervisor.state(victim) == "dead", PATIENCE_S)
        assert "lictor operator raft recover" in supervisor.log_end(victim, 40)
        said = lictor.lictor("operator", "raft", "recover", "-config", config, "-node", victim).stdout
        assert "raft.damaged-1" in said
        lictor.api().put("/v1/kv/kept/20", b"written meanwhile")
        supervisor.start([victim])
        supervisor.wait_ready([victim], print)
        own = Api(supervisor.http_addr(victim))

        def votes() -> bool:
            return [row["Voter"] for row in _servers(lictor) if row["ID"] == victim] == [True]

        assert wait_until(votes, PATIENCE_S), _servers(lictor)
        assert len(own.get("/v1/kv/kept/", {"keys": ""}).json()) == 21
        assert wait_until(lambda: len(own.get("/v1/kv/kept/", {"keys": "", "stale": ""}).json()) == 21, PATIENCE_S)


def _servers(lictor: Mesh) -> list[dict[str, object]]:
    found: list[dict[str, object]] = lictor.api().get("/v1/operator/raft/configuration").json()["Servers"]
    return found
