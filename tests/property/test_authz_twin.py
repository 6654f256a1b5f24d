"""The compiled policy against its naive twin, which scans and sorts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.authz import Request, compile_policy
from raftstate.model.identity import Identity
from raftstate.model.intention import HTTPMatch, Intention, Permission, precedence

services = st.sampled_from(["a", "b", "c"])
instances = st.sampled_from(["a", "i1", "i2", "b"])
sides = st.one_of(st.just(("*", "")), st.tuples(services, st.just("")), st.tuples(instances, services))
paths = st.sampled_from(["/", "/x", "/x/y", "/z"])
permissions = st.builds(
    lambda action, exact, prefix, methods: Permission(
        action, HTTPMatch(path_exact=exact if not prefix else "", path_prefix=prefix, methods=methods)
    ),
    st.sampled_from(["allow", "deny"]),
    paths,
    st.one_of(st.just(""), paths),
    st.sampled_from([(), ("GET",), ("POST", "GET")]),
)
intentions = st.lists(
    st.builds(
        lambda source, destination, action, rules: Intention(
            source_name=source[0],
            source_service=source[1],
            destination_name=destination[0],
            destination_service=destination[1],
            action="" if rules else action,
            permissions=tuple(rules),
        ),
        sides,
        sides,
        st.sampled_from(["allow", "deny"]),
        st.one_of(st.just([]), st.lists(permissions, min_size=1, max_size=4)),
    ),
    unique_by=lambda i: (i.source_name, i.source_service, i.destination_name, i.destination_service),
    max_size=20,
)


def side_matches(name: str, of_service: str, service: str, instance: str) -> bool:
    if name == "*":
        return True
    return (name == instance and of_service == service) if of_service else name == service


def naive(
    rules: list[Intention], default: bool, source: Identity, service: str, instance: str, request: Request | None
) -> tuple[bool, Intention | None]:
    matching = [
        rule
        for rule in rules
        if side_matches(rule.source_name, rule.source_service, source.service, source.instance)
        and side_matches(rule.destination_name, rule.destination_service, service, instance)
    ]
    if not matching:
        return default, None
    best = max(matching, key=precedence)
    if not best.permissions:
        return best.action == "allow", best
    if request is None:
        return True, best
    for permission in best.permissions:
        http = permission.http
        if http.methods and request.method not in http.methods:
            continue
        if http.path_exact and request.target != http.path_exact:
            continue
        if http.path_prefix and not request.target.startswith(http.path_prefix):
            continue
        return permission.action == "allow", best
    return False, best


@given(intentions, st.booleans(), services, instances, services, instances, st.sampled_from(["GET", "PUT"]), paths)
def test_agrees_with_scan_and_sort(
    rules: list[Intention],
    default: bool,
    source: str,
    source_id: str,
    service: str,
    instance: str,
    method: str,
    path: str,
) -> None:
    policy = compile_policy(rules, default)
    identity = Identity(service=source, instance=source_id)
    request = Request(method, path)
    for asked, answer in (
        (None, policy.decide(identity, service, instance)),
        (request, policy.decide_request(identity, service, instance, request)),
    ):
        assert (answer.allowed, answer.intention) == naive(rules, default, identity, service, instance, asked)
    expected, best = naive(rules, default, identity, service, instance, None)
    assert policy.decide_l4(identity, service, instance).allowed is (
        expected and (best is None or not best.permissions)
    )


@given(st.text(alphabet="/.%25eEfFcaA;?\\ x", max_size=30))
def test_the_forwarded_path_reads_as_the_matched_one(path: str) -> None:
    """Whatever is sent on is in normal form: reading it again changes nothing."""
    request = Request("GET", "/" + path)
    if not request.ambiguity:
        again = Request("GET", request.forward_target)
        assert (again.path, again.forward_target) == (request.path, request.forward_target)
        assert ".." not in request.path.split("/")
        assert "//" not in request.path
