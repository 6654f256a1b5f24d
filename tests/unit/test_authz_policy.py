"""The intention evaluator: which intention decides, and what its permissions say of a request."""

from __future__ import annotations

import pytest

from proxy.authz import Request, compile_policy
from proxy.authz.permission import check_permission
from raftstate.model.identity import Identity
from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from raftstate.model.verbs import verbs_to_permissions

WEB = Identity(service="web", instance="web-1")


def l7(*permissions: Permission) -> Intention:
    return Intention(source_name="web", destination_name="db", permissions=permissions)


def allow(**http: object) -> Permission:
    return Permission(action="allow", http=HTTPMatch(**http))  # type: ignore[arg-type]


def deny(**http: object) -> Permission:
    return Permission(action="deny", http=HTTPMatch(**http))  # type: ignore[arg-type]


def ask(policy_of: list[Intention], method: str, target: str, **headers: str) -> bool:
    request = Request.of(method, target, {name.replace("_", "-"): value for name, value in headers.items()})
    return compile_policy(policy_of, False).decide_request(WEB, "db", "db-1", request).allowed


def test_instance_outranks_service_outranks_wildcard() -> None:
    intentions = [
        Intention(source_name="*", destination_name="*", action="deny"),
        Intention(source_name="web", destination_name="db", action="allow"),
        Intention(source_name="web-1", source_service="web", destination_name="db", action="deny"),
        Intention(
            source_name="web-1",
            source_service="web",
            destination_name="db-9",
            destination_service="db",
            action="allow",
        ),
    ]
    policy = compile_policy(intentions, True)
    assert not policy.decide(WEB, "db", "db-1").allowed
    assert policy.decide(WEB, "db", "db-9").allowed
    assert policy.decide(Identity(service="web", instance="web-2"), "db", "db-1").allowed
    assert not policy.decide(Identity(service="other", instance="web-1"), "db", "db-1").allowed


def test_an_instance_intention_needs_the_service_too() -> None:
    policy = compile_policy(
        [Intention(source_name="web-1", source_service="web", destination_name="db", action="allow")], False
    )
    assert policy.decide(WEB, "db", "db-1").allowed
    assert not policy.decide(Identity(service="evil", instance="web-1"), "db", "db-1").allowed
    assert not policy.decide(Identity(service="web-1"), "db", "db-1").allowed
    assert not policy.decide(Identity(service="web"), "db", "db-1").allowed


@pytest.mark.parametrize("default_allow", [True, False])
def test_the_default_holds_when_nothing_matches(default_allow: bool) -> None:
    decision = compile_policy([], default_allow).decide(WEB, "db", "db-1")
    assert decision.allowed is default_allow
    assert decision.intention is None
    assert "no intention matches" in decision.reason


def test_permissions_admit_the_connection_and_count_as_deny_without_requests() -> None:
    policy = compile_policy([l7(allow(path_prefix="/"))], True)
    connection = policy.decide(WEB, "db", "")
    assert connection.allowed
    assert connection.permissions
    assert not policy.decide_l4(WEB, "db", "").allowed
    assert policy.decide_l4(WEB, "elsewhere", "").allowed
    assert "L7" in policy.decide_l4(WEB, "db", "").reason


def test_first_permission_that_covers_decides_and_none_is_deny() -> None:
    rules = [l7(deny(path_exact="/admin"), allow(path_prefix="/", methods=("get",)))]
    assert ask(rules, "GET", "/x?y=/admin")
    assert not ask(rules, "GET", "/admin")
    assert not ask(rules, "GET", "/admin?x")
    assert not ask(rules, "POST", "/x")
    assert not ask(rules, "get", "/x"), "methods are case-sensitive"


def test_regex_covers_the_whole_path() -> None:
    rules = [l7(allow(path_regex="/v[0-9]+/users"))]
    assert ask(rules, "GET", "/v12/users?x=1")
    assert not ask(rules, "GET", "/v12/users/7")
    assert not ask(rules, "GET", "/x/v12/users")


@pytest.mark.parametrize(
    ("match", "values", "allowed", "denied"),
    [
        (HeaderMatch(name="X-Role", exact="admin"), ["admin"], True, True),
        (HeaderMatch(name="x-role", exact="admin"), ["Admin"], False, False),
        (HeaderMatch(name="x-role", exact="aDmin", ignore_case=True), ["Admin"], True, True),
        (HeaderMatch(name="x-role", exact="aDmin", ignore_case=True), ["Admins"], False, False),
        (HeaderMatch(name="x-role", prefix="aDm", ignore_case=True), ["AdMin", "x"], False, True),
        (HeaderMatch(name="x-role", suffix="miN", ignore_case=True), ["AdMin"], True, True),
        (HeaderMatch(name="x-role", contains="dM", ignore_case=True, invert=True), ["AdMin"], False, False),
        (HeaderMatch(name="x-role", exact="admin"), [], False, False),
        (HeaderMatch(name="x-role", exact="admin"), ["admin", "guest"], False, True),
        (HeaderMatch(name="x-role", exact="admin", invert=True), ["guest"], True, True),
        (HeaderMatch(name="x-role", exact="admin", invert=True), [], True, True),
        (HeaderMatch(name="x-role", exact="admin", invert=True), ["admin", "guest"], False, True),
        (HeaderMatch(name="x-role", prefix="ad"), ["admin"], True, True),
        (HeaderMatch(name="x-role", suffix="min"), ["admin"], True, True),
        (HeaderMatch(name="x-role", contains="dmi"), ["admin"], True, True),
        (HeaderMatch(name="x-role", regex="a.*n"), ["admin"], True, True),
        (HeaderMatch(name="x-role", regex="a.*"), ["xadmin"], False, False),
        (HeaderMatch(name="x-role", regex="a.*n"), ["a\u00ffn"], True, True),
        (HeaderMatch(name="x-role", present=True), ["x"], True, True),
        (HeaderMatch(name="x-role", present=True), [], False, False),
        (HeaderMatch(name="x-role", present=True, invert=True), [], True, True),
        (HeaderMatch(name="x-role", present=True, invert=True), [""], False, False),
    ],
)
def test_header_conditions(match: HeaderMatch, values: list[str], allowed: bool, denied: bool) -> None:
    """``allowed``: an allow with this condition permits; ``denied``: a deny with it forbids."""
    request = Request("GET", "/", [(b"x-role", value.encode("latin-1")) for value in values])
    opens = compile_policy([l7(allow(header=(match,)))], False)
    closes = compile_policy([l7(deny(header=(match,)), allow())], False)
    assert opens.decide_request(WEB, "db", "", request).allowed is allowed
    assert closes.decide_request(WEB, "db", "", request).allowed is not denied


def test_an_underscore_does_not_hide_a_header() -> None:
    rules = [l7(deny(header=(HeaderMatch(name="x-debug", present=True),)), allow())]
    request = Request("GET", "/", [(b"x_debug", b"1")])
    assert not compile_policy(rules, False).decide_request(WEB, "db", "", request).allowed


@pytest.mark.parametrize(
    "permission",
    [
        allow(path_regex="("),
        allow(path_exact="/a", path_prefix="/b"),
        allow(path_exact="a"),
        allow(path_prefix="/a/../b"),
        allow(path_prefix="//a"),
        allow(path_exact="/a%2fb"),
        allow(header=(HeaderMatch(name="x"),)),
        allow(header=(HeaderMatch(name="x", exact="a", prefix="b"),)),
        allow(header=(HeaderMatch(name="", exact="a"),)),
        allow(header=(HeaderMatch(name="x", regex="["),)),
        Permission(action="permit"),
    ],
)
def test_an_invalid_permission_denies_what_reaches_it(permission: Permission) -> None:
    assert check_permission(permission)
    assert not ask([l7(permission, allow())], "GET", "/anything")
    assert ask([l7(allow(path_exact="/first"), permission)], "GET", "/first")
    decision = compile_policy([l7(permission)], True).decide_request(WEB, "db", "", Request.of("GET", "/"))
    assert "invalid" in decision.reason


def test_an_invalid_intention_denies() -> None:
    for broken in (
        Intention(source_name="web", destination_name="db"),
        Intention(source_name="web", destination_name="db", action="alow"),
        Intention(source_name="web", destination_name="db", action="deny", permissions=(allow(),)),
    ):
        policy = compile_policy([broken], True)
        assert not policy.decide(WEB, "db", "").allowed
        assert not policy.decide_request(WEB, "db", "", Request.of("GET", "/")).allowed


def test_of_two_for_the_same_pair_the_stricter_decides() -> None:
    yes = Intention(source_name="web", destination_name="db", action="allow")
    no = Intention(source_name="web", destination_name="db", action="deny")
    for order in ([yes, no], [no, yes]):
        assert not compile_policy(order, True).decide(WEB, "db", "").allowed
    for order in ([yes, l7(allow())], [l7(allow()), yes]):
        assert compile_policy(order, True).decide(WEB, "db", "").permissions


@pytest.mark.parametrize(
    "target",
    [
        "/admin", "//admin", "/./admin", "/a/../admin", "/%61dmin", "/%2e/admin", "/public/%2E%2e/admin",
        "/public//../../admin", "/admin?x", "/public/.././/admin", "/adm%69n",
    ],
)  # fmt: skip
def test_no_spelling_gets_around_a_path_rule(target: str) -> None:
    rules = [l7(deny(path_prefix="/admin"), allow(path_prefix="/"))]
    assert not ask(rules, "GET", target)
    assert not ask([l7(allow(path_prefix="/public"))], "GET", target)


@pytest.mark.parametrize(
    "target",
    [
        "/public/..%2fadmin", "/public%2F..%2Fadmin", "/a%5cb", "/a\\b", "/a%00", "/a%0a", "/a%", "/a%zz", "/a%ff",
        "/public/%252e%252e/admin", "/a%252Fb", "/public/..;/admin", "/public/.;x/a", "/public/..%3b/admin",
        "/../admin", "/a/../../b", "/%2e%2e/b", "admin", "", "/a#b", "/caf\u00e9", "/a b", "/a\x7f",
    ],
)  # fmt: skip
def test_ambiguous_paths_are_never_permitted(target: str) -> None:
    request = Request("GET", target)
    assert request.ambiguity
    assert not compile_policy([l7(allow())], True).decide_request(WEB, "db", "", request).allowed


@pytest.mark.parametrize(
    ("target", "path", "forwarded"),
    [
        ("/", "/", "/"),
        ("/a/b/", "/a/b/", "/a/b/"),
        ("/a//b?x=//..", "/a/b", "/a/b?x=//.."),
        ("/a/./b/..", "/a/", "/a/"),
        ("/a/..", "/", "/"),
        ("/%7euser/%40x/a%20b?", "/~user/@x/a b", "/~user/%40x/a%20b?"),
        ("/caf%c3%a9", "/café", "/caf%C3%A9"),
        ("/100%25", "/100%", "/100%25"),
        ("/.well-known/x", "/.well-known/x", "/.well-known/x"),
        ("/a;v=1/b", "/a;v=1/b", "/a;v=1/b"),
        ("/...", "/...", "/..."),
        ("*", "*", "*"),
    ],
)
def test_normal_form(target: str, path: str, forwarded: str) -> None:
    request = Request("GET", target)
    assert (request.ambiguity, request.path, request.forward_target) == ("", path, forwarded)


@pytest.mark.parametrize(
    "target",
    [
        "/;/admin",
        "/;x/admin",
        "/admin;x",
        "/admin;a=b/keys",
        "/x/..;/admin",
        "/x;/../admin;/",
        "/;;//admin",
        "/admin%3Bx",
    ],
)
def test_a_parameter_of_a_segment_gets_around_no_path_rule(target: str) -> None:
    """Servlet containers route without what follows a ``;``, others with it: a rule holds for both readings."""
    for denied in (deny(path_prefix="/admin"), deny(path_regex="/admin(/.*)?")):
        assert not ask([l7(denied, allow(path_prefix="/"))], "GET", target)
    assert not ask([l7(allow(path_prefix="/public"))], "GET", target)


def test_a_parameter_of_a_segment_takes_no_permission_away() -> None:
    rules = [l7(deny(path_exact="/public/secret"), allow(path_prefix="/public"), allow(path_exact="/a;v=1/b"))]
    assert ask(rules, "GET", "/public/page;jsessionid=1")
    assert ask(rules, "GET", "/public;v=2/page")
    assert ask(rules, "GET", "/a;v=1/b"), "a rule that speaks of a parameter means the path as it is"
    assert not ask(rules, "GET", "/a;v=2/b")
    assert not ask(rules, "GET", "/public/secret;jsessionid=1")
    assert not ask(rules, "GET", "/publi;x=1c/page")
    assert Request("GET", "/a;v=1/b;/;c/").bare_path == "/a/b/"
    assert Request("GET", "/a/b").bare_path == ""


def test_rule_paths_are_read_like_request_paths() -> None:
    for written in ("/a b", "/a%20b"):
        assert ask([l7(allow(path_exact=written))], "GET", "/a%20b")
    assert ask([l7(allow(path_prefix="/café"))], "GET", "/caf%C3%A9/x")
    assert ask([l7(allow(path_exact="*", methods=("OPTIONS",)))], "OPTIONS", "*")
    assert not ask([l7(allow(path_prefix="/"))], "OPTIONS", "*")


def test_verbs() -> None:
    assert verbs_to_permissions("tcp") == verbs_to_permissions("any") == ()
    assert ask([l7(*verbs_to_permissions("http"))], "DELETE", "/x")
    rules = [l7(*verbs_to_permissions("get, POST"))]
    assert ask(rules, "GET", "/x")
    assert ask(rules, "POST", "/x")
    assert not ask(rules, "PUT", "/x")
    for wrong in ("", "FETCH", "http,GET", "CONNECT", "GET,,POST"):
        with pytest.raises(ValueError, match="GET, HEAD, POST"):
            verbs_to_permissions(wrong)
