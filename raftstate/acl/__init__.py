"""Consul's policy language: rules as text, and the decisions that they come to. Pure."""

from raftstate.acl.authorizer import ALLOW_ALL, DENY_ALL, Authorizer, compile_rules
from raftstate.acl.builtin import node_rules, service_rules
from raftstate.acl.rules import DENY, LIST, READ, WRITE, BadRules, Rule, parse_rules

__all__ = [
    "ALLOW_ALL",
    "DENY",
    "DENY_ALL",
    "LIST",
    "READ",
    "WRITE",
    "Authorizer",
    "BadRules",
    "Rule",
    "compile_rules",
    "node_rules",
    "parse_rules",
    "service_rules",
]
