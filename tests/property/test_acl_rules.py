"""Access rules: the compiled decisions are those of the rules read one by one, and no text does anything but parse or
be refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raftstate.acl import DENY, READ, WRITE, BadRules, Rule, compile_rules, parse_rules
from raftstate.acl.rules import INTENTION, LIST, NAMED, WHOLE, word

names = st.text(alphabet="ab/", max_size=4)
accesses = {name: (DENY, READ, LIST, WRITE) if name == "key" else (DENY, READ, WRITE) for name in NAMED}


@st.composite
def rule(draw: st.DrawFn) -> Rule:
    if draw(st.integers(0, 5)) == 0:
        return Rule(draw(st.sampled_from(WHOLE)), "", False, draw(st.sampled_from((DENY, READ, WRITE))))
    resource = draw(st.sampled_from(NAMED))
    said = draw(st.sampled_from((None, DENY, READ, WRITE))) if resource == "service" else None
    access = draw(st.sampled_from(accesses[resource]))
    return Rule(resource, draw(names), draw(st.booleans()), access, said)


def naive(rules: list[Rule], default: int, resource: str, name: str) -> int:
    """What Consul's page on rules says, sentence by sentence."""
    if resource == "acl":
        default = DENY
    if resource in WHOLE:
        said = [one.access for one in rules if one.resource == resource]
        return default if not said else (DENY if DENY in said else max(said))  # type: ignore[type-var, return-value]
    kind = "service" if resource == INTENTION else resource
    fitting = [one for one in rules if one.resource == kind]
    exact = [one for one in fitting if not one.prefix and one.name == name]
    if exact:
        return merged(exact, resource)
    for length in range(len(name), -1, -1):
        found = [one for one in fitting if one.prefix and one.name == name[:length]]
        if found:
            return merged(found, resource)
    return default


def merged(rules: list[Rule], resource: str) -> int:
    access = [one.access for one in rules if one.access is not None]
    services = DENY if DENY in access else max(access)
    if resource != INTENTION:
        return services
    said = [one.intentions for one in rules if one.intentions is not None]
    if not said:
        return READ if services >= READ else DENY
    return DENY if DENY in said else max(said)


@given(st.lists(rule(), max_size=12), st.sampled_from((DENY, WRITE)), names)
def test_a_decision_is_that_of_the_most_specific_rule(rules: list[Rule], default: int, name: str) -> None:
    authorizer = compile_rules(rules, default)
    for resource in (*WHOLE, *NAMED, INTENTION):
        asked = "" if resource in WHOLE else name
        granted = naive(rules, default, resource, asked)
        for access in (READ, LIST, WRITE):
            assert authorizer.allows(resource, asked, access) == (granted >= access), (resource, asked, access)


@given(st.lists(rule(), max_size=12), st.sampled_from((DENY, WRITE)), names)
# An exact rule hides a prefix's for one name; what merely begins with that name is another.
@example([Rule("agent", "a", True, DENY), Rule("agent", "a", False, READ)], WRITE, "")
@example([Rule("agent", "a", True, WRITE), Rule("agent", "a", False, DENY)], DENY, "")
def test_what_is_said_of_all_names_holds_for_each(rules: list[Rule], default: int, prefix: str) -> None:
    authorizer = compile_rules(rules, default)
    tails = ["", "a", "b", "/", "ab", "/a", "zz", *(one.name for one in rules)]
    for resource in (*NAMED, INTENTION):
        tried = {prefix + tail for tail in tails} | {one.name for one in rules if one.name.startswith(prefix)}
        granted = [naive(rules, default, resource, name) for name in tried | {prefix + "\x7f"}]
        told = {one.name for one in rules} | {""}
        every = [naive(rules, default, resource, name) for name in told | {name + "\x7f" for name in told}]
        for access in (READ, WRITE):
            if authorizer.allows_below(resource, prefix, access):
                assert min(granted) >= access, (resource, prefix)
            assert authorizer.allows_all(resource, access) == (min(every) >= access), resource
            assert authorizer.allows_any(resource, access) >= (max(every) >= access), resource


def as_hcl(rules: list[Rule]) -> str:
    lines = []
    for one in rules:
        if one.resource in WHOLE:
            lines.append(f'{one.resource} = "{word(one.access or DENY)}"')
            continue
        said = f' intentions = "{word(one.intentions)}"' if one.intentions is not None else ""
        kind = one.resource + ("_prefix" if one.prefix else "")
        lines.append(f'{kind} {json.dumps(one.name)} {{\n  policy = "{word(one.access or DENY)}"{said}\n}}  # why')
    return "\n".join(lines)


def as_json(rules: list[Rule]) -> str:
    document: dict[str, object] = {}
    for one in rules:
        if one.resource in WHOLE:
            document[one.resource] = word(one.access or DENY)
            continue
        body = {"policy": word(one.access or DENY)}
        if one.intentions is not None:
            body["intentions"] = word(one.intentions)
        groups = document.setdefault(one.resource + ("_prefix" if one.prefix else ""), [])
        assert isinstance(groups, list)
        groups.append({one.name: body})
    return json.dumps(document)


@given(st.lists(rule(), max_size=8, unique_by=lambda one: (one.resource, one.name, one.prefix)))
def test_both_syntaxes_mean_the_same(rules: list[Rule]) -> None:
    assert list(parse_rules(as_hcl(rules))) == rules
    assert sorted(map(str, parse_rules(as_json(rules)))) == sorted(map(str, rules))


pieces = st.sampled_from(
    ['key "a"', "{", "}", "policy", "=", '"read"', '"', "\\", "#", "/*", "*/", "[", "]", "key_prefix", "\n", "1", "é"]
)


@given(st.one_of(st.lists(pieces, max_size=20).map(" ".join), st.text(max_size=60)))
def test_any_text_is_rules_or_a_clear_refusal(text: str) -> None:
    with contextlib.suppress(BadRules):
        parse_rules(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('key "a" {', "line 1"),
        ('\nkey "a" { policy "read" }', "line 2"),
        ('foo = "read"', "'foo' is not a resource"),
        ('key "a" { policy = "lots" }', 'key "a": \'lots\''),
        ('node "a" { policy = "list" }', 'use "read", "write" or "deny"'),
        ('acl "x" { policy = "read" }', "write acl ="),
        ('operator = read', "write operator ="),
        ('key "a" { policy = "read" more = "x" }', "no field 'more'"),
        ('key "a" { intentions = "read" }', "no field 'intentions'"),
        ('node "a" { }', "policy is missing"),
        ('{"node": {"a": "read"}}', "must be an object"),
        ('{"node": "read"}', "node: "),
        ("{", "not valid JSON"),
        ("{" * 5000, "not valid JSON"),
        ("a {" * 20_000, "line 1"),
        ('[' * 20_000, "line 1"),
        ("x" * 70_000, "use several policies"),
        ("\n".join(f'key "{i}" {{policy="read"}}' for i in range(2000)), ""),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place(text: str, told: str) -> None:
    if not told:
        assert len(parse_rules(text)) == 2000
        return
    with pytest.raises(BadRules) as caught:
        parse_rules(text)
    assert told in str(caught.value)
