"""Laws of compiled plans, over any entries of four services: one clear refusal, or a plan that can be followed."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.balancer import Balancer
from proxy.balancing.routing import Routing
from raftstate.chain import BadEntry, check_entry, compile_plan
from raftstate.chain.affected import affected_by
from raftstate.chain.compiler import NODES_MAX
from raftstate.model.plan import Plan, ResolverNode, RouterNode, SplitterNode
from raftstate.model.sidecar import Endpoint

SERVICES = ("a", "b", "c", "d")
services = st.sampled_from(SERVICES)
subsets = st.sampled_from(("", "", "v1", "v2"))
Entries = dict[tuple[str, str], dict[str, Any]]


def place(draw: Any) -> dict[str, Any]:
    return {"Service": draw(st.sampled_from(("", *SERVICES))), "ServiceSubset": draw(subsets)}


@st.composite
def resolver(draw: Any) -> dict[str, Any]:
    if draw(st.booleans()):
        return {"Redirect": {"Service": draw(services), "ServiceSubset": draw(subsets)}}
    named = draw(st.sampled_from(((), ("v1",), ("v1", "v2"))))
    entry: dict[str, Any] = {"Subsets": {name: {"Filter": f"Service.Meta.version == {name}"} for name in named}}
    if named and draw(st.booleans()):
        entry["DefaultSubset"] = draw(st.sampled_from(named))
    if draw(st.booleans()):
        targets = draw(st.lists(st.builds(dict, Service=services, ServiceSubset=subsets), min_size=1, max_size=3))
        entry["Failover"] = {draw(st.sampled_from(("*", *named))): {"Targets": targets}}
    return entry


@st.composite
def splitter(draw: Any) -> dict[str, Any]:
    cuts = sorted(draw(st.lists(st.integers(0, 10_000), min_size=0, max_size=3)))
    weights = [(after - before) / 100 for before, after in zip([0, *cuts], [*cuts, 10_000], strict=True)]
    return {"Splits": [{"Weight": weight, **place(draw)} for weight in weights]}


@st.composite
def router(draw: Any) -> dict[str, Any]:
    paths = draw(st.lists(st.sampled_from(("/x", "/y", "/x/z")), max_size=3))
    return {"Routes": [{"Match": {"HTTP": {"PathPrefix": path}}, "Destination": place(draw)} for path in paths]}


@st.composite
def entries(draw: Any) -> Entries:
    made: Entries = {("proxy-defaults", "global"): {"Config": {"protocol": "http"}}}
    for kind, how in (
        ("service-resolver", resolver()),
        ("service-splitter", splitter()),
        ("service-router", router()),
    ):
        for service in draw(st.sets(services)):
            try:
                made[kind, service] = check_entry(kind, service, draw(how))
            except BadEntry:
                continue  # such as two splits that lead to the same place
    if draw(st.booleans()):
        made["service-defaults", draw(services)] = {"Protocol": draw(st.sampled_from(("tcp", "grpc", "http")))}
    return made


def compiled(service: str, given_: Entries) -> Plan | BadEntry:
    try:
        return compile_plan(service, lambda kind, name: given_.get((kind, name)), "dc1")
    except BadEntry as error:
        return error


def followed(plan: Plan, node: str, above: tuple[str, ...] = ()) -> None:
    """Walk every way through the plan."""
    assert node not in above, "a circle"
    found = plan.nodes[node]
    if isinstance(found, RouterNode):
        assert not above, "a router is where calls begin"
        assert found.routes[-1].match.path_prefix == "/"
        for route in found.routes:
            followed(plan, route.next_node, (*above, node))
    elif isinstance(found, SplitterNode):
        assert sum(split.weight for split in found.splits) == pytest.approx(100)
        for split in found.splits:
            assert split.weight > 0
            assert isinstance(plan.nodes[split.next_node], ResolverNode), "splitters are flattened"
            followed(plan, split.next_node, (*above, node))
    else:
        targets = (found.target, *found.failover)
        assert len(set(targets)) == len(targets), "no target takes over from itself, or twice"
        for target in targets:
            assert plan.targets[target].id == target


@settings(max_examples=200, deadline=None)
@given(entries(), services)
def test_entries_make_a_plan_that_can_be_followed_or_one_refusal(given_: Entries, service: str) -> None:
    plan = compiled(service, given_)
    if isinstance(plan, BadEntry):
        assert plan.field
        assert str(plan).startswith(("service-", "proxy-defaults"))
        return
    followed(plan, plan.start)
    assert len(plan.nodes) <= NODES_MAX
    assert compiled(service, dict(reversed(given_.items()))) == plan, "the order of entries makes no difference"
    assert msgspec.convert(msgspec.to_builtins(plan), Plan) == plan
    balancers = {id: Balancer(random.Random(1).random) for id in plan.targets}
    for id, balancer in balancers.items():
        balancer.update([Endpoint("n", "h", 1, plan.targets[id].service, id)])
    instance = Routing(plan, balancers, random.Random(2).random).connection().destination.pick(0.0)
    assert instance is not None


@settings(max_examples=200, deadline=None)
@given(entries(), services, st.sampled_from(("service-resolver", "service-splitter", "service-router")), st.data())
def test_only_the_plans_that_are_said_to_be_affected_change(
    given_: Entries, name: str, kind: str, data: st.DataObject
) -> None:
    strategy = {"service-resolver": resolver(), "service-splitter": splitter(), "service-router": router()}[kind]
    try:
        entry = None if data.draw(st.booleans()) else check_entry(kind, name, data.draw(strategy))
    except BadEntry:
        return
    after = {key: value for key, value in given_.items() if key != (kind, name)}
    if entry is not None:
        after[kind, name] = entry
    affected = affected_by(kind, name, entry, given_)
    for service in SERVICES:
        before, then = compiled(service, given_), compiled(service, after)
        same = before == then if isinstance(before, Plan) else str(before) == str(then)
        assert same or service in affected
