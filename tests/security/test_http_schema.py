"""schemathesis against a running server: every endpoint of its own description, by well and badly formed requests."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure

from node import pki
from node.config import parse_config
from node.main import NodeProcess
from tests.support.ports import free_ports

with warnings.catch_warnings():
    # What schemathesis' own dependencies deprecate is no matter of ours.
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

EXAMPLES = 12
TIMEOUT_S = 60.0
"""An answer that takes so long hangs; one that takes ten seconds may only tell of a busy machine."""
LEFT_OUT = {
    "/v1/agent/leave",  # ends the node
    "/v1/agent/monitor",  # streams without end
    "/v1/agent/connect/proxy/{id}/stream",  # streams without end
    "/v1/operator/raft/peer",  # takes the only server out
    "/v1/operator/debug/partition",
    "/v1/agent/force-leave/{node}",
}
DOCUMENTED_500 = (
    "No cluster leader", "No path to datacenter", "Invalid Session TTL", "Session TTL", "required query parameter",
    "ID must be empty", "Cannot modify non-existent intention", "Invalid intention ID", "invalid session",
    "no other voter is reachable", "Missing check",
)  # fmt: skip
"""Where Consul answers a client's mistake with 500, and so do we, word for word."""


class Node:
    """A server in a thread with a loop of its own."""

    def __init__(self, directory: Path, cluster: str = "") -> None:
        rpc, self.port = free_ports(2)
        config = parse_config(
            f'{cluster}[nodes.server-1]\nrole = "server"\nrpc_port = {rpc}\nhttp_port = {self.port}\ndns_port = 0\n',
            directory / "cluster.toml",
        )
        pki.ensure_local_pki(config)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._process = NodeProcess(config, config.node("server-1"), on_stop=lambda why: None)
        # `asyncio.run` ends what is left: a loop that is merely closed leaves generators and threads to be found.
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._process.start()
        self._ready.set()
        await self._over.wait()
        await self._process.stop()

    def __enter__(self) -> Node:
        self._thread.start()
        if not self._ready.wait(60):
            self.__exit__()
            raise AssertionError("the server has not started within 60 s")
        return self

    def __exit__(self, *error: object) -> None:
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("schema")) as one:
        yield one


def check(case: Any, session: Any) -> None:
    """Send one request and judge the answer."""
    if isinstance(case.query, dict):
        # A blocking query would park: any index is fine, for a moment.
        case.query = {**case.query, "wait": "1ms"} if "index" in case.query else case.query
    answer = case.call(session=session, timeout=TIMEOUT_S)
    checks = [response_headers_conformance, status_code_conformance]
    if answer.content and case.operation.path != "/v1/snapshot":  # x-gzip, as Consul's
        checks.append(content_type_conformance)
    if (
        answer.status_code == 200
        and answer.content
        and case.operation.path != "/v1/snapshot"
        and "pretty" not in (case.query or {})
    ):
        checks.append(response_schema_conformance)
    text = answer.content.decode(errors="replace")
    if answer.status_code >= 500 and answer.status_code != 501 and not any(part in text for part in DOCUMENTED_500):
        checks.append(not_a_server_error)
    case.validate_response(answer, checks=checks)


@pytest.mark.timeout(600)
def test_the_api_keeps_to_its_description(node: Node) -> None:
    """Both what the description allows and what it does not; nothing may break the server or the description."""
    import requests

    url = f"http://127.0.0.1:{node.port}/v1/openapi.json"
    schema = schemathesis.openapi.from_url(url)
    tried, failures = 0, []
    bounds = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with requests.Session() as session:
        document = session.get(url, timeout=TIMEOUT_S).json()
        for found in schema.get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr]
            if operation.path in LEFT_OUT or operation.path.startswith("/v1/{family"):
                continue
            modes = [schemathesis.GenerationMode.POSITIVE]
            described = document["paths"][operation.path][operation.method]
            # Of what may be any JSON nothing is malformed.
            if described.get("requestBody", {}).get("required") and "application/json" in str(
                described["requestBody"]
            ):
                modes.append(schemathesis.GenerationMode.NEGATIVE)
            for mode in modes:
                tried += 1

                @bounds
                @given(case=operation.as_strategy(generation_mode=mode))
                def fuzz(case: Any) -> None:
                    check(case, session)

                try:
                    fuzz()
                except FailureGroup as error:  # collected, so that one run tells of every endpoint
                    failures.append(f"{operation.label} ({mode.value}): {error}")
                except FlakyFailure as error:  # sent again it was answered well: what went wrong is within
                    failures.append(f"{operation.label} ({mode.value}): {''.join(format_exception(error))}")
    assert tried > 90
    assert not failures, "\n\n".join(failures)
