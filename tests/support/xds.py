"""Snapshots for xDS tests, and Envoy's RBAC rules played by hand."""

from __future__ import annotations

import re
from typing import Any

from node.xds import rbac
from node.xds.snapshot import Snapshot
from proxy.authz.request import Request
from raftstate.model.connect import Leaf
from raftstate.model.identity import Identity
from raftstate.model.intention import Intention
from raftstate.model.sidecar import Endpoint, SidecarSelf, SidecarUpstream

DOMAIN = "mesh.consul"


def make_snapshot(*intentions: Intention, **more: Any) -> Snapshot:
    """Return the snapshot of a sidecar of ``backend``/``backend-1`` with one upstream."""
    own = SidecarSelf(
        proxy_id="backend-1-sidecar-proxy",
        service="backend",
        service_id="backend-1",
        node="n1",
        datacenter="dc1",
        trust_domain=DOMAIN,
        public_address="127.0.0.1",
        public_port=20000,
        local_address="127.0.0.1",
        local_port=9000,
        protocol=more.pop("protocol", "tcp"),
    )
    leaf = Leaf("01:02", "CERT", "KEY", "backend", "spiffe://x", "", "")
    sections: dict[str, Any] = {
        "self": own,
        "leaf": leaf,
        "roots": ("ROOT",),
        "intentions": intentions,
        "default_allow": False,
        "revocations": (),
        "upstreams": (upstream(),),
    }
    return Snapshot(**{**sections, **more})


def upstream(name: str = "db", protocol: str = "tcp", *instances: str) -> SidecarUpstream:
    """Return an upstream with instances."""
    endpoints = tuple(Endpoint("n2", "10.0.0.2", 20000 + i, name, one) for i, one in enumerate(instances))
    return SidecarUpstream(name, name, "127.0.0.1", 21000, protocol, endpoints)


def admits(policies: dict[str, Any], source: Identity, request: Request | None = None) -> bool:
    """Play an RBAC filter with the action ALLOW."""
    return any(
        any(_permitted(rule, request) for rule in policy["permissions"])
        and any(_is(rule, source) for rule in policy["principals"])
        for policy in policies.values()
    )


def _is(rule: dict[str, Any], source: Identity) -> bool:
    (kind, value), *_ = rule.items()
    if kind == "any":
        return bool(value)
    if kind == "and_ids":
        return all(_is(one, source) for one in value["ids"])
    if kind == "or_ids":
        return any(_is(one, source) for one in value["ids"])
    if kind == "not_id":
        return not _is(value, source)
    if kind == "authenticated":
        uri = f"spiffe://{DOMAIN}/ns/default/dc/dc1/svc/{source.service}"
        return bool(value["principal_name"]["exact"] == uri)
    assert kind == "filter_state", kind
    shown = {rbac.SUBJECT_KEY: rbac.subject(source.service, source.instance), rbac.SERIAL_KEY: source.serial}
    return _text(value["string_match"], shown[value["key"]])


def _permitted(rule: dict[str, Any], request: Request | None) -> bool:
    (kind, value), *_ = rule.items()
    if kind == "any":
        return bool(value)
    if kind == "and_rules":
        return all(_permitted(one, request) for one in value["rules"])
    if kind == "or_rules":
        return any(_permitted(one, request) for one in value["rules"])
    if kind == "not_rule":
        return not _permitted(value, request)
    assert request is not None, f"{kind} needs a request"
    if kind == "url_path":
        return _text(value["path"], request.target.partition("?")[0])
    assert kind == "header", kind
    if value["name"] == ":method":
        return _text(value["string_match"], request.method)
    given = [text.decode("latin-1") for name, text in request.headers if name.decode() == value["name"].lower()]
    if value.get("present_match"):
        return bool(given)
    return bool(given) and _text(value["string_match"], ",".join(given))


def _text(match: dict[str, Any], text: str) -> bool:
    (kind, value), *_ = match.items()
    if kind == "exact":
        return bool(text == value)
    if kind == "prefix":
        return text.startswith(value)
    if kind == "contains":
        return value in text
    assert kind == "safe_regex", kind
    return re.fullmatch(value["regex"], text) is not None
