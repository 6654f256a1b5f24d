"""What an agent asks in whose name: leaves of any datacenter, on a full disk, and sidecars that claim too much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from raftstate.model.identity import SpiffeId
from tests.support.http_api import TRUST_DOMAIN, SigningBackend, TestCa, serving
from tests.unit.test_http_walkthrough import SERVER_SIDECAR, register


class NotingCa(TestCa):
    """Keeps the names that signing requests carry."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def sign(self, csr_pem: str, service: str, instance: str) -> str:
        names = x509.load_pem_x509_csr(csr_pem.encode()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        self.asked += names.value.get_values_for_type(x509.UniformResourceIdentifier)
        return super().sign(csr_pem, service, instance)


async def test_a_leaf_is_asked_for_in_the_agents_own_datacenter(tmp_path: Path) -> None:
    """The authority signs no other: with the default's name no sidecar of another datacenter ever got a leaf."""
    ca = NotingCa()
    backend = SigningBackend(ca)
    await backend.use_root()
    async with serving(tmp_path, backend=backend, datacenter="lab") as node:
        await node.get("/v1/agent/connect/ca/leaf/web")
    assert ca.asked == [SpiffeId(trust_domain=TRUST_DOMAIN, service="web", datacenter="lab").uri()]
    await backend.close()


async def test_a_leaf_that_cannot_be_saved_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("node.agent.leaf.write_private", full)
    backend = SigningBackend(TestCa(lifetime_s=1.5))
    await backend.use_root()
    async with serving(tmp_path, backend=backend) as node:
        leaf = await node.get("/v1/agent/connect/ca/leaf/web")
        renewed = await node.get(f"/v1/agent/connect/ca/leaf/web?index={leaf['ModifyIndex']}&wait=60s")
        assert renewed["ModifyIndex"] > leaf["ModifyIndex"], "renewal goes on"
    await backend.close()


async def refused(node: Any, sidecar_id: str, body: dict[str, Any]) -> str:
    url = f"{node.url}/v1/agent/connect/proxy/{sidecar_id}/stream"
    async with node.http.post(url, json=body) as answer:
        assert answer.status == 400, answer.status
        return str(await answer.text())


async def test_a_sidecar_takes_no_other_services_place(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await register(node)
        assert "echo-client-1 is a service of its own" in await refused(node, "echo-client-1", SERVER_SIDECAR)
        assert (await node.get("/v1/agent/service/echo-client-1"))["Service"] == "echo-client"


async def test_a_sidecar_names_the_service_that_its_instance_is_of(tmp_path: Path) -> None:
    lying = copy.deepcopy(SERVER_SIDECAR)
    lying["Proxy"]["DestinationServiceName"] = "bank"  # type: ignore[index]
    async with serving(tmp_path) as node:
        await register(node)
        text = await refused(node, "echo-server-1-sidecar-proxy", lying)
        assert "'echo-server-1' is an instance of 'echo-server', not of 'bank'" in text
