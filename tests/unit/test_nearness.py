"""Who is near: same node, same zone, same region, the rest; over HTTP and in DNS."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from dnslib import QTYPE, DNSRecord

from node.dns_zone import Zone
from node.nearness import ELSEWHERE, SAME_NODE, SAME_REGION, SAME_ZONE, Place, distance, place_of
from raftstate.model.catalog import Check, InstanceHealth, ServiceInstance
from raftstate.model.catalog import Node as NodeRow
from tests.support.http_api import Node, serving


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (Place("a"), Place("a"), SAME_NODE),
        (Place("a", "z1"), Place("a", "z2"), SAME_NODE),
        (Place("a", "z"), Place("b", "z"), SAME_ZONE),
        (Place("a", "z", "r"), Place("b", "z", "r"), SAME_ZONE),
        (Place("a", "z", "r"), Place("b", "z"), SAME_ZONE),
        (Place("a", "z", "r1"), Place("b", "z", "r2"), ELSEWHERE),
        (Place("a", "z1", "r"), Place("b", "z2", "r"), SAME_REGION),
        (Place("a"), Place("b"), ELSEWHERE),
        (Place("a", "", ""), Place("b", "", ""), ELSEWHERE),
    ],
)
def test_distances(here: Place, there: Place, expected: int) -> None:
    assert distance(here, there) == expected == distance(there, here)


def test_a_services_own_locality_goes_before_its_nodes() -> None:
    meta = {"zone": "z1", "region": "r1"}
    assert place_of("n", meta) == Place("n", "z1", "r1")
    assert place_of("n", meta, {"Zone": "z2", "Region": "r2"}) == Place("n", "z2", "r2")
    assert place_of("n", meta, {"Region": "r2"}) == Place("n", "z1", "r2")


async def fill(node: Node) -> None:
    """Instances of ``web`` on five nodes: two in zone a, one in b of the same region, two elsewhere."""
    for name, meta, locality in (
        ("n-a2", {"zone": "a", "region": "r"}, {}),
        ("n-b", {"zone": "b", "region": "r"}, {}),
        ("n-c", {}, {}),
        ("n-d", {"zone": "c"}, {"Zone": "a", "Region": "r"}),
        ("n-e", {"zone": "e"}, {}),
    ):
        service = {"ID": f"web-{name}", "Service": "web", "Port": 80, "Locality": locality}
        body = {"Node": name, "Address": "10.0.0.1", "NodeMeta": meta, "Service": service}
        body["Check"] = {"CheckID": f"c-{name}", "Name": "c", "ServiceID": service["ID"], "Status": "passing"}
        await node.put("/v1/catalog/register", body)


def names(rows: list[Any]) -> list[str]:
    return [row["Node"]["Node"] if isinstance(row["Node"], dict) else row["Node"] for row in rows]


async def test_near_orders_by_what_is_known_of_a_place(tmp_path: Path) -> None:
    async with serving(tmp_path, node="n1", zone="a", meta={"region": "r"}) as node:
        await fill(node)
        from_agent = ["n-a2", "n-d", "n-b", "n-c", "n-e"]
        for path in ("/v1/health/service/web", "/v1/catalog/service/web"):
            assert names(await node.get(path)) == ["n-a2", "n-b", "n-c", "n-d", "n-e"], "without ?near by name"
            for more in ("&stale", "", "&cached", "&stale"):
                assert names(await node.get(f"{path}?near=_agent{more}")) == from_agent, (path, more)
            assert names(await node.get(f"{path}?near=n1")) == from_agent
            assert names(await node.get(f"{path}?near=n-b")) == ["n-b", "n-a2", "n-d", "n-c", "n-e"]
            assert names(await node.get(f"{path}?near=nobody")) == ["n-a2", "n-b", "n-c", "n-d", "n-e"]
        nodes = names(await node.get("/v1/catalog/nodes?near=n-a2"))
        assert nodes[:3] == ["n-a2", "n1", "n-b"]
        assert names(await node.get("/v1/health/checks/web?near=n-c"))[0] == "n-c"


async def test_an_answer_near_a_node_follows_that_node(tmp_path: Path) -> None:
    async with serving(tmp_path, node="n1") as node:
        await fill(node)
        path = "/v1/health/service/web?stale&near=n-c"
        for _ in range(3):
            assert names(await node.get(path))[:2] == ["n-c", "n-a2"]
        moved = {"Node": "n-x", "Address": "10.0.0.2", "NodeMeta": {"zone": "e"}}
        await node.put("/v1/catalog/register", moved)
        for _ in range(2):
            assert names(await node.get("/v1/health/service/web?stale&near=n-x"))[0] == "n-e"
        await node.put("/v1/catalog/register", moved | {"NodeMeta": {"zone": "b"}})
        assert names(await node.get("/v1/health/service/web?stale&near=n-x"))[0] == "n-b"


class _Directory:
    """Ten instances, two of them near."""

    def __init__(self) -> None:
        self.rows = [
            InstanceHealth(
                NodeRow(f"n{i}", f"10.0.0.{i}", meta={"zone": "a" if i == 4 else "b"}),
                ServiceInstance(f"n{i}", f"web-{i}", "web", port=80),
                (Check(f"n{i}", "c", status="passing"),),
            )
            for i in range(10)
        ]

    async def service_name(self, name: str) -> str | None:
        return name

    async def instances(self, service: str, *, connect: bool) -> list[InstanceHealth]:
        return list(self.rows)


@pytest.mark.parametrize("kind", ["A", "SRV"])
async def test_dns_names_the_near_first_and_the_others_in_any_order(kind: str) -> None:
    zone = Zone(_Directory(), "dc1", ["consul"], here=Place("n7", "a"), rng=random.Random(0))  # type: ignore[arg-type]
    orders = set()
    for _ in range(20):
        reply = await zone.answer(DNSRecord.question("web.service.consul", kind), udp=False)
        found = [str(one.rdata) for one in reply.rr if one.rtype == getattr(QTYPE, kind)]
        hosts = [text.rpartition(".")[2] if kind == "A" else text.split()[3].partition(".")[0][1:] for text in found]
        assert hosts[:2] == ["7", "4"]
        assert len(hosts) == 10
        orders.add(tuple(hosts[2:]))
    assert len(orders) > 10, "load is spread over those that are equally near"
