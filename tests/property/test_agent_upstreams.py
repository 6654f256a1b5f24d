"""Upstream resolution against the rule, read plainly."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from node.agent.upstreams import resolve
from proxy.authz import compile_policy
from raftstate.model.catalog import ServiceInstance, Upstream
from raftstate.model.identity import Identity
from raftstate.model.intention import ALLOW, Intention

SERVICES = ("echo", "db", "web")
CLIENT = Identity(service="client", instance="client-1")


@dataclass(frozen=True)
class Allowed:
    allowed: bool


class Allows:
    """A policy that is a set of service names."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def decide(self, source: Identity, service: str, instance: str) -> Allowed:
        return Allowed(service in self.names)


def instance(service: str) -> ServiceInstance:
    return ServiceInstance(node="n", id=f"{service}-1", service=service, port=8080)


@given(
    name=st.sampled_from(["backend", "echo", "db"]),
    named_service=st.sampled_from(["", "echo", "absent"]),
    port=st.sampled_from([0, 8080]),
    local_port=st.sampled_from([0, 8080]),
    known=st.frozensets(st.sampled_from(SERVICES)),
    on_port=st.frozensets(st.sampled_from(SERVICES)),
    reachable=st.frozensets(st.sampled_from(SERVICES)),
)
def test_rule(
    name: str,
    named_service: str,
    port: int,
    local_port: int,
    known: frozenset[str],
    on_port: frozenset[str],
    reachable: frozenset[str],
) -> None:
    upstream = Upstream(destination_name=named_service, upstream_name=name, destination_port=port)
    rows = [instance(service) for service in sorted(on_port)] if port else []
    found = resolve(upstream, CLIENT, local_port, known, rows, Allows(reachable))
    wanted = named_service or name
    permitted = on_port & reachable if port else frozenset()
    if wanted in known:
        assert (found.service, found.error, found.loopback_port) == (wanted, "", 0)
    elif named_service and not port:
        assert (found.service, found.error) == (named_service, "")
    elif port and port == local_port:
        assert (found.loopback_port, found.error) == (port, "")
    elif len(permitted) == 1:
        assert (found.service, found.error) == (next(iter(permitted)), "")
    else:
        assert found.service == ""
        assert found.error
        listed = permitted or on_port if port else frozenset()
        assert all(service in found.error for service in listed)


def test_an_intention_on_one_instance_is_enough() -> None:
    intention = Intention(
        source_name="client-1", source_service="client", destination_name="echo-1", destination_service="echo",
        action=ALLOW,
    )  # fmt: skip
    upstream = Upstream(upstream_name="backend", destination_port=8080)
    rows = [instance("echo"), instance("db")]
    assert resolve(upstream, CLIENT, 0, (), rows, compile_policy([intention], False)).service == "echo"
    stranger = Identity(service="other", instance="client-1")
    assert resolve(upstream, stranger, 0, (), rows, compile_policy([intention], False)).service == ""
