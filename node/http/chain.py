"""A routing plan in the form of Consul's ``/v1/discovery-chain``."""

from __future__ import annotations

from typing import Any

from node.http.answers.chain import Chain, ChainNode, ChainResolver, ChainRoute, ChainSplit, ChainTarget
from raftstate.model.durations import format_duration
from raftstate.model.plan import HeaderChange, Node, Plan, ResolverNode, Route, RouterNode, Split, Target
from raftstate.state.step import plain


def shown_chain(plan: Plan, datacenter: str) -> Chain:
    """Return a plan as ``Chain`` of Consul's answer; one that cannot be followed has ``Error`` besides."""
    shown: Chain = {
        "ServiceName": plan.service,
        "Namespace": "default",
        "Partition": "default",
        "Datacenter": datacenter,
        "Protocol": plan.protocol or "tcp",
        "Default": plan.default,
        "StartNode": plan.start,
        "Nodes": {name: _node(plan, name, node) for name, node in plan.nodes.items()},
        "Targets": {id: _target(plan, target, datacenter) for id, target in plan.targets.items()},
    }
    if plan.error:
        shown["Error"] = plan.error
    return shown


def _node(plan: Plan, name: str, node: Node) -> ChainNode:
    if isinstance(node, RouterNode):
        routes: list[ChainRoute] = [
            {"Definition": _route(route), "NextNode": route.next_node} for route in node.routes
        ]
        return {"Type": "router", "Name": name.partition(":")[2], "Routes": routes}
    if not isinstance(node, ResolverNode):
        splits = [_split(plan, split) for split in node.splits]
        return {"Type": "splitter", "Name": name.partition(":")[2], "Splits": splits}
    resolver: ChainResolver = {
        "Default": node == ResolverNode(node.target),
        "ConnectTimeout": format_duration(node.connect_timeout_s),
        "Target": node.target,
    }
    if node.request_timeout_s:
        resolver["RequestTimeout"] = format_duration(node.request_timeout_s)
    if node.failover:
        resolver["Failover"] = {"Targets": list(node.failover)}
    shown: ChainNode = {"Type": "resolver", "Name": node.target, "Resolver": resolver}
    if node.balancing.policy:
        shown["LoadBalancer"] = {"Policy": node.balancing.policy}
        if node.balancing.hash_policies:
            shown["LoadBalancer"]["HashPolicies"] = [plain(part) for part in node.balancing.hash_policies]
    return shown


def _route(route: Route) -> dict[str, Any]:
    destination: dict[str, Any] = {
        "PrefixRewrite": route.prefix_rewrite,
        "RequestTimeout": format_duration(route.request_timeout_s) if route.request_timeout_s else "",
        "IdleTimeout": format_duration(route.idle_timeout_s) if route.idle_timeout_s else "",
        "NumRetries": route.num_retries,
        "RetryOnConnectFailure": route.retry_on_connect_failure,
        "RetryOn": list(route.retry_on),
        "RetryOnStatusCodes": list(route.retry_on_status_codes),
        **_changes(route.request_headers, route.response_headers),
    }
    http = {name: value for name, value in plain(route.match).items() if value}
    return {"Match": {"HTTP": http}, "Destination": {name: value for name, value in destination.items() if value}}


def _split(plan: Plan, split: Split) -> ChainSplit:
    node = plan.nodes.get(split.next_node)
    target = plan.targets.get(node.target) if isinstance(node, ResolverNode) else None
    definition = {
        "Weight": split.weight,
        "Service": target.service if target is not None else "",
        "ServiceSubset": target.subset if target is not None else "",
        **_changes(split.request_headers, split.response_headers),
    }
    return {"Definition": definition, "Weight": split.weight, "NextNode": split.next_node}


def _changes(request: HeaderChange, response: HeaderChange) -> dict[str, Any]:
    pairs = (("RequestHeaders", request), ("ResponseHeaders", response))
    return {name: plain(change) for name, change in pairs if change}


def _target(plan: Plan, target: Target, datacenter: str) -> ChainTarget:
    subset = {"Filter": target.filter, "OnlyPassing": target.only_passing} if target.subset else {}
    timeouts = [
        node.connect_timeout_s
        for node in plan.nodes.values()
        if isinstance(node, ResolverNode) and node.target == target.id
    ]
    sni = f"{target.service}.default.{datacenter}.internal"
    return {
        "ID": target.id,
        "Service": target.service,
        "ServiceSubset": target.subset,
        "Namespace": "default",
        "Partition": "default",
        "Datacenter": datacenter,
        "MeshGateway": {},
        "Subset": {name: value for name, value in subset.items() if value},
        "ConnectTimeout": format_duration(timeouts[0]) if timeouts else "5s",
        "SNI": f"{target.subset}.{sni}" if target.subset else sni,
        "Name": f"{target.subset}.{sni}" if target.subset else sni,
    }
