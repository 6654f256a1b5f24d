"""An API that asks for tokens, and tokens to ask with, for tests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from node.tokens import AccessControl, AgentTokens, Tokens, hash_of
from raftstate.model.acl import Policy, Token
from raftstate.state import commands as c
from tests.support.http_api import Node, SigningBackend, TestCa, serving

ROOT = "5f0b1c4e-9c1d-4a6e-8f57-0d3a1c2b4e5f"
"""The management secret of these APIs."""


@asynccontextmanager
async def guarded(
    directory: Path, *, default_allow: bool = False, clock: Callable[[], float] = time.time, **changes: Any
) -> AsyncIterator[Node]:
    """Run an agent whose API asks for tokens; `ROOT` may do everything."""
    backend = SigningBackend(TestCa())
    await backend.use_root()
    tokens = Tokens(backend, default_allow=default_allow, management_secret=ROOT, clock=clock)
    access = AccessControl(tokens, AgentTokens(directory / "acl-tokens.json"))
    try:
        async with serving(directory, backend=backend, access=access, **changes) as node:
            yield node
    finally:
        await backend.close()


async def token_with(backend: SigningBackend, rules: str, **fields: Any) -> str:
    """Write a token with these rules; return its secret."""
    secret = str(uuid.uuid4())
    policies: tuple[str, ...] = ()
    if rules:
        policy_id = str(uuid.uuid4())
        (await backend.apply(c.UpsertPolicy(Policy(policy_id, f"p-{policy_id}", rules=rules)))).unwrap()
        policies = (policy_id,)
    row = Token(str(uuid.uuid4()), hash_of(secret), policies=policies, **fields)
    (await backend.apply(c.UpsertToken(row))).unwrap()
    return secret


async def ask(node: Node, method: str, path: str, token: str = "", **kwargs: Any) -> tuple[int, str, dict[str, str]]:
    """Send a request with a token; return status, text and headers."""
    headers = {"X-Consul-Token": token} if token else {}
    async with node.http.request(method, node.url + path, headers=headers, **kwargs) as answer:
        return answer.status, await answer.text(errors="replace"), dict(answer.headers)
