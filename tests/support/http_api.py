"""A node's HTTP API over a LocalBackend, with a small certificate authority, for tests."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.agent.agent import LocalAgent
from node.agent.options import AgentOptions
from node.errors import BadRequest
from node.http.app import create_app, make_runner
from node.http.context import HttpOptions
from node.http.front.guards import FrontOptions
from node.http.front.listener import FrontRunner
from node.local_backend import LocalBackend
from node.tokens import AccessControl
from raftstate.model.connect import CARoot
from raftstate.model.identity import SpiffeId
from raftstate.state import commands
from raftstate.state.commands import MalformedCommand
from tests.support.promises import PATIENCE_S

TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555.consul"


class TestCa:
    """A root that signs whatever it is asked to; its rules are not what these tests are about."""

    __test__ = False

    def __init__(self, lifetime_s: float = 3600.0) -> None:
        self.lifetime_s = lifetime_s
        self.signed: list[tuple[str, str]] = []
        self.new_root()

    def new_root(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test root {time.monotonic_ns()}")])
        now = datetime.datetime.now(datetime.UTC)
        self.cert = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def root(self) -> CARoot:
        pem = self.cert.public_bytes(serialization.Encoding.PEM).decode()
        digest = self.cert.fingerprint(hashes.SHA1()).hex(":")
        return CARoot(id=digest, name="test root", root_cert=pem)

    def sign(self, csr_pem: str, service: str, instance: str) -> str:
        self.signed.append((service, instance))
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        now = datetime.datetime.now(datetime.UTC)
        uri = SpiffeId(trust_domain=TRUST_DOMAIN, service=service).uri()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(csr.subject)
            .issuer_name(self.name)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(seconds=1))
            .not_valid_after(now + datetime.timedelta(seconds=self.lifetime_s))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


class SigningBackend(LocalBackend):
    """LocalBackend with an authority, and a switch that takes the cluster away."""

    def __init__(self, ca: TestCa) -> None:
        super().__init__()
        self.ca = ca
        self.away: Exception | None = None
        """While set, writes and signings fail with it."""
        self.applied: list[Any] = []
        self.restored = b""

    async def apply(self, command: Any, **kwargs: Any) -> Any:
        if self.away is not None:
            raise self.away
        self.applied.append(command)
        try:
            return await super().apply(command, **kwargs)
        except (OverflowError, MalformedCommand) as error:
            # As the backends of servers and agents do.
            raise BadRequest(f"the command cannot be encoded: {error}") from error

    def submit(self, command: Any, told: Any) -> bool:
        begun = self.away is None and super().submit(command, told)
        if begun:
            self.applied.append(command)
        return begun

    async def sign_leaf(self, csr_pem: str, *, service: str, instance: str = "") -> str:
        if self.away is not None:
            raise self.away
        return self.ca.sign(csr_pem, service, instance)

    async def snapshot_restore(self, chunks: AsyncIterator[bytes], *, foreign: bool = False) -> None:
        self.restored_foreign = foreign
        self.restored = b"".join([chunk async for chunk in chunks])

    async def use_root(self) -> None:
        await self.apply(commands.SetCAConfig(config={"LeafCertTTL": "72h"}, trust_domain=TRUST_DOMAIN))
        await self.apply(commands.AddCARoot(self.ca.root(), sealed_key=b"sealed"))


@dataclass
class Node:
    """One node under test."""

    backend: SigningBackend
    agent: LocalAgent
    http: aiohttp.ClientSession
    url: str
    runner: FrontRunner

    @property
    def port(self) -> int:
        return int(self.runner.addresses[0][1])

    async def get(self, path: str, **kwargs: Any) -> Any:
        async with self.http.get(self.url + path, **kwargs) as answer:
            assert answer.status == 200, (answer.status, await answer.text())
            assert answer.content_type == "application/json"
            return await answer.json()

    async def put(self, path: str, body: Any = None, *, status: int = 200, **kwargs: Any) -> str:
        async with self.http.put(self.url + path, json=body, **kwargs) as answer:
            text = await answer.text()
            assert answer.status == status, (answer.status, text)
            return text


def options(directory: Path, node: str = "n1", **changes: Any) -> AgentOptions:
    defaults: dict[str, Any] = {"address": "127.0.0.1", "data_dir": directory, "register_wait_s": 2.0}
    return AgentOptions(node=node, **defaults | changes)


@asynccontextmanager
async def serving(
    directory: Path,
    *,
    backend: SigningBackend | None = None,
    http_options: HttpOptions | None = None,
    front_options: FrontOptions | None = None,
    access: AccessControl | None = None,
    **changes: Any,
) -> AsyncIterator[Node]:
    """Run an agent and its API on a free port."""
    own = backend is None
    if backend is None:
        backend = SigningBackend(TestCa())
        await backend.use_root()
    agent = LocalAgent(backend, options(directory, **changes))
    await agent.start()
    runner = make_runner(create_app(backend, agent, http_options, access=access), front_options)
    await runner.setup()
    from aiohttp import web

    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S))
    try:
        yield Node(backend, agent, session, f"http://127.0.0.1:{port}", runner)
    finally:
        await session.close()
        await agent.stop()
        await runner.cleanup()
        if own:
            await backend.close()


async def eventually(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Await a condition on the loop's own progress; fail when it does not come to hold."""
    async with asyncio.timeout(timeout_s):
        while not (found := condition()):  # noqa: ASYNC110 - the condition is on anything
            await asyncio.sleep(0.005)
    return found
