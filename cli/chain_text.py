"""``lictor config chain``: the way that calls to a service take, as lines to read. Pure.

web (http)
  path /admin…, method GET       -> /… at subset v2 of web; 3 retries; timeout 2s
  all else                       -> splitter of web
splitter of web
  90 %                           -> subset v1 of web
  10 %                           -> subset v2 of web
subset v1 of web                 Service.Meta.version == v1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 40


def lines_of(chain: Mapping[str, Any]) -> list[str]:
    """Return the lines for a ``Chain`` of the API's ``/v1/discovery-chain``."""
    told = _Told(chain)
    lines = [f"{chain['ServiceName']} ({chain['Protocol']})"]
    if chain.get("Error"):
        return [*lines, f"  no call can be made: {chain['Error']}"]
    start = chain["Nodes"][chain["StartNode"]]
    lines += told.routes(start) if start["Type"] == "router" else [_row("all", told.place(chain["StartNode"]))]
    for name, node in sorted(chain["Nodes"].items()):
        if node["Type"] == "splitter":
            lines += [told.place(name), *told.splits(node)]
    for name, node in sorted(chain["Nodes"].items()):
        if node["Type"] == "resolver":
            lines.append(f"{told.place(name):<{_WIDTH}}{'; '.join(told.resolver(node))}".rstrip())
    return lines


def _row(what: str, where: str) -> str:
    return f"  {what:<{_WIDTH - 2}}-> {where}" if len(what) < _WIDTH - 2 else f"  {what}\n{'':{_WIDTH}}-> {where}"


class _Told:
    def __init__(self, chain: Mapping[str, Any]) -> None:
        self._nodes: Mapping[str, Any] = chain["Nodes"]
        self._targets: Mapping[str, Any] = chain["Targets"]

    def place(self, name: str) -> str:
        """A node by the name that people have for it."""
        node = self._nodes[name]
        if node["Type"] == "resolver":
            return self.target(node["Resolver"]["Target"])
        return f"{node['Type']} of {node['Name'].partition('.')[0]}"

    def target(self, id: str) -> str:
        target = self._targets[id]
        subset = target.get("ServiceSubset")
        return f"subset {subset} of {target['Service']}" if subset else str(target["Service"])

    def routes(self, router: Mapping[str, Any]) -> Iterator[str]:
        *routes, last = router["Routes"]
        for route in routes:
            definition = route["Definition"]
            does = "; ".join((self.place(route["NextNode"]), *_does(definition.get("Destination") or {})))
            yield _row(", ".join(_matches((definition.get("Match") or {}).get("HTTP") or {})) or "all", does)
        yield _row("all else" if routes else "all", self.place(last["NextNode"]))

    def splits(self, splitter: Mapping[str, Any]) -> Iterator[str]:
        for split in splitter["Splits"]:
            does = "; ".join((self.place(split["NextNode"]), *_changes(split["Definition"])))
            yield _row(f"{split['Weight']:g} %", does)

    def resolver(self, node: Mapping[str, Any]) -> Iterator[str]:
        resolver = node["Resolver"]
        subset = self._targets[resolver["Target"]].get("Subset") or {}
        if subset.get("Filter"):
            yield subset["Filter"]
        if subset.get("OnlyPassing"):
            yield "passing only"
        yield f"connect within {resolver['ConnectTimeout']}"
        if resolver.get("RequestTimeout"):
            yield f"answer within {resolver['RequestTimeout']}"
        balancer = node.get("LoadBalancer") or {}
        if balancer.get("Policy"):
            by = [_hashed(part) for part in balancer.get("HashPolicies") or ()]
            yield balancer["Policy"] + (f" by {', '.join(by)}" if by else "")
        others = [self.target(id) for id in (resolver.get("Failover") or {}).get("Targets") or ()]
        if others:
            yield f"failing over to {', then '.join(others)}"


def _matches(http: Mapping[str, Any]) -> Iterator[str]:
    fold = " in any case" if http.get("CaseInsensitive") else ""
    for field, form in (("PathExact", "path {}"), ("PathPrefix", "path {}…"), ("PathRegex", "path ~ {}")):
        if http.get(field):
            yield form.format(http[field]) + fold
    if http.get("Methods"):
        yield f"method {' or '.join(http['Methods'])}"
    for part in http.get("Header") or ():
        yield f"header {part['Name']} {_condition(part)}"
    for part in http.get("QueryParam") or ():
        yield f"query {part['Name']} {_condition(part)}"


def _condition(part: Mapping[str, Any]) -> str:
    forms = {"Exact": "= {}", "Prefix": "= {}…", "Suffix": "= …{}", "Contains": "= …{}…", "Regex": "~ {}"}
    text = next((form.format(part[field]) for field, form in forms.items() if part.get(field)), "is there")
    return ("not " if part.get("Invert") else "") + text + (" in any case" if part.get("IgnoreCase") else "")


def _does(destination: Mapping[str, Any]) -> Iterator[str]:
    if destination.get("PrefixRewrite"):
        yield f"as {destination['PrefixRewrite']}"
    if destination.get("RequestTimeout"):
        yield f"answer within {destination['RequestTimeout']}"
    if destination.get("IdleTimeout"):
        yield f"idle for {destination['IdleTimeout']} at most"
    if destination.get("NumRetries"):
        causes = [*destination.get("RetryOn", ()), *map(str, destination.get("RetryOnStatusCodes", ()))]
        causes += ["connect-failure"] if destination.get("RetryOnConnectFailure") else []
        yield f"{destination['NumRetries']} retries" + (f" on {', '.join(causes)}" if causes else "")
    yield from _changes(destination)


def _changes(part: Mapping[str, Any]) -> Iterator[str]:
    for field, whose in (("RequestHeaders", "request"), ("ResponseHeaders", "response")):
        change = part.get(field) or {}
        names = [f"+{name}" for name in change.get("Add") or {}] + [f"={name}" for name in change.get("Set") or {}]
        names += [f"-{name}" for name in change.get("Remove") or ()]
        if names:
            yield f"{whose} headers {' '.join(names)}"


def _hashed(part: Mapping[str, Any]) -> str:
    return "source address" if part.get("SourceIP") else f"{part.get('Field')} {part.get('FieldValue')}"
