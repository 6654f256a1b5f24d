"""An upstream's compiled plan as Envoy's clusters and routes: router, splitter, resolver, failover. Pure.

Each resolver becomes a cluster whose instances are in priorities: the target's, then those that take over. Envoy
moves on to the next priority only when no instance of the one before is healthy, as a Lictor sidecar does.
"""

from __future__ import annotations

from typing import Any

from node.xds.settings import seconds
from node.xds.types import Rule
from raftstate.model.plan import (
    HeaderChange,
    HeaderCondition,
    Match,
    Plan,
    QueryCondition,
    ResolverNode,
    Route,
    RouterNode,
    SplitterNode,
)

DEFAULT_RETRY: Rule = {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 2}
"""Only what the other side cannot have begun to answer is tried again."""


def resolvers(plan: Plan) -> dict[str, ResolverNode]:
    """Return the plan's resolvers by node name; none when no call can be made."""
    if plan.error:
        return {}
    return {name: node for name, node in sorted(plan.nodes.items()) if isinstance(node, ResolverNode)}


def node_cluster(upstream: str, node: str) -> str:
    """Return the name of a resolver's cluster; ``upstream`` is the upstream's own."""
    return f"{upstream}|{node.removeprefix('resolver:')}"


def services(plan: Plan, node: ResolverNode) -> list[str]:
    """Return the services whose instances a resolver may lead to, the first choice first."""
    ids = [node.target, *node.failover]
    return list(dict.fromkeys(plan.targets[one].service for one in ids if one in plan.targets))


def tcp_way(plan: Plan, upstream: str) -> Rule:
    """Return the cluster, or the weighted clusters, of a TCP proxy."""
    node = plan.nodes.get(plan.start)
    if plan.error or node is None or isinstance(node, RouterNode):
        return {"cluster": upstream}  # there is none of that name, so the connection is closed
    if isinstance(node, ResolverNode):
        rule: Rule = {"cluster": node_cluster(upstream, plan.start)}
        if any(part.source_ip for part in node.balancing.hash_policies):
            rule["hash_policy"] = [{"source_ip": {}}]
        return rule
    shares = [{"name": node_cluster(upstream, one.next_node), "weight": _weight(one.weight)} for one in node.splits]
    return {"weighted_clusters": {"clusters": [share for share in shares if share["weight"]]}}


def http_routes(plan: Plan, upstream: str) -> list[Rule]:
    """Return the routes of an HTTP upstream, the first that matches decides."""
    node = plan.nodes.get(plan.start)
    if plan.error or node is None:
        text = f"no way to {plan.service}: {plan.error or 'its plan is empty'}"
        return [{"match": {"prefix": "/"}, "direct_response": {"status": 503, "body": {"inline_string": text}}}]
    if isinstance(node, RouterNode):
        return [_route(plan, upstream, one) for one in node.routes]
    return [_route(plan, upstream, Route(match=Match(), next_node=plan.start))]


def _route(plan: Plan, upstream: str, route: Route) -> Rule:
    action: Rule = {"timeout": seconds(route.request_timeout_s), "retry_policy": _retry(route)}
    if route.idle_timeout_s:
        action["idle_timeout"] = seconds(route.idle_timeout_s)
    if route.prefix_rewrite:
        action |= _rewrite(route)
    action |= _way(plan, upstream, route)
    return {"match": _match(route.match), "route": action, **_headers(route.request_headers, route.response_headers)}


def _way(plan: Plan, upstream: str, route: Route) -> Rule:
    node = plan.nodes.get(route.next_node)
    if isinstance(node, SplitterNode):
        shares = [
            {
                "name": node_cluster(upstream, one.next_node),
                "weight": _weight(one.weight),
                **_headers(one.request_headers, one.response_headers),
            }
            for one in node.splits
        ]
        first = next((plan.nodes[one.next_node] for one in node.splits if one.next_node in plan.nodes), None)
        return {"weighted_clusters": {"clusters": [s for s in shares if s["weight"]]}, **_of_resolver(first, route)}
    return {"cluster": node_cluster(upstream, route.next_node), **_of_resolver(node, route)}


def _of_resolver(node: object, route: Route) -> Rule:
    if not isinstance(node, ResolverNode):
        return {}
    rule: Rule = {}
    if not route.request_timeout_s and node.request_timeout_s:
        rule["timeout"] = seconds(node.request_timeout_s)
    policies = []
    for part in node.balancing.hash_policies:
        if part.source_ip:
            one: Rule = {"connection_properties": {"source_ip": True}}
        elif part.field == "header":
            one = {"header": {"header_name": part.field_value}}
        elif part.field == "cookie":
            one = {"cookie": {"name": part.field_value}}
            if part.cookie_session or part.cookie_ttl_s:
                one["cookie"] |= {"ttl": seconds(part.cookie_ttl_s), "path": part.cookie_path}
        else:
            one = {"query_parameter": {"name": part.field_value}}
        policies.append({**one, "terminal": part.terminal})
    if policies:
        rule["hash_policy"] = policies
    return rule


def _match(match: Match) -> Rule:
    rule: Rule = {"case_sensitive": False} if match.case_insensitive else {}
    if match.path_exact:
        rule["path"] = match.path_exact
    elif match.path_regex:
        flag = "(?i)" if match.case_insensitive else ""
        rule = {"safe_regex": {"regex": flag + match.path_regex}}
    else:
        rule["prefix"] = match.path_prefix or "/"
    headers = [_header(one) for one in match.header]
    if match.methods:
        regex = "|".join(sorted({method.upper() for method in match.methods}))
        headers.append({"name": ":method", "string_match": {"safe_regex": {"regex": regex}}})
    if headers:
        rule["headers"] = headers
    if match.query_param:
        rule["query_parameters"] = [_query(one) for one in match.query_param]
    return rule


def _header(one: HeaderCondition) -> Rule:
    rule: Rule = {"name": one.name}
    if one.invert:
        rule |= {"invert_match": True, "treat_missing_header_as_empty": not one.present}
    if one.present:
        return {**rule, "present_match": True}
    kind = next(
        kind for kind in ("exact", "prefix", "suffix", "contains", "regex") if getattr(one, kind) or kind == "regex"
    )
    value = getattr(one, kind)
    if kind == "regex":
        return {**rule, "string_match": {"safe_regex": {"regex": ("(?i)" if one.ignore_case else "") + value}}}
    return {**rule, "string_match": {kind: value, "ignore_case": one.ignore_case}}


def _query(one: QueryCondition) -> Rule:
    if one.regex:
        return {"name": one.name, "string_match": {"safe_regex": {"regex": one.regex}}}
    if one.exact:
        return {"name": one.name, "string_match": {"exact": one.exact}}
    return {"name": one.name, "present_match": True}


def _rewrite(route: Route) -> Rule:
    if route.match.path_regex:
        pattern = ("(?i)" if route.match.case_insensitive else "") + route.match.path_regex
        substitution = route.prefix_rewrite.replace("\\", "\\\\")
        return {"regex_rewrite": {"pattern": {"regex": pattern}, "substitution": substitution}}
    return {"prefix_rewrite": route.prefix_rewrite}


def _retry(route: Route) -> Rule:
    reasons = list(route.retry_on)
    if route.retry_on_connect_failure and "connect-failure" not in reasons:
        reasons.append("connect-failure")
    if route.retry_on_status_codes:
        reasons.append("retriable-status-codes")
    if not reasons:
        return {**DEFAULT_RETRY, "num_retries": route.num_retries or DEFAULT_RETRY["num_retries"]}
    rule: Rule = {"retry_on": ",".join(reasons), "num_retries": route.num_retries or 1}
    if route.retry_on_status_codes:
        rule["retriable_status_codes"] = list(route.retry_on_status_codes)
    return rule


def _headers(request: HeaderChange, response: HeaderChange) -> Rule:
    rule: Rule = {}
    for side, change in (("request", request), ("response", response)):
        rows: list[dict[str, Any]] = [
            {"header": {"key": key, "value": value.replace("%", "%%")}, "append_action": action}
            for action, pairs in (("OVERWRITE_IF_EXISTS_OR_ADD", change.set), ("APPEND_IF_EXISTS_OR_ADD", change.add))
            for key, value in pairs.items()
        ]
        if rows:
            rule[f"{side}_headers_to_add"] = rows
        if change.remove:
            rule[f"{side}_headers_to_remove"] = list(change.remove)
    return rule


def _weight(percent: float) -> int:
    return round(percent * 100)
