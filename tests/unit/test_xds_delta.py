"""What an xDS subscriber is sent, in the delta form."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from node.xds import messages, types
from node.xds.delta import NAMES_MAX, PENDING_MAX, TYPES_MAX, Subscriber, TooMuch
from node.xds.session import AGAIN_S, READY_S, TROUBLE_MAX, Session
from node.xds.snapshot import Snapshot
from raftstate.model.connect import Revocation
from raftstate.model.intention import HTTPMatch, Intention, Permission
from raftstate.model.sidecar import SidecarUpdate
from tests.support.xds import make_snapshot, upstream

URL = types.ENDPOINTS
ALLOW = Intention("web", "backend", action="allow")


def test_named_resources_are_sent_once_and_again_when_they_change() -> None:
    one = Subscriber()
    assert one.push(URL, {"a": "1"}) is None
    one.request(URL, ["a", "b"], [], {})
    push = one.push(URL, {"a": "1", "c": "1"})
    assert push is not None
    assert (push.send, push.removed) == (("a",), ("b",))  # b is told to be absent
    assert one.push(URL, {"a": "1", "c": "1"}) is None
    push = one.push(URL, {"a": "2", "b": "1"})
    assert push is not None
    assert (sorted(push.send), push.removed) == (["a", "b"], ())
    one.request(URL, [], ["a"], {})
    push = one.push(URL, {})
    assert push is not None
    assert (push.send, push.removed) == ((), ("b",))


def test_wildcard_gets_all_and_what_it_has_is_not_sent_again() -> None:
    one = Subscriber()
    one.request(URL, [], [], {"a": "1", "gone": "1"})
    push = one.push(URL, {"a": "1", "b": "1"})
    assert push is not None
    assert (push.send, push.removed) == (("b",), ("gone",))
    verdict = one.answered(URL, push.nonce, accepted=False)
    assert verdict is not None
    assert verdict.names == ("b",)
    assert one.answered(URL, push.nonce, accepted=True) is None
    assert one.push(URL, {"a": "1", "b": "1"}) is None  # a refused version is not sent again


def test_an_empty_wildcard_is_answered_once() -> None:
    one = Subscriber()
    one.request(URL, [], [], {})
    push = one.push(URL, {})
    assert push is not None
    assert push.send == ()
    assert one.push(URL, {}) is None


def whole(snapshot: Snapshot) -> SidecarUpdate:
    return SidecarUpdate(version=1, **msgspec.structs.asdict(snapshot))


def request(url: str, *names: str, **more: Any) -> Any:
    return messages.DeltaRequest(type_url=url, resource_names_subscribe=names, **more)


def sent(session: Session) -> dict[str, list[str]]:
    return {one.type_url: [row.name for row in one.resources] for one in session.responses()}


def taken(session: Session) -> dict[str, list[str]]:
    """Return what is sent, in order, to an Envoy that takes everything."""
    found: dict[str, list[str]] = {}
    while responses := session.responses():
        for one in responses:
            found.setdefault(one.type_url, []).extend(row.name for row in one.resources)
            session.request(messages.DeltaRequest(type_url=one.type_url, response_nonce=one.nonce))
    return found


def test_every_resource_is_a_message_that_envoy_knows() -> None:
    l7 = Intention("web", "backend", permissions=(Permission("allow", HTTPMatch(path_prefix="/", methods=("GET",))),))
    revoked = (Revocation("serial", "01:02"), Revocation("instance", "i"))
    upstreams = (upstream("db", "tcp", "db-1"), upstream("api", "http", "api-1", "api-2"))
    for intention in (ALLOW, l7):
        session = Session("backend-1-sidecar-proxy")
        for url in types.PUSH_ORDER:
            session.request(request(url, "*"))
        assert session.responses() == []
        assert session.update(whole(make_snapshot(intention, revocations=revoked, upstreams=upstreams)))
        names = taken(session)
        assert list(names) == list(types.PUSH_ORDER)
        assert sorted(names[types.LISTENER]) == ["public", "upstream:api", "upstream:db"]
        assert names[types.ROUTES] == ["upstream:api"]


def public(session: Session, initial: dict[str, str] | None = None) -> tuple[str, set[str]]:
    """Ask for listeners; return what is sent of the public one: its version and the names of its filter chains."""
    session.request(request(types.LISTENER, initial_resource_versions=initial or {}))
    return sent_public(session)


def sent_public(session: Session) -> tuple[str, set[str]]:
    rows = [row for one in session.responses() for row in one.resources if row.name == types.PUBLIC_LISTENER]
    if not rows:
        return "", set()
    listener = messages.listener_pb2.Listener.FromString(rows[0].resource.value)
    return rows[0].version, {chain.name for chain in listener.filter_chains}


def test_a_withdrawal_replaces_filter_chains_and_a_grant_does_not() -> None:
    session = Session("x")
    session.update(whole(make_snapshot()))
    _, before = public(session)
    session.update(SidecarUpdate(version=2, intentions=(ALLOW,)))
    _, granted = sent_public(session)
    assert before < granted
    session.update(SidecarUpdate(version=3, intentions=()))
    session.update(SidecarUpdate(version=4, intentions=(ALLOW,)))
    _, after = sent_public(session)
    assert len(after) == len(granted)
    assert not after & granted, "though what is allowed now is what was allowed before"


def test_an_agents_restart_disturbs_nothing_unless_something_was_withdrawn_meanwhile() -> None:
    session = Session("x")
    session.update(whole(make_snapshot(ALLOW)))
    session.update(SidecarUpdate(version=2, intentions=()))
    session.update(SidecarUpdate(version=3, intentions=(ALLOW,)))
    version, chains = public(session)
    for intentions in ((ALLOW,), ()):
        for early in (True, False):  # the sidecar's update may come before Envoy's request or after it
            again = Session("x")
            if early:
                again.update(whole(make_snapshot(*intentions)))
            again.request(request(types.LISTENER, initial_resource_versions={types.PUBLIC_LISTENER: version}))
            if not early:
                again.update(whole(make_snapshot(*intentions)))
            _, now = sent_public(again)
            if intentions:
                assert now == set()
            else:
                assert now
                assert not now & chains


def test_a_refusal_is_logged_with_envoys_words(caplog: pytest.LogCaptureFixture) -> None:
    session = Session("backend-1-sidecar-proxy")
    session.request(request(types.CLUSTER))
    session.update(whole(make_snapshot()))
    (response,) = session.responses()
    refusal = messages.DeltaRequest(type_url=types.CLUSTER, response_nonce=response.nonce)
    refusal.error_detail.message = "no such thing"
    with caplog.at_level(logging.ERROR, "lictor.xds"):
        session.request(refusal)
    assert "refuses Cluster local_app, upstream:db" in caplog.text
    assert "no such thing" in caplog.text
    assert session.responses() == []
    assert session.refused == 2


def test_a_cluster_that_changes_is_told_its_instances_again() -> None:
    """Envoy awaits them before the new cluster takes the old one's place, and does not ask for them anew."""
    session = Session("x")
    session.update(whole(make_snapshot(upstreams=(upstream("db", "tcp", "db-1"), upstream("api", "tcp", "api-1")))))
    for url in types.PUSH_ORDER:
        session.request(request(url, *(["upstream:db", "upstream:api"] if url == types.ENDPOINTS else [])))
    session.responses()
    changed = msgspec.structs.replace(upstream("db", "tcp", "db-1"), config={"connect_timeout_ms": 1234})
    session.update(SidecarUpdate(version=2, upstreams=(changed, upstream("api", "tcp", "api-1"))))
    assert sent(session) == {types.CLUSTER: ["upstream:db"], types.ENDPOINTS: ["upstream:db"]}
    assert session.responses() == []


def test_what_cannot_be_told_holds_nothing_else_up(caplog: pytest.LogCaptureFixture) -> None:
    """One instance with a port that is none ended the stream, again and again: no withdrawal came any more."""
    session = Session("backend-1-sidecar-proxy")
    bad = upstream("db", "tcp", "db-1")
    bad = msgspec.structs.replace(bad, endpoints=(msgspec.structs.replace(bad.endpoints[0], port=-1),))
    session.update(whole(make_snapshot(upstreams=(bad, upstream("api", "tcp", "api-1")))))
    for url in types.PUSH_ORDER:
        session.request(request(url, *(["upstream:db", "upstream:api"] if url == types.ENDPOINTS else [])))
    with caplog.at_level(logging.ERROR, "lictor.xds"):
        names = taken(session)
    assert names[types.ENDPOINTS] == ["upstream:api"]
    assert types.PUBLIC_LISTENER in names[types.LISTENER]
    assert "ClusterLoadAssignment upstream:db" in caplog.text
    assert session.refused == 1
    assert session.responses() == []
    assert session.trouble.startswith("ClusterLoadAssignment upstream:db: it cannot be told"), "Envoy took the rest"


@pytest.mark.parametrize(
    "config",
    [
        {"connect_timeout_ms": 1e18, "slow_start_ms": 1e18, "failures_to_eject": 1e30},
        {"connect_timeout_ms": float("inf")},
        {"passive_health_check": {"interval": 10**30, "max_failures": 10**20, "base_ejection_time": 10**40}},
    ],
)
def test_numbers_beyond_all_measure_are_told_as_the_largest(config: dict[str, object]) -> None:
    session = Session("x")
    whom = upstream("db", "tcp", "db-1")
    heavy = msgspec.structs.replace(whom.endpoints[0], weight=2**40)
    session.update(
        whole(make_snapshot(upstreams=(msgspec.structs.replace(whom, config=config, endpoints=(heavy,)),)))
    )
    for url in types.PUSH_ORDER:
        session.request(request(url, *(["upstream:db"] if url == types.ENDPOINTS else [])))
    assert {"upstream:db"} <= set(sent(session)[types.CLUSTER])
    assert session.refused == 0


def test_what_is_used_comes_before_what_uses_it_and_goes_after() -> None:
    """Calls were lost while a listener led to a cluster that was not made yet, or that had gone already."""

    def said(session: Session) -> list[tuple[str, list[str], list[str]]]:
        found = []
        for one in session.responses():
            found.append(
                (one.type_url.rpartition(".")[2], [row.name for row in one.resources], [*one.removed_resources])
            )
            session.request(messages.DeltaRequest(type_url=one.type_url, response_nonce=one.nonce))
        return found

    clock = [0.0]
    session = Session("x", clock=lambda: clock[0])
    session.update(whole(make_snapshot(upstreams=(upstream("db", "tcp", "db-1"),))))
    for url in types.PUSH_ORDER:
        session.request(request(url, *(["upstream:db"] if url == types.ENDPOINTS else [])))
    assert "Listener" not in [kind for kind, _, _ in said(session)], "not before Envoy has the clusters' instances"
    assert said(session) == [("Listener", ["public", "upstream:db"], []), ("RouteConfiguration", [], [])]
    assert said(session) == []
    session.update(SidecarUpdate(version=2, upstreams=(upstream("api", "tcp", "api-1"),), intentions=(ALLOW,)))
    first = said(session)
    assert [kind for kind, _, _ in first] == ["Cluster", "Secret", "TypedExtensionConfig", "Listener"]
    assert first[0] == ("Cluster", ["upstream:api"], []), "the other one is in use still"
    assert first[-1] == ("Listener", ["public"], ["upstream:db"]), "who may come does not wait for where calls go"
    assert said(session) == [], "Envoy has not asked for the instances yet"
    session.request(messages.DeltaRequest(type_url=types.ENDPOINTS, resource_names_subscribe=["upstream:api"]))
    assert said(session) == [("ClusterLoadAssignment", ["upstream:api"], [])]
    assert said(session) == [("Listener", ["upstream:api"], [])]
    assert said(session) == [("Cluster", [], ["upstream:db"]), ("ClusterLoadAssignment", [], ["upstream:db"])]
    assert said(session) == []
    session.update(SidecarUpdate(version=3, upstreams=(upstream("mail", "tcp", "mail-1"),)))
    said(session)
    assert session.settle_at == clock[0] + READY_S
    clock[0] += READY_S
    assert ("Listener", ["upstream:mail"], []) in said(session), "an Envoy that never asks is not waited for"


def test_what_envoy_does_not_take_is_known_until_it_takes_it_or_it_is_no_more() -> None:
    clock = [0.0]
    session = Session("x", clock=lambda: clock[0])
    session.update(whole(make_snapshot()))

    def answer(words: str = "") -> None:
        for one in session.responses():
            said = messages.DeltaRequest(type_url=one.type_url, response_nonce=one.nonce)
            if words:
                said.error_detail.message = words
            session.request(said)

    session.request(request(types.CLUSTER))
    assert session.trouble == ""
    answer("no " + "x" * 10_000)
    assert session.trouble.startswith("Cluster local_app, Cluster upstream:db: no xxx")
    assert len(session.trouble) <= TROUBLE_MAX
    changed = msgspec.structs.replace(upstream(), config={"connect_timeout_ms": 9})
    session.update(SidecarUpdate(version=2, upstreams=(changed,)))
    answer()
    assert session.trouble.startswith("Cluster local_app: no")
    session.update(SidecarUpdate(version=3, upstreams=(upstream(),)))
    answer("again")
    session.update(SidecarUpdate(version=4, upstreams=()))
    answer()
    assert "again" not in session.trouble
    assert session.responses() == []
    clock[0] += AGAIN_S
    assert session.settle_at == clock[0]
    session.settle()
    answer()
    assert session.trouble == "", "it may be taken at another time"
    assert session.settle_at is None


def test_a_refusal_that_names_a_resource_is_that_resources() -> None:
    session = Session("x")
    session.update(whole(make_snapshot()))
    session.request(request(types.CLUSTER))
    (response,) = session.responses()
    said = messages.DeltaRequest(type_url=types.CLUSTER, response_nonce=response.nonce)
    said.error_detail.message = "Error adding/updating cluster(s) upstream:db: why not"
    session.request(said)
    assert session.trouble.startswith("Cluster upstream:db: Error")


def test_what_one_subscriber_may_ask_for_is_bound() -> None:
    subscriber = Subscriber()
    names = [str(n) for n in range(NAMES_MAX)]
    subscriber.request(URL, names, [], {})
    with pytest.raises(TooMuch):
        subscriber.request(URL, ["one more"], [], {})
    with pytest.raises(TooMuch):
        Subscriber().request(URL, [*names, "one more"], [], {})
    with pytest.raises(TooMuch):
        Subscriber().request(URL, [], [], {**dict.fromkeys(names, ""), "one more": ""})
    many = Subscriber()
    for n in range(TYPES_MAX):
        many.request(f"type-{n}", [], [], {})
    with pytest.raises(TooMuch):
        many.request("one more", [], [], {})
    silent = Subscriber()
    silent.request(URL, [], [], {})
    pushes = [silent.push(URL, {"a": str(n)}) for n in range(PENDING_MAX + 1)]
    nonces = [one.nonce for one in pushes if one is not None]
    assert silent.answered(URL, nonces[0], accepted=True) is None, (
        "of one that answers nothing, the oldest are forgotten"
    )
    assert silent.answered(URL, nonces[-1], accepted=True) is not None


def test_what_a_later_refusal_does_not_name_was_taken() -> None:
    session = Session("x")
    session.update(whole(make_snapshot()))
    session.request(request(types.CLUSTER))
    for words in ("neither", "upstream:db: why not"):
        for name in ("local_app", "upstream:db"):
            session._subscriber.again(types.CLUSTER, [name])
        (response,) = session.responses()
        said = messages.DeltaRequest(type_url=types.CLUSTER, response_nonce=response.nonce)
        said.error_detail.message = words
        session.request(said)
    assert session.trouble == "Cluster upstream:db: upstream:db: why not"


def test_what_is_there_anew_is_not_taken_for_refused() -> None:
    session = Session("x")
    session.update(whole(make_snapshot()))
    session.request(request(types.CLUSTER))
    (response,) = session.responses()
    said = messages.DeltaRequest(type_url=types.CLUSTER, response_nonce=response.nonce)
    said.error_detail.message = "upstream:db: why not"
    session.request(said)
    session.update(SidecarUpdate(version=2, upstreams=()))
    taken(session)
    session.update(SidecarUpdate(version=3, upstreams=(upstream(),)))
    assert session.responses()
    assert session.trouble == ""


def test_what_is_to_be_sent_again_and_goes_meanwhile_is_taken_away() -> None:
    """Envoy would have kept it for ever: a listener that was refused once, and led to a cluster that was awaited."""
    one = Subscriber()
    one.request(URL, [], [], {})
    push = one.push(URL, {"a": "1"})
    assert push is not None
    one.again(URL, ["a", "b"])
    assert one.push(URL, {"a": "1"}, hold={"a"}) is None
    push = one.push(URL, {})
    assert push is not None
    assert (push.send, push.removed) == ((), ("a",))
