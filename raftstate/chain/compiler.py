"""From configuration entries to the plan of one service. Pure: the entries are looked up by a function handed in.

A route or a split names a service and perhaps a subset. With a subset it leads to that service's resolver; without,
to its splitter if there is one. A service's own splitter leads to its own resolver. A resolver may redirect to
another service, and has a default subset.

Two things differ from Consul: a splitter may stand before a ``tcp`` service (a connection is what is split), and one
datacenter is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raftstate.chain import entries as forms
from raftstate.chain.entries import BadEntry
from raftstate.model import plan as model
from raftstate.model.durations import parse_duration_s
from raftstate.model.plan import Balancing, HashPolicy, HeaderChange, Match, Plan, Route, Split, Target, target_id

Lookup = Callable[[str, str], Mapping[str, Any] | None]
"""(kind, name) -> the entry, or None."""
SPLITS_MAX = 1024
"""Of one splitter with those that it leads to."""
NODES_MAX = 4096


def compile_plan(service: str, lookup: Lookup, datacenter: str) -> Plan:
    """Return the plan of calls to ``service``. Raises :class:`BadEntry`, which names entry and field at fault."""
    return _Compiler(service, lookup, datacenter).plan()


class _Compiler:
    def __init__(self, service: str, lookup: Lookup, datacenter: str) -> None:
        self._service, self._lookup, self._datacenter = service, lookup, datacenter
        self._forms: dict[tuple[str, str], Any] = {}
        self._nodes: dict[str, model.Node] = {}
        self._targets: dict[str, Target] = {}
        self._protocol = self._protocol_of(service)

    def plan(self) -> Plan:
        service = self._service
        router: forms.RouterEntry | None = self._entry(forms.ROUTER, service)
        start = self._route(router) if router is not None else self._entrance(service, "", forms.ROUTER, service, "")
        node = self._nodes[start]
        default = (
            isinstance(node, model.ResolverNode)
            and node == model.ResolverNode(node.target)
            and self._targets[node.target] == Target(node.target, service)
        )
        return Plan(service, self._protocol, start, self._nodes, self._targets, default)

    # Entries

    def _entry(self, kind: str, name: str) -> Any:
        key = (kind, name)
        if key not in self._forms:
            entry = self._lookup(kind, name)
            self._forms[key] = None if entry is None else forms.read_entry(kind, name, entry)
        return self._forms[key]

    def _protocol_of(self, service: str) -> str:
        own: forms.DefaultsEntry | None = self._entry(forms.DEFAULTS, service)
        if own is not None and own.protocol:
            return own.protocol
        everyone: forms.GlobalEntry | None = self._entry(forms.GLOBAL, "global")
        said = ((everyone.config if everyone is not None else None) or {}).get("protocol", "")
        return said if isinstance(said, str) else ""

    def _add(self, name: str, node: model.Node, kind: str, of: str) -> str:
        if len(self._nodes) >= NODES_MAX:
            raise BadEntry(kind, of, "", f"leads to more than {NODES_MAX} places")
        self._nodes[name] = node
        return name

    # Router

    def _route(self, entry: forms.RouterEntry) -> str:
        service = self._service
        if self._protocol not in model.HTTP_PROTOCOLS:
            raise BadEntry(
                forms.ROUTER,
                service,
                "Routes",
                f"requests can only be routed with the protocol {', '.join(model.HTTP_PROTOCOLS)}, but that of "
                f"{service!r} is {self._protocol or 'tcp'!r}: write its service-defaults with Protocol first",
            )
        routes = [self._one_route(part, f"Routes[{number}]") for number, part in enumerate(entry.routes)]
        last = self._entrance(service, "", forms.ROUTER, service, "Routes")
        routes.append(Route(Match(path_prefix="/"), last))
        return self._add(f"router:{service}.default.default", model.RouterNode(tuple(routes)), forms.ROUTER, service)

    def _one_route(self, part: forms.RoutePart, at: str) -> Route:
        http = part.match.http if part.match is not None and part.match.http is not None else forms.HTTPPart()
        to = part.destination or forms.Destination()
        service = to.service or self._service
        return Route(
            match=Match(
                path_exact=http.path_exact,
                path_prefix=http.path_prefix,
                path_regex=http.path_regex,
                case_insensitive=http.case_insensitive,
                header=http.header,
                query_param=http.query_param,
                methods=tuple(method.upper() for method in http.methods),
            ),
            next_node=self._entrance(service, to.service_subset, forms.ROUTER, self._service, f"{at}.Destination"),
            prefix_rewrite=to.prefix_rewrite,
            request_timeout_s=parse_duration_s(to.request_timeout),
            idle_timeout_s=parse_duration_s(to.idle_timeout),
            num_retries=to.num_retries
            or (1 if to.retry_on_connect_failure or to.retry_on or to.retry_on_status_codes else 0),
            retry_on_connect_failure=to.retry_on_connect_failure,
            retry_on=to.retry_on,
            retry_on_status_codes=to.retry_on_status_codes,
            request_headers=to.request_headers or HeaderChange(),
            response_headers=to.response_headers or HeaderChange(),
        )

    # Splitter

    def _entrance(self, service: str, subset: str, kind: str, name: str, at: str) -> str:
        """Return the node to which a reference leads; what refers stands at ``kind``, ``name`` and ``at``."""
        if not subset and self._entry(forms.SPLITTER, service) is not None:
            return self._splitter(service)
        return self._resolver(service, subset, kind, name, at)

    def _splitter(self, service: str) -> str:
        node = f"splitter:{service}.default.default"
        if node not in self._nodes:
            splits: dict[tuple[Any, ...], Split] = {}
            self._flatten(service, 1.0, HeaderChange(), HeaderChange(), (), splits)
            self._add(node, model.SplitterNode(tuple(splits.values())), forms.SPLITTER, service)
        return node

    def _flatten(
        self,
        service: str,
        share: float,
        request: HeaderChange,
        response: HeaderChange,
        above: tuple[str, ...],
        into: dict[tuple[Any, ...], Split],
    ) -> None:
        entry: forms.SplitterEntry = self._entry(forms.SPLITTER, service)
        above = (*above, service)
        for number, part in enumerate(entry.splits):
            at = f"Splits[{number}]"
            to = part.service or service
            if part.weight == 0:
                continue
            asked = _merged(request, part.request_headers)
            answered = _merged(response, part.response_headers)
            nested = to != service and not part.service_subset and self._entry(forms.SPLITTER, to) is not None
            if nested:
                if to in above:
                    way = " -> ".join((*above[above.index(to) :], to))
                    raise BadEntry(forms.SPLITTER, service, f"{at}.Service", f"splitters lead in a circle: {way}")
                self._flatten(to, share * part.weight / 100, asked, answered, above, into)
                continue
            node = self._resolver(to, part.service_subset, forms.SPLITTER, service, at)
            key = (node, _frozen(asked), _frozen(answered))
            weight = share * part.weight + (into[key].weight if key in into else 0.0)
            into[key] = Split(weight, node, asked, answered)
            if len(into) > SPLITS_MAX:
                raise BadEntry(forms.SPLITTER, service, "Splits", f"lead to more than {SPLITS_MAX} places in the end")

    # Resolver

    def _resolver(self, service: str, subset: str, kind: str, name: str, at: str) -> str:
        target, entry = self._target(service, subset, kind, name, at)
        node = f"resolver:{target.id}"
        if node in self._nodes:
            return node
        resolver = model.ResolverNode(target.id)
        if entry is not None:
            resolver = model.ResolverNode(
                target.id,
                failover=self._failover(target, entry),
                connect_timeout_s=parse_duration_s(entry.connect_timeout) or model.CONNECT_TIMEOUT_S,
                request_timeout_s=parse_duration_s(entry.request_timeout),
                balancing=_balancing(entry.load_balancer, entry.prioritize_by_locality),
            )
        return self._add(node, resolver, forms.RESOLVER, target.service)

    def _target(
        self, service: str, subset: str, kind: str, name: str, at: str
    ) -> tuple[Target, forms.ResolverEntry | None]:
        """Follow redirects and default subsets from a reference to the instances it means."""
        way = [service]
        while True:
            entry: forms.ResolverEntry | None = self._entry(forms.RESOLVER, service)
            if entry is None:
                break
            if entry.redirect is not None:
                self._here(entry.redirect.datacenter, service, "Redirect.Datacenter")
                to = entry.redirect.service or service
                if to != service or (entry.redirect.service_subset and entry.redirect.service_subset != subset):
                    subset = entry.redirect.service_subset
                    kind, name, at = forms.RESOLVER, service, "Redirect"
                    if to != service:
                        if to in way:
                            text = f"redirects lead in a circle: {' -> '.join((*way, to))}"
                            raise BadEntry(forms.RESOLVER, service, "Redirect.Service", text)
                        way.append(to)
                        service = to
                        continue
            if not subset and entry.default_subset:
                subset = entry.default_subset
            break
        part = ((entry.subsets if entry is not None else None) or {}).get(subset)
        if subset and part is None:
            names = ", ".join((entry.subsets if entry is not None else None) or ()) or "none"
            raise BadEntry(
                kind,
                name,
                f"{at}.ServiceSubset",
                f"service {service!r} has no subset {subset!r} (its service-resolver names: {names})",
            )
        self._same_protocol(service, kind, name, at)
        target = Target(
            target_id(service, self._datacenter, subset),
            service,
            subset,
            part.filter if part is not None else "",
            part.only_passing if part is not None else False,
        )
        self._targets[target.id] = target
        return target, entry

    def _same_protocol(self, service: str, kind: str, name: str, at: str) -> None:
        own, its = self._protocol or "tcp", self._protocol_of(service) or "tcp"
        if own != its:
            raise BadEntry(
                kind,
                name,
                f"{at}.Service",
                f"the protocol of {service!r} is {its!r}, that of {self._service!r} {own!r}: they must be the same",
            )

    def _failover(self, target: Target, entry: forms.ResolverEntry) -> tuple[str, ...]:
        all_of_them = entry.failover or {}
        subset = target.subset if target.subset in all_of_them else "*"
        one = all_of_them.get(subset)
        if one is None:
            return ()
        at = f"Failover[{subset!r}]"
        for datacenter in one.datacenters or ():
            self._here(datacenter, target.service, f"{at}.Datacenters")
        references = [(f"{at}.Targets[{n}]", part) for n, part in enumerate(one.targets or ())] or [
            (at, forms.Redirect(service=one.service, service_subset=one.service_subset))
        ]
        found: list[str] = []
        for where, part in references:
            self._here(part.datacenter, target.service, f"{where}.Datacenter")
            service = part.service or target.service
            # Who names the service itself means the same subset of it, which is no other place.
            subset = part.service_subset or (target.subset if service == target.service else "")
            to, _ = self._target(service, subset, forms.RESOLVER, target.service, where)
            if to.id != target.id and to.id not in found:
                found.append(to.id)
        return tuple(found)

    def _here(self, datacenter: str, service: str, field: str) -> None:
        if datacenter not in ("", self._datacenter):
            text = f"there is no datacenter {datacenter!r}; the only one is {self._datacenter!r}"
            raise BadEntry(forms.RESOLVER, service, field, text)


def _balancing(one: forms.LoadBalancer | None, locality: dict[str, Any] | None) -> Balancing:
    mode = next((value for key, value in (locality or {}).items() if key.lower() == "mode"), "")
    near = "zone" if mode == "failover" else ""
    if one is None:
        return Balancing(locality=near)
    ring = one.ring_hash_config or forms.RingConfig()
    return Balancing(
        policy=one.policy,
        locality=near,
        choice_count=(one.least_request_config or forms.LeastConfig()).choice_count,
        ring_size_min=ring.minimum_ring_size,
        ring_size_max=ring.maximum_ring_size,
        hash_policies=tuple(
            HashPolicy(
                field=part.field,
                field_value=part.field_value,
                source_ip=part.source_ip,
                terminal=part.terminal,
                cookie_ttl_s=parse_duration_s(part.cookie_config.ttl) if part.cookie_config is not None else 0.0,
                cookie_session=part.cookie_config is not None and part.cookie_config.session,
                cookie_path=part.cookie_config.path if part.cookie_config is not None else "",
            )
            for part in one.hash_policies or ()
        ),
    )


def _merged(first: HeaderChange, then: HeaderChange | None) -> HeaderChange:
    """Return one change that does what the two do, one after the other, where they name different headers."""
    if then is None:
        return first
    if not first:
        return then
    return HeaderChange({**first.add, **then.add}, {**first.set, **then.set}, (*first.remove, *then.remove))


def _frozen(change: HeaderChange) -> tuple[Any, ...]:
    return tuple(sorted(change.add.items())), tuple(sorted(change.set.items())), change.remove
