"""Configuration entries in HCL, as Consul's documentation writes them, are the entries that their JSON is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.hclfile import entry_of
from raftstate.acl.hcl import BadSyntax
from raftstate.chain import check_entry, check_expressions

ROUTER = """
# who asks for the admin pages goes elsewhere
Kind = "service-router"
Name = "web"
Routes = [
  {
    Match {
      HTTP {
        PathPrefix = "/admin"   // not the exact path
        Methods    = ["GET", "POST"]
        Header = [{ Name = "x-debug", Exact = "1" }]
      }
    }
    Destination {
      Service               = "admin"
      RequestTimeout        = "15s"
      NumRetries            = 3
      RetryOnConnectFailure = true
      RetryOnStatusCodes    = [502, 503]
    }
  },
  { Match { HTTP { PathExact = "/grpc.Health/Check" } } },
]
"""
SPLITTER = """
kind = "service-splitter"
name = "web"
splits = [
  { weight = 99.5, service_subset = "v1" },
  { weight = 0.5 service_subset = "v2" }
]
"""
RESOLVER = """
Kind = "service-resolver"
Name = "web"
ConnectTimeout = "15s"
Subsets = {
  "v1" = { Filter = "Service.Meta.version == v1" }
  v2   = { Filter = "Service.Meta[\\"version\\"] == v2", OnlyPassing = false }
}
Failover = { "*" = { Targets = [{ Service = "other" }, { ServiceSubset = "v1" }] } }
LoadBalancer {
  Policy = "ring_hash"
  HashPolicies = [{ Field = "header", FieldValue = "x-user" }]
}
"""
DEFAULTS = """
Kind = "service-defaults"
Name = "web"
Protocol = "grpc"
MaxInboundConnections = 100
UpstreamConfig {
  Defaults { PassiveHealthCheck { Interval = "10s", MaxFailures = 3 } }
  Overrides = [{ Name = "db", Protocol = "tcp" }]
}
"""


@pytest.mark.parametrize("text", [ROUTER, SPLITTER, RESOLVER, DEFAULTS])
def test_entries_of_consuls_kinds_are_read(text: str) -> None:
    entry = entry_of(text)
    kind, name = entry.pop("Kind", "") or entry.pop("kind"), entry.pop("Name", "") or entry.pop("name")
    spelt = check_entry(kind, name, entry)
    check_expressions(kind, name, spelt)


def test_the_parts_are_where_they_belong() -> None:
    first, second = entry_of(ROUTER)["Routes"]
    assert first["Match"] == {
        "HTTP": {
            "PathPrefix": "/admin", "Methods": ["GET", "POST"], "Header": [{"Name": "x-debug", "Exact": "1"}],
        }
    }  # fmt: skip
    assert first["Destination"]["NumRetries"] == 3
    assert first["Destination"]["RetryOnConnectFailure"] is True
    assert second == {"Match": {"HTTP": {"PathExact": "/grpc.Health/Check"}}}
    assert [split["weight"] for split in entry_of(SPLITTER)["splits"]] == [99.5, 0.5]
    assert entry_of('Subsets "v1" { OnlyPassing = true }\nSubsets "v2" {}') == {
        "Subsets": {"v1": {"OnlyPassing": True}, "v2": {}}
    }
    assert entry_of("Splits { Weight = 90 }\nSplits { Weight = 10 }\nA { }") == {
        "Splits": [{"Weight": 90}, {"Weight": 10}], "A": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Kind = service-router", "service-router"),
        ('Kind = "a"\nKind = "b"', "Kind is given twice"),
        ('Subsets "v1" {}\nSubsets "v1" {}', "Subsets.v1 is given twice"),
        ('Kind = "a', "line 1"),
        ("Kind = <<EOT\nx\nEOT\n", "line 1"),
        ("A { B { C = [1, x] } }", "A.B.C[1]"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, says: str) -> None:
    with pytest.raises(BadSyntax) as refused:
        entry_of(text)
    assert says in str(refused.value)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
values: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(codec="ascii", exclude_categories=["C"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True), inner)
    ),
    max_leaves=20,
)


def hcl(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + "\n".join(f"{json.dumps(key)} = {hcl(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(map(hcl, value)) + "]" if isinstance(value, list) else json.dumps(value)


@given(st.dictionaries(names, values, max_size=5))
def test_what_is_written_is_read(entry: dict[str, Any]) -> None:
    assert entry_of("\n".join(f"{key} = {hcl(value)}" for key, value in entry.items())) == entry
