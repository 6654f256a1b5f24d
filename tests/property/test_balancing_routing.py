"""Routes match as they say, splits give each its percentage, changes of headers do what they say in any order."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.balancer import Balancer
from proxy.balancing.routing import Routing, change_lines, hash_request
from raftstate.chain import check_entry, compile_plan
from raftstate.model.plan import HashPolicy, HeaderChange, Match, Node, Plan, ResolverNode, Route, RouterNode, Target
from raftstate.model.sidecar import Endpoint

HTTP = {"Protocol": "http"}


class Head:
    def __init__(self, target: str = "/", method: str = "GET", **fields: str) -> None:
        self.method, self.target = method.encode(), target.encode()
        self.fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]


def routing(entries: dict[tuple[str, str], dict[str, Any]], seed: int = 3) -> Routing:
    checked = {key: check_entry(*key, entry) for key, entry in entries.items()}
    plan = compile_plan("web", lambda kind, name: checked.get((kind, name)), "dc1")
    chance = random.Random(seed).random
    balancers = {}
    for id, target in plan.targets.items():
        balancers[id] = Balancer(chance)
        balancers[id].update([Endpoint("n", "h", 1, target.service, id)])
    return Routing(plan, balancers, chance)


def taken(table: Routing, head: Head) -> str:
    instance = table.request(head).destination.pick(0.0)
    assert instance is not None
    return instance.key.instance.split(".")[0]


def matching(**http: Any) -> Routing:
    return routing(
        {
            ("service-defaults", "web"): HTTP,
            ("service-defaults", "hit"): HTTP,
            ("service-router", "web"): {"Routes": [{"Match": {"HTTP": http}, "Destination": {"Service": "hit"}}]},
        }
    )


@pytest.mark.parametrize(
    ("http", "hits", "misses"),
    [
        ({"PathExact": "/a"}, [Head("/a"), Head("/a?x")], [Head("/a/"), Head("/A"), Head("/")]),
        ({"PathExact": "/A", "CaseInsensitive": True}, [Head("/a"), Head("/A")], [Head("/ab")]),
        ({"PathPrefix": "/a"}, [Head("/a"), Head("/ab/c")], [Head("/b"), Head("/?/a")]),
        ({"PathPrefix": "/aB", "CaseInsensitive": True}, [Head("/Ab/c")], [Head("/b")]),
        ({"PathRegex": "/u/[0-9]+"}, [Head("/u/12?q")], [Head("/u/12/x"), Head("/u/"), Head("/U/1")]),
        ({"PathRegex": "/u/[0-9]+", "CaseInsensitive": True}, [Head("/U/12")], [Head("/u/x")]),
        ({"Methods": ["put", "POST"]}, [Head(method="PUT"), Head(method="POST")], [Head()]),
        ({"Header": [{"Name": "X-A", "Present": True}]}, [Head(x_a="")], [Head(x_b="1")]),
        ({"Header": [{"Name": "x-a", "Present": True, "Invert": True}]}, [Head()], [Head(x_a="1")]),
        ({"Header": [{"Name": "x-a", "Exact": "on"}]}, [Head(x_a="on")], [Head(x_a="ON"), Head(x_a="one"), Head()]),
        ({"Header": [{"Name": "x-a", "Exact": "on", "IgnoreCase": True}]}, [Head(x_a="oN")], [Head(x_a="one")]),
        ({"Header": [{"Name": "x-a", "Exact": "on", "Invert": True}]}, [Head(x_a="off"), Head()], [Head(x_a="on")]),
        ({"Header": [{"Name": "x-a", "Prefix": "a"}]}, [Head(x_a="ab")], [Head(x_a="ba")]),
        ({"Header": [{"Name": "x-a", "Suffix": "a"}]}, [Head(x_a="ba")], [Head(x_a="ab")]),
        ({"Header": [{"Name": "x-a", "Contains": "mo"}]}, [Head(x_a="demo")], [Head(x_a="m-o")]),
        ({"Header": [{"Name": "x-a", "Regex": "v[12]"}]}, [Head(x_a="v2")], [Head(x_a="v21"), Head(x_a="v3")]),
        (
            {"QueryParam": [{"Name": "q", "Present": True}]},
            [Head("/?q"), Head("/?a&q=")],
            [Head("/?qq=1"), Head("/")],
        ),
        ({"QueryParam": [{"Name": "q", "Exact": "a b"}]}, [Head("/?q=a+b"), Head("/?q=a%20b")], [Head("/?q=ab")]),
        ({"QueryParam": [{"Name": "q", "Regex": "[0-9]"}]}, [Head("/?q=1&q=x")], [Head("/?q=x&q=1"), Head("/?q=12")]),
        (
            {"PathPrefix": "/a", "Methods": ["GET"], "Header": [{"Name": "x", "Exact": "1"}]},
            [Head("/a", x="1")],
            [Head("/a"), Head("/b", x="1"), Head("/a", "POST", x="1")],
        ),
        ({}, [Head(), Head("/x", "POST")], []),
    ],
)
def test_a_route_takes_what_it_says(http: dict[str, Any], hits: list[Head], misses: list[Head]) -> None:
    table = matching(**http)
    assert [taken(table, head) for head in hits] == ["hit"] * len(hits)
    assert [taken(table, head) for head in misses] == ["web"] * len(misses)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 5))
def test_splits_give_each_its_percentage(parts: list[int], seed: int) -> None:
    """Also through a nested splitter: its shares are shares of its share."""
    rest = 100 - sum(parts) if sum(parts) < 100 else 0
    weights = [*parts, rest] if rest else [100]
    outer = [{"Weight": w, "Service": f"s{n}"} for n, w in enumerate(weights)]
    inner = [{"Weight": 25, "Service": "x"}, {"Weight": 75, "Service": "y"}]
    table = routing(
        {("service-splitter", "web"): {"Splits": outer}, ("service-splitter", "s0"): {"Splits": inner}}, seed
    )
    wanted = {f"s{n}": w / 100 for n, w in enumerate(weights) if n}
    wanted |= {"x": weights[0] / 400, "y": weights[0] * 3 / 400}
    counted = Counter(taken(table, Head()) for _ in range(4000))
    assert counted.keys() <= wanted.keys()
    for name, share in wanted.items():
        # Five standard deviations, so that it never fails by chance, and a wrong percentage does.
        assert abs(counted[name] / 4000 - share) <= 5 * (share * (1 - share) / 4000) ** 0.5 + 1e-9, (name, counted)


def test_a_split_of_nothing_takes_nothing() -> None:
    splits = [{"Weight": 0, "Service": "none"}, {"Weight": 100, "Service": "all"}]
    table = routing({("service-splitter", "web"): {"Splits": splits}})
    assert {taken(table, Head()) for _ in range(500)} == {"all"}


@pytest.mark.parametrize(
    ("match", "rewrite", "target", "asked"),
    [
        (Match(path_prefix="/api"), "/", "/api/users?x=/api", "/users?x=/api"),
        (Match(path_prefix="/api/"), "/", "/api/users", "/users"),
        (Match(path_prefix="/api/"), "/v2", "/api/users", "/v2/users"),
        (Match(path_prefix="/api"), "/v2/", "/api/users", "/v2/users"),
        (Match(path_prefix="/api"), "/v2", "/api", "/v2"),
        (Match(path_prefix="/"), "/v2", "/", "/v2"),
        (Match(path_exact="/old"), "/new", "/old?a=1", "/new?a=1"),
        (Match(path_prefix="/api", case_insensitive=True), "/v2", "/API/x", "/v2/x"),
        (Match(path_prefix="/api"), "", "/api/x", "/api/x"),
    ],
)
def test_a_prefix_is_rewritten(match: Match, rewrite: str, target: str, asked: str) -> None:
    nodes: dict[str, Node] = {"r": RouterNode((Route(match, "t", prefix_rewrite=rewrite),)), "t": ResolverNode("t")}
    table = Routing(
        Plan("web", "http", "r", nodes, {"t": Target("t", "web")}), {"t": Balancer(lambda: 0.5)}, lambda: 0.5
    )
    way = table.request(Head(target))
    assert way.target(target.encode()) == asked.encode()


_NAMES = st.sampled_from(["X-A", "x-b", "Accept", "x-C"])
_PAIRS = st.dictionaries(_NAMES, st.sampled_from(["1", "two"]), max_size=3)


@given(st.lists(st.tuples(_NAMES, st.sampled_from(["0", "old"]))), _PAIRS, _PAIRS, st.lists(_NAMES, max_size=2))
def test_headers_are_removed_set_and_added(
    given_: list[tuple[str, str]], add: dict[str, str], to: dict[str, str], remove: list[str]
) -> None:
    fields = [(name.lower().encode(), value.encode()) for name, value in given_]
    lines = [f"{name}: {value}".encode() for name, value in given_]
    before = (list(fields), list(lines))
    after, wire = change_lines(fields, lines, [HeaderChange(add, to, tuple(remove))])
    assert (fields, lines) == before
    gone = {name.lower() for name in (*remove, *to)}
    kept = [(name.lower(), value) for name, value in given_ if name.lower() not in gone]
    wanted = [*kept, *((n.lower(), v) for n, v in to.items()), *((n.lower(), v) for n, v in add.items())]
    assert [(name.decode(), value.decode()) for name, value in after] == wanted
    assert [line.decode().lower() for line in wire] == [f"{name}: {value}" for name, value in wanted]


def test_what_a_request_is_hashed_by() -> None:
    def hashed(head: Head, *policies: HashPolicy) -> int | None:
        return hash_request(policies, head, "10.0.0.9", lambda: 0.25)[0]

    header, query = HashPolicy("header", "X-User", terminal=True), HashPolicy("query_parameter", "u")
    assert hashed(Head(), header) is None
    assert hashed(Head(x_user="a"), header) == hashed(Head("/other", x_user="a"), header)
    assert hashed(Head(x_user="a"), header) != hashed(Head(x_user="b"), header)
    # Terminal: what comes after a value that was found is not looked at, and is when there was none.
    assert hashed(Head("/?u=1", x_user="a"), header, query) == hashed(Head("/?u=2", x_user="a"), header, query)
    assert hashed(Head("/?u=1"), header, query) != hashed(Head("/?u=2"), header, query)
    assert hashed(Head(), HashPolicy(source_ip=True)) is not None
    cookie = HashPolicy("cookie", "sid", cookie_session=True, cookie_path="/x")
    assert hashed(Head(cookie='a=1; sid="k"'), cookie) == hashed(Head(cookie="sid=k; b=2"), cookie)
    assert hashed(Head(cookie="sid=k ; b=2"), cookie) == hashed(Head(cookie="sid=k"), cookie)
    _, (made,) = hash_request([cookie], Head(cookie="other=1"), "", lambda: 0.25)
    name, rest = made.split("=", 1)
    assert (name, rest.split("; ", 1)[1]) == ("sid", "Path=/x; HttpOnly")
    assert hash_request([HashPolicy("cookie", "sid")], Head(), "", lambda: 0.25) == (None, ())
    # Who gets several cookies at once must keep all of them, or its next request would be hashed otherwise.
    brief = HashPolicy("cookie", "brief", cookie_ttl_s=0.25)
    given, cookies = hash_request([cookie, brief], Head(), "", iter((0.1, 0.2, 0.3, 0.4)).__next__)
    assert [text.partition("=")[0] for text in cookies] == ["sid", "brief"]
    assert "Max-Age=1;" in cookies[1], "an age of 0 would take the cookie away"
    assert hashed(Head(cookie="; ".join(text.partition(";")[0] for text in cookies)), cookie, brief) == given
