"""A sidecar that is stopped holds its stream and says nothing; its check says so. One instance has one sidecar."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from node.agent.agent import Unknown
from node.agent.definitions import CheckDefinition
from node.agent.store import AgentStore
from tests.support.http_api import Node, eventually, serving
from tests.unit.test_http_walkthrough import SERVER_SIDECAR, register

SIDECAR = "echo-server-1-sidecar-proxy"
CHECK = f"service:{SIDECAR}"


async def opened(node: Node, sidecar_id: str = SIDECAR, *, answers: bool = True, pid: str = "7") -> Any:
    headers = {"X-Lictor-Pid": pid} | ({"X-Lictor-Answers": "1"} if answers else {})
    url = f"{node.url}/v1/agent/connect/proxy/{sidecar_id}/stream"
    response = await node.http.post(url, json=SERVER_SIDECAR, headers=headers)
    assert response.status == 200, await response.text()
    return response


def status(node: Node) -> tuple[str, str]:
    row = node.agent.local.checks[CHECK].row
    return row.status, row.output


async def test_silence_is_critical_and_an_answer_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path, sidecar_silence_s=2.0, heartbeat_s=0.05) as node:
        await register(node)
        stream = await opened(node)
        answer = f"/v1/agent/connect/answer/{SIDECAR}"
        assert status(node)[0] == "passing"
        await eventually(lambda: status(node)[0] == "critical")
        assert "has not answered" in status(node)[1]
        await node.put(answer, headers={"X-Lictor-Pid": "8"}, status=404)
        assert status(node)[0] == "critical"
        await node.put(answer, headers={"X-Lictor-Pid": "7"})
        assert status(node)[0] == "passing"
        # As long as it answers, it stays so.
        seen: list[str] = []
        stop_listening = node.agent.local.listen(lambda item: seen.append(item[1]))
        for _ in range(25):
            await asyncio.sleep(0.1)  # the very thing under test: time passes, answers come
            await node.put(answer, headers={"X-Lictor-Pid": "7"})
        stop_listening()
        assert CHECK not in seen
        await eventually(lambda: status(node)[0] == "critical")
        stream.close()
        await eventually(lambda: "ended" in status(node)[1])
        await node.put(answer, headers={"X-Lictor-Pid": "7"}, status=404)


async def test_who_promises_no_answers_is_judged_by_the_stream_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, sidecar_silence_s=0.1, heartbeat_s=0.05) as node:
        await register(node)
        stream = await opened(node, answers=False)
        for _ in range(8):
            await stream.content.readline()
        assert status(node)[0] == "passing"
        stream.close()


@pytest.mark.parametrize("gone", ["echo-server-1", SIDECAR])
async def test_the_last_line_says_that_the_registration_has_gone(tmp_path: Path, gone: str) -> None:
    async with serving(tmp_path) as node:
        await register(node)
        stream = await opened(node)
        first = json.loads(await stream.content.readline())
        assert first["Registered"] is True
        await node.put(f"/v1/agent/service/deregister/{gone}")
        lines = [json.loads(line) for line in (await stream.content.read()).splitlines()]
        assert lines[-1]["Registered"] is False
        assert [line for line in lines[:-1] if line.get("Registered") is False] == []


async def test_an_agent_that_ends_says_nothing_of_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await register(node)
        stream = await opened(node)
        assert json.loads(await stream.content.readline())["Registered"] is True
        node.agent.streams.end_all()
        lines = [json.loads(line) for line in (await stream.content.read()).splitlines()]
        assert [line for line in lines if line.get("Registered") is False] == []


async def test_a_second_sidecar_of_an_instance_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await register(node)
        stream = await opened(node, pid="4711")
        url = f"{node.url}/v1/agent/connect/proxy/another-sidecar/stream"
        async with node.http.post(url, json=SERVER_SIDECAR) as refused:
            text = await refused.text()
            assert refused.status == 409, text
        assert SIDECAR in text
        assert "4711" in text
        assert "another-sidecar" not in node.agent.local.services
        stream.close()
        await eventually(lambda: len(node.agent.streams) == 0)
        (await opened(node, "another-sidecar")).close()


async def test_a_check_is_withdrawn_in_turn_with_its_services_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved last must be what holds: a withdrawal that overtakes a registration would be undone by it."""
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Check": {"TTL": "60s", "CheckID": "alive"}})
        save, gate, entered = AgentStore.save_check, asyncio.Event(), asyncio.Event()

        async def slow(self: AgentStore, saved: Any) -> None:
            entered.set()
            await gate.wait()
            await save(self, saved)

        monkeypatch.setattr(AgentStore, "save_check", slow)
        own = CheckDefinition(name="own", ttl=60.0, service_id="web")
        adding = asyncio.create_task(node.agent.register_check(own))
        await entered.wait()
        removing = [
            asyncio.create_task(node.agent.deregister_check("alive")),
            asyncio.create_task(node.agent.deregister_service("web")),
        ]
        done, _ = await asyncio.wait(removing, timeout=0.1)
        assert not done
        gate.set()
        await adding
        await asyncio.gather(*removing)
        with pytest.raises(Unknown):
            await node.agent.deregister_check("own")
    async with serving(tmp_path) as node:
        assert set(node.agent.local.checks) == set()
        assert set(node.agent.local.services) == set()
