"""Policies that nobody writes: those every cluster has, and those that identities stand for.

Source: Consul's "ACL policies" and "ACL roles" (what a service or node identity grants).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from raftstate.acl.rules import NAMED, WHOLE


def _all(access: str, wholes: Iterable[str]) -> str:
    lines = [f'{name} = "{access}"' for name in wholes]
    for name in NAMED:
        intentions = f' intentions = "{access}"' if name == "service" else ""
        lines.append(f'{name}_prefix "" {{ policy = "{access}"{intentions} }}')
    return "\n".join(lines) + "\n"


MANAGEMENT_RULES = _all("write", WHOLE)
READ_ONLY_RULES = _all("read", [name for name in WHOLE if name != "acl"])


def service_rules(service: str) -> str:
    """Return what a service identity grants: to be that service and its sidecar, and to find others."""
    name, sidecar = json.dumps(service), json.dumps(service + "-sidecar-proxy")
    return (
        f'service {name} {{ policy = "write" }}\nservice {sidecar} {{ policy = "write" }}\n'
        'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }\n'
    )


def node_rules(node: str) -> str:
    """Return what a node identity grants: to register that node, and to find services."""
    return f'node {json.dumps(node)} {{ policy = "write" }}\nservice_prefix "" {{ policy = "read" }}\n'
