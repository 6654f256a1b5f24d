"""Envoy's RBAC admits exactly whom Lictor's own evaluator admits; with requests, never more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.xds import rbac, types
from node.xds.resources import resources
from proxy.authz import compile_policy
from proxy.authz.request import Request
from raftstate.model.connect import Revocation
from raftstate.model.identity import Identity
from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from tests.support.xds import admits, make_snapshot

SIDES = st.sampled_from([("*", ""), ("web", ""), ("api", ""), ("web-1", "web"), ("web-2", "web"), ("web-1", "api")])
OURS = st.sampled_from([("*", ""), ("backend", ""), ("backend-1", "backend"), ("backend-2", "backend"), ("db", "")])
PERMISSIONS = st.sampled_from(
    [
        Permission("allow", HTTPMatch(path_prefix="/")),
        Permission("allow", HTTPMatch(path_exact="/v1/read", methods=("GET",))),
        Permission("deny", HTTPMatch(path_prefix="/admin")),
        Permission("deny", HTTPMatch(path_prefix="/a/")),
        Permission("deny", HTTPMatch(path_exact="/v1/read")),
        Permission("deny", HTTPMatch(path_regex="/v[0-9]/.")),
        Permission("allow", HTTPMatch(path_regex="/v1;x/.*")),
        Permission("deny", HTTPMatch(methods=("DELETE", "PUT"))),
        Permission("allow", HTTPMatch(path_regex="/v[0-9]+/.*", methods=("get", "POST"))),
        Permission("allow", HTTPMatch(header=(HeaderMatch("x-role", exact="ops"),))),
        Permission("deny", HTTPMatch(header=(HeaderMatch("x-role", prefix="ev"),))),
        Permission("allow", HTTPMatch(header=(HeaderMatch("x-role", exact="OPs", ignore_case=True),))),
        Permission("deny", HTTPMatch(header=(HeaderMatch("x-role", exact="ops", invert=True),))),
        Permission("allow", HTTPMatch(header=(HeaderMatch("x-role", contains="p", invert=True),))),
        Permission("deny", HTTPMatch(header=(HeaderMatch("x-role", present=True),))),
        Permission("allow", HTTPMatch(path_exact="/a b")),
        Permission("allow"),
        Permission("deny"),
        Permission("maybe"),
    ]
)
PARAMETERS = (
    "/;a/admin/x",
    "/admin;v=1/x",
    "/;/;b/admin",
    "/v1;x/y",
    "/v1/y;x",
    "/v1%3bx/y",
    "/v1/read;x",
    "/a;b/;c/;",
)
REQUESTS = [
    Request(method, target, [(b"x-role", value) for value in roles])
    for method in ("GET", "POST", "DELETE")
    for target in (
        "/",
        "/admin/x",
        "/v1/read",
        "/v2/x?q=/admin",
        "/a%20b",
        "/%61dmin",
        "/ADMIN",
        "/x;/y",
        *PARAMETERS,
    )
    for roles in ([], [b"ops"], [b"evil"], [b"ops", b"evil"], [b"no"], [b"oPs"])
]
SOURCES = [Identity(service, instance) for service in ("web", "api", "other") for instance in ("web-1", "web-2", "")]


@st.composite
def intention_lists(draw: st.DrawFn, *, l7: bool) -> list[Intention]:
    pairs = draw(st.lists(st.tuples(SIDES, OURS), unique=True, max_size=8))
    found = []
    for (source, source_service), (name, service) in pairs:
        permissions = tuple(draw(st.lists(PERMISSIONS, max_size=3))) if l7 else ()
        action = "" if permissions else draw(st.sampled_from(["allow", "deny", "what"]))
        found.append(
            Intention(
                source, name, source_service=source_service, destination_service=service,
                action=action, permissions=permissions,
            )
        )  # fmt: skip
    return found


@settings(deadline=None, max_examples=60)
@given(intention_lists(l7=False), st.booleans())
def test_admits_the_same_connections(intentions: list[Intention], default_allow: bool) -> None:
    policy = compile_policy(intentions, default_allow)
    access = rbac.access(make_snapshot(*intentions, default_allow=default_allow))
    for source in SOURCES:
        decided = policy.decide(source, "backend", "backend-1").allowed
        assert admits(access.policies, source) is decided, source
        if decided and access.sources is not None:
            assert any(uri.endswith("/" + source.service) for uri in access.sources)


@settings(deadline=None, max_examples=60)
@given(intention_lists(l7=False), st.booleans(), st.sampled_from(["web", "api", "other"]))
def test_a_services_own_chains_admit_of_it_whom_all_policies_admit(
    intentions: list[Intention], default_allow: bool, service: str
) -> None:
    revocations = (
        Revocation("instance", "web-1"),
        Revocation("instance", "web-2", service="api"),
        Revocation("service", "other"),
    )
    snapshot = make_snapshot(*intentions, default_allow=default_allow, revocations=revocations)
    access = rbac.access(snapshot)
    narrow = rbac.policies_for(service, access.decisions, snapshot)
    for source in (one for one in SOURCES if one.service == service):
        assert admits(narrow, source) is admits(access.policies, source)
        assert admits(rbac.revoked(snapshot, service), source) is admits(rbac.revoked(snapshot), source)
    others = {other for other in ("web", "api", "other") if other != service}
    assert not any(f"/svc/{other}" in str(narrow) for other in others), "and nothing of other services"


@settings(deadline=None, max_examples=60)
@given(intention_lists(l7=True), st.booleans())
def test_never_admits_a_request_that_lictor_refuses(intentions: list[Intention], default_allow: bool) -> None:
    policy = compile_policy(intentions, default_allow)
    access = rbac.access(make_snapshot(*intentions, default_allow=default_allow))
    for source in SOURCES[:4]:
        for request in REQUESTS:
            decided = policy.decide_request(source, "backend", "backend-1", request).allowed
            admitted = admits(access.policies, source, request)
            plain = "%" not in request.target and ";" not in request.target and len(request.headers) < 2
            assert admitted is decided if plain else admitted <= decided, (source, request, request.headers)


@pytest.mark.parametrize(
    "target",
    ["/a/%2e%2e/b", "/a%2fb", "/a%5cb", "/%61", "/x%00", "/a/..;x/b", "/a%252e", "/a%zz", "/a%", "/a\\b", "/é"],
)
def test_paths_with_two_readings_are_not_admitted(target: str) -> None:
    intention = Intention("web", "backend", permissions=(Permission("allow", HTTPMatch(path_prefix="/")),))
    policies = rbac.access(make_snapshot(intention)).policies
    assert admits(policies, Identity("web"), Request("GET", "/a/b%20c"))
    assert not admits(policies, Identity("web"), Request("GET", target))


@pytest.mark.parametrize(
    ("revocation", "gone"),
    [
        (Revocation("service", "web"), {"web:web-1", "web:web-2"}),
        (Revocation("instance", "web-1"), {"web:web-1", "api:web-1"}),
        (Revocation("instance", "web-1", service="web"), {"web:web-1"}),
        (Revocation("instance", "web"), set()),
        (Revocation("serial", "0A:0b"), {"api:api-1"}),
    ],
)
def test_revoked_identities_are_denied(revocation: Revocation, gone: set[str]) -> None:
    denied = rbac.revoked(make_snapshot(revocations=(revocation,)))
    sources = [Identity("web", "web-1"), Identity("web", "web-2"), Identity("api", "web-1")]
    sources.append(Identity("api", "api-1", serial="0a0b"))
    assert {f"{one.service}:{one.instance}" for one in sources if admits(denied, one)} == gone


def test_a_name_cannot_pass_for_an_instance() -> None:
    denied = rbac.revoked(make_snapshot(revocations=(Revocation("instance", "web-1"),)))
    assert not admits(denied, Identity("x,UID=web-1", "other"))
    assert not admits(denied, Identity("web", "web-1,CN=web"))


def test_a_policy_of_requests_meets_only_listeners_that_read_them_its_way() -> None:
    """The policy and the listener come one after the other: the policy may reach the listener that was there."""
    by_path = Intention("web", "backend", permissions=(Permission("allow", HTTPMatch(path_prefix="/a")),))
    role = HTTPMatch(header=(HeaderMatch("x-role", exact="ops"),))
    by_header = Intention("web", "backend", permissions=(Permission("allow", role),))
    found = [
        resources(make_snapshot(*intentions, protocol="http"))
        for intentions in ((Intention("web", "backend", action="allow"),), (by_path,), (by_header,))
    ]
    plain, path, header = (one[types.LISTENER] for one in found)
    assert plain == path
    assert "'normalize_path': True" in str(plain)
    assert "headers_with_underscores_action" not in str(plain)
    assert "headers_with_underscores_action" in str(header)
    assert types.HTTP_RBAC in found[0][types.EXTENSION].keys() & found[1][types.EXTENSION].keys()
    new = set(found[2][types.EXTENSION]) - set(found[0][types.EXTENSION])
    assert all(name in str(header) and name not in str(plain) for name in new)
    assert new


def test_no_revocation_takes_anothers_place() -> None:
    """Names may have colons: of two revocations whose names read alike, one was lost."""
    rows = (
        Revocation("instance", "b", service="a"),
        Revocation("instance", "a:b"),
        Revocation("instance", "b:c", "a"),
    )
    assert len(rbac.revoked(make_snapshot(revocations=rows))) == 3
    intentions = [
        Intention("b", "backend", source_service="a", action="allow"),
        Intention("a:b", "backend", action="allow"),
    ]
    assert len(rbac.access(make_snapshot(*intentions)).policies) == 2


@pytest.mark.parametrize(
    ("instance", "printed"),
    [
        ("shop-1", "UID=shop-1,CN=caf\\C3\\A9"),
        ("sh\xf6p-1", "UID=sh\\C3\\B6p-1,CN=caf\\C3\\A9"),
        ("\u65e5\u672c", "UID=\\E6\\97\\A5\\E6\\9C\\AC,CN=caf\\C3\\A9"),
        ("a+b;c<d>,e", "UID=a\\+b\\;c\\<d\\>\\,e,CN=caf\\C3\\A9"),
        (" #x= ", "UID=\\ #x=\\ ,CN=caf\\C3\\A9"),
    ],
)
def test_a_subject_is_what_envoy_prints(instance: str, printed: str) -> None:
    """As Envoy 1.40 wrote them into its access log."""
    assert rbac.subject("caf\xe9", instance) == printed
    (policy,) = rbac.revoked(make_snapshot(revocations=(Revocation("instance", instance),))).values()
    assert printed.startswith(policy["principals"][0]["filter_state"]["string_match"]["prefix"])


@pytest.mark.parametrize("target", [one for one in PARAMETERS if "%" not in one])
@pytest.mark.parametrize("rule", ["/v1", "/admin", "/a/", "/v1/read", "/"])
@pytest.mark.parametrize("kind", ["path_prefix", "path_exact"])
def test_parameters_of_segments_are_read_both_ways(target: str, rule: str, kind: str) -> None:
    """As a Lictor sidecar reads them: an allow covers both readings, a deny either."""
    everything = Permission("allow", HTTPMatch(path_prefix="/"))
    for permissions in (
        (Permission("allow", HTTPMatch(**{kind: rule})),),
        (Permission("deny", HTTPMatch(**{kind: rule})), everything),
    ):
        intention = Intention("web", "backend", permissions=permissions)
        request = Request("GET", target)
        source = Identity("web", "web-1")
        decided = compile_policy([intention], False).decide_request(source, "backend", "backend-1", request).allowed
        assert admits(rbac.access(make_snapshot(intention)).policies, source, request) is decided
