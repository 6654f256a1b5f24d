from __future__ import annotations

import pytest

from raftstate.model.catalog import Check, Node, ServiceInstance, ServiceProxy, Weights
from raftstate.model.wire import to_json
from raftstate.state import commands as c
from tests.unit.support_state import Log


def test_health_shows_the_node_its_check_and_the_instances_own_in_order_of_id() -> None:
    log = Log()
    log.node("n2")
    log.node("n1")
    log.service("n1", "web-2", "web", port=81)
    log.service("n2", "web-1", "web", port=80)
    log.do(c.RegisterCheck(Check("n2", "service:web-1", status="warning", service_id="web-1")))
    log.do(c.RegisterCheck(Check("n2", "service:other", status="critical")))
    rows = log.ask("health.service", service="web").value
    assert [row.service.id for row in rows] == ["web-1", "web-2"]
    assert [check.check_id for check in rows[0].checks] == ["serfHealth", "service:other", "service:web-1"]
    assert rows[0].checks[2].service_name == "web"
    assert [row.service.id for row in log.ask("health.service", service="web", passing=True).value] == ["web-2"]


def test_connect_gives_sidecars_of_the_service_and_native_instances() -> None:
    log = Log()
    log.node("n1")
    log.service("n1", "web-1", "web", port=80)
    log.service("n1", "web-2", "web", port=80, connect_native=True)
    log.sidecar("n1", "web-1-sidecar-proxy", "web")
    log.sidecar("n1", "db-1-sidecar-proxy", "db")
    ids = [row.service.id for row in log.ask("health.connect", service="web").value]
    assert ids == ["web-1-sidecar-proxy", "web-2"]
    flat = log.ask("catalog.connect", service="web").value
    assert [row.service_id for row in flat] == ids
    assert b'"ServiceProxy":{"DestinationServiceName":"web"' in to_json(flat)


def test_registering_the_same_again_changes_no_index_and_touches_nothing() -> None:
    log = Log()
    register = c.CatalogRegister(
        Node("n1", "10.0.0.1"), ServiceInstance("n1", "web-1", "web"), (Check("n1", "serfHealth", status="passing"),)
    )
    log.do(register)
    before = log.ask("health.service", service="web")
    assert not log.apply(register).touched
    assert log.ask("health.service", service="web") == before


def test_a_change_of_another_service_leaves_the_index() -> None:
    log = Log()
    log.node("n1")
    log.node("n2")
    log.service("n1", "web-1", "web")
    before = log.ask("health.service", service="web").index
    log.service("n2", "db-1", "db")
    log.do(c.RegisterCheck(Check("n2", "serfHealth", status="critical")))
    assert log.ask("health.service", service="web").index == before
    log.do(c.RegisterCheck(Check("n1", "serfHealth", status="critical")))
    assert log.ask("health.service", service="web").index == log.index


def test_deregistering_a_node_takes_all_that_is_on_it() -> None:
    log = Log()
    log.node("n1")
    log.service("n1", "web-1", "web", port=80, tags=("v1",))
    log.sidecar("n1", "p", "web")
    log.do(c.RegisterCheck(Check("n1", "service:web-1", status="passing", service_id="web-1")))
    assert log.do(c.DeregisterNode("n1")) is True
    assert log.do(c.DeregisterNode("n1")) is False
    store = log.machine.store
    assert [len(table.rows) for table in (store.nodes, store.services, store.checks)] == [0, 0, 0]
    for query, params in (("service", {"service": "web"}), ("connect", {"service": "web"})):
        answer = log.ask(f"health.{query}", **params)
        assert (answer.value, answer.index) == ([], log.index - 1)
    for index in (vars(store.services) | vars(store.checks)).values():
        assert not isinstance(index, dict) or not index


def test_a_service_needs_its_node_and_a_check_its_service() -> None:
    log = Log()
    assert log.refused(c.RegisterService(ServiceInstance("n1", "web-1", "web")))[0] == "unknown-node"
    log.node("n1")
    code, text = log.refused(c.RegisterCheck(Check("n1", "c", status="passing", service_id="nope")))
    assert code == "unknown-service"
    assert "'nope'" in text


def test_a_refused_part_undoes_the_whole_registration() -> None:
    log = Log()
    bad = Check("n1", "c", status="excellent")
    code, _ = log.refused(c.CatalogRegister(Node("n1", "10.0.0.1"), ServiceInstance("n1", "web-1", "web"), (bad,)))
    assert code == "invalid"
    assert log.ask("catalog.nodes").value == []
    assert log.ask("catalog.services").value == {}


def test_skip_node_update_leaves_a_known_node_and_makes_an_unknown_one() -> None:
    log = Log()
    log.do(c.CatalogRegister(Node("n1", "10.0.0.1"), skip_node_update=True))
    log.do(c.CatalogRegister(Node("n1", "10.9.9.9"), ServiceInstance("", "web-1", "web"), (), True))
    row = log.ask("catalog.node", node="n1").value
    assert row.node.address == "10.0.0.1"
    assert list(row.services) == ["web-1"]


def test_a_node_id_belongs_to_one_name_and_a_name_to_one_living_id() -> None:
    log = Log()
    log.node("n1", id="id-1")
    code, text = log.refused(c.RegisterNode(Node("n2", "10.0.0.2", "id-1")))
    assert code == "conflict"
    assert "in use by node 'n1'" in text
    code, text = log.refused(c.RegisterNode(Node("n1", "10.0.0.9", "id-9")))
    assert code == "conflict"
    assert "is reserved by node id-1" in text
    log.do(c.RegisterNode(Node("n1", "10.0.0.5")))
    assert log.machine.store.nodes.rows["n1"].id == "id-1"
    log.do(c.RegisterCheck(Check("n1", "serfHealth", status="critical")))
    log.do(c.RegisterNode(Node("n1", "10.0.0.9", "id-9")))
    log.do(c.RegisterNode(Node("n2", "10.0.0.2", "id-1")))


def test_checks_follow_their_service_when_it_is_renamed() -> None:
    log = Log()
    log.node("n1")
    log.service("n1", "x", "web")
    log.do(c.RegisterCheck(Check("n1", "c", status="passing", service_id="x")))
    log.service("n1", "x", "db", tags=("new",))
    assert log.ask("health.checks", service="web").value == []
    (check,) = log.ask("health.checks", service="db").value
    assert (check.service_name, check.service_tags) == ("db", ("new",))


def test_services_by_port_leaves_sidecars_out() -> None:
    log = Log()
    log.node("n1")
    log.service("n1", "web-1", "web", port=20000)
    log.sidecar("n1", "p", "web")
    assert [row.id for row in log.ask("catalog.services_by_port", port=20000).value] == ["web-1"]


def test_services_lists_tags_and_narrows_by_node_metadata() -> None:
    log = Log()
    log.node("n1", meta={"rack": "r1"})
    log.node("n2")
    log.service("n1", "web-1", "web", tags=("a",))
    log.service("n2", "web-2", "web", tags=("b",))
    log.service("n2", "db-1", "db")
    assert log.ask("catalog.services").value == {"db": [], "web": ["a", "b"]}
    assert log.ask("catalog.services", node_meta={"rack": "r1"}).value == {"web": ["a"]}


@pytest.mark.parametrize(
    "service",
    [
        ServiceInstance("n1", "x", ""),
        ServiceInstance("n1", "x", "*"),
        ServiceInstance("n1", "x", "web:web-1"),
        ServiceInstance("n1", "x", "ns/web"),
        ServiceInstance("n1", "x", "we\nb"),
        ServiceInstance("n1", "x" * 300, "web"),
        ServiceInstance("n1", "x", "web", port=65536),
        ServiceInstance("n1", "x", "web", kind="wormhole"),
        ServiceInstance("n1", "x", "web", kind="connect-proxy"),
        ServiceInstance("n1", "x", "web", kind="connect-proxy", proxy=ServiceProxy()),
        ServiceInstance("n1", "x", "web", weights=Weights(0, 1)),
        ServiceInstance("n1", "x", "web", meta={"k": "v" * 600}),
    ],
)
def test_invalid_services_are_refused(service: ServiceInstance) -> None:
    log = Log()
    log.node("n1")
    assert log.refused(c.RegisterService(service))[0] == "invalid"
