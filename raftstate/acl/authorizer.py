"""Decisions: may the bearer of these rules read or write that? Made once per token, asked many times per request.

Source: Consul's "ACL rules" reference. For one resource, all rules of all policies are merged: of several for the
same name, ``deny`` wins, then the greatest access. Then the rule with exactly the name decides, else the one with the
longest prefix, else the default.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftstate.acl.rules import DENY, INTENTION, NAMED, READ, WHOLE, WRITE, Rule

RESOURCES = (*WHOLE, *NAMED, INTENTION)


class _Names:
    """The merged rules of one resource."""

    __slots__ = ("default", "exact", "least", "lengths", "most", "prefixes")

    def __init__(self, default: int) -> None:
        self.default = default
        self.exact: dict[str, int] = {}
        self.prefixes: dict[str, int] = {}
        self.lengths: tuple[int, ...] = ()
        self.least = self.most = default

    def seal(self) -> None:
        """Prepare the answers, once all rules are there."""
        self.lengths = tuple(sorted({len(prefix) for prefix in self.prefixes}, reverse=True))
        self.least = self.least_below("")
        self.most = max(self.inherited(""), *self.prefixes.values(), *self.exact.values(), DENY)

    def access(self, name: str) -> int:
        found = self.exact.get(name)
        return self.inherited(name) if found is None else found

    def inherited(self, name: str) -> int:
        """What prefixes grant for a name."""
        prefixes, size = self.prefixes, len(name)
        for length in self.lengths:
            if length <= size:
                found = prefixes.get(name[:length])
                if found is not None:
                    return found
        return self.default

    def least_below(self, prefix: str) -> int:
        """The least access to any name that begins with ``prefix``."""
        least = self.inherited(prefix)
        for rules in (self.prefixes, self.exact):
            for name, access in rules.items():
                if access < least and name.startswith(prefix):
                    least = access
        return least


class Authorizer:
    """What one token may do. Immutable once made."""

    __slots__ = ("_names", "everything")

    def __init__(self, names: dict[str, _Names]) -> None:
        self._names = names
        self.everything = all(names[resource].least == WRITE for resource in RESOURCES)
        """Nothing at all is denied: no answer needs to be filtered."""

    def allows(self, resource: str, name: str, access: int) -> bool:
        """Whether ``access`` to the thing of that name is granted; ``name`` is "" for a resource of which there is
        one."""
        return self._names[resource].access(name) >= access

    def allows_below(self, resource: str, prefix: str, access: int) -> bool:
        """Whether it is granted for every name that begins with ``prefix``, there or not."""
        return self._names[resource].least_below(prefix) >= access

    def allows_all(self, resource: str, access: int) -> bool:
        """Whether it is granted for every name."""
        return self._names[resource].least >= access

    def allows_any(self, resource: str, access: int) -> bool:
        """Whether it is granted for at least one name."""
        return self._names[resource].most >= access


def compile_rules(rules: Iterable[Rule], default: int) -> Authorizer:
    """Return the authorizer of all rules of a token; ``default`` (DENY or WRITE) is what no rule speaks of.

    Access control itself is never granted by default, as in Consul.
    """
    names = {resource: _Names(DENY if resource == "acl" else default) for resource in RESOURCES}
    intentions: dict[tuple[bool, str], int | None] = {}
    for rule in rules:
        # A resource of which there is one has no names: its rule covers all of them.
        whole = rule.prefix or rule.resource in WHOLE
        table = names[rule.resource].prefixes if whole else names[rule.resource].exact
        if rule.access is not None:
            held = table.get(rule.name)
            table[rule.name] = rule.access if held is None else stronger(held, rule.access)
        if rule.resource == "service":
            key = (rule.prefix, rule.name)
            said = intentions.get(key)
            intentions[key] = rule.intentions if said is None else stronger(said, rule.intentions)
    for (prefix, name), said in intentions.items():
        services = names["service"].prefixes if prefix else names["service"].exact
        # A rule that is silent about intentions lets them be read where the service may be, never written.
        access = min(services.get(name, DENY), READ) if said is None else said
        (names[INTENTION].prefixes if prefix else names[INTENTION].exact)[name] = access
    for one in names.values():
        one.seal()
    return Authorizer(names)


def stronger(first: int, second: int | None) -> int:
    """Return which of two accesses to the same name counts: deny, else the greater."""
    if second is None:
        return first
    return DENY if DENY in (first, second) else max(first, second)


ALLOW_ALL = compile_rules([Rule("acl", "", False, WRITE)], WRITE)
DENY_ALL = compile_rules((), DENY)
