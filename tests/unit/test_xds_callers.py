"""Whom an Envoy tells apart, and whose filter chains a change renames: of those from whom something was taken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.xds import messages, types
from node.xds.callers import CHAINS_MAX, EVERYONE_ELSE, GONE_MAX, Caller, Chains, Verdicts
from node.xds.resources import resources
from node.xds.session import Session
from node.xds.snapshot import Snapshot
from node.xds.ways import Ways
from proxy.authz import compile_policy
from raftstate.model.caller_name import caller_name
from raftstate.model.connect import Revocation
from raftstate.model.identity import Identity
from raftstate.model.intention import HTTPMatch, Intention, Permission
from raftstate.model.sidecar import SidecarUpdate
from tests.support.xds import make_snapshot, upstream

WEB, API = Intention("web", "backend", action="allow"), Intention("api", "backend", action="allow")
ANYONE = Intention("*", "backend", action="allow")
KNOWN = {"web": ("web-1", "web-2"), "api": ("api-1",)}


def by_path(*prefixes: str) -> Intention:
    return Intention(
        "web", "backend", permissions=tuple(Permission("allow", HTTPMatch(path_prefix=one)) for one in prefixes)
    )


class Told:
    """Chains that follow snapshots of these intentions and more."""

    def __init__(self, *intentions: Intention, **more: Any) -> None:
        self.chains = Chains()
        self.now(*intentions, **more)

    def now(self, *intentions: Intention, **more: Any) -> set[str]:
        """Take what holds now; return the callers of the chains that were renamed or have gone."""
        before = dict(self.chains.all())
        known = {"instances": more.pop("instances", KNOWN), "services": more.pop("services", ())}
        self.chains.follow(Verdicts(make_snapshot(*intentions, **more)), **known)
        after = dict(self.chains.all())
        return {":".join(one) for one, generation in before.items() if after.get(one) != generation}


def test_a_withdrawal_renames_the_chains_of_whom_it_concerns_and_no_other() -> None:
    told = Told(WEB, API)
    named = [("web", ""), ("web", "web-1"), ("web", "web-2"), ("api", ""), ("api", "api-1")]
    assert {one.caller for one in told.chains.all()} == {EVERYONE_ELSE, *(Caller(*one) for one in named)}
    assert told.now(WEB, API, Intention("cron", "backend", action="allow")) == set()
    assert told.now(WEB, API) == {":", "cron:"}
    assert told.now(WEB) == {":", "api:", "api:api-1"}
    one = Intention("web-1", "backend", source_service="web", action="deny")
    assert told.now(WEB, one) == {":", "web:", "web:web-1"}
    assert told.now(WEB) == set()


@pytest.mark.parametrize(
    ("revocation", "ended"),
    [
        (Revocation("instance", "web-1", service="web"), {":", "web:", "web:web-1"}),
        (Revocation("instance", "web-2"), {":", "web:", "web:web-2", "api:"}),
        (Revocation("service", "web"), {":", "web:", "web:web-1", "web:web-2"}),
        (Revocation("serial", "0a"), {":", "web:", "web:web-1", "web:web-2", "api:", "api:api-1"}),
    ],
)
def test_a_revocation_renames_the_chains_that_may_hold_the_identity(revocation: Revocation, ended: set[str]) -> None:
    told = Told(WEB, API)
    assert told.now(WEB, API, revocations=(revocation,)) == ended
    assert told.now(WEB, API) == set(), "a restored identity disturbs nobody"


def test_only_less_than_before_is_a_withdrawal() -> None:
    told = Told(by_path("/a"), API)
    assert told.now(by_path("/a", "/b"), API) == set()
    assert told.now(WEB, API) == set(), "everything is more than some paths"
    assert told.now(by_path("/a"), API) == {":", "web:", "web:web-1", "web:web-2"}
    assert told.now(by_path("/a"), API, roots=("ROOT", "NEW")) == set()
    assert len(told.now(by_path("/a"), API, roots=("NEW",))) == 6


def test_where_anyone_may_come_the_services_that_there_are_are_told_apart() -> None:
    told = Told(ANYONE, services=("web", "cron"))
    assert told.now(ANYONE, services=("web", "cron", "new")) == set()
    assert told.now(ANYONE, Intention("cron", "backend", action="deny"), services=("web", "cron", "new")) == {
        ":",
        "cron:",
    }


def test_an_instance_that_is_gone_keeps_its_chain_for_a_while() -> None:
    """Its agent may have restarted, and its calls go on."""
    told = Told(WEB)
    assert told.now(WEB, instances={"web": ("web-2",)}) == set()
    many = {"web": tuple(f"w{n:04}" for n in range(2 * CHAINS_MAX))}
    told.now(WEB, instances=many)
    assert len(told.chains.all()) == CHAINS_MAX
    told = Told(WEB, instances={"web": tuple(f"w{n:04}" for n in range(100))})
    told.now(WEB, instances={"web": ()})
    assert len(told.chains.all()) == GONE_MAX + 2
    assert told.now(WEB, instances={}) == set(), "what is not known yet has not gone"


def test_a_revocation_ends_calls_though_nothing_is_said_of_the_service_any_more() -> None:
    """Of an instance of whatever service, in the same update that takes away the intention that names its own."""
    told = Told(WEB)
    revoked = Revocation("instance", "web-1")
    assert told.now(revocations=(revoked,), default_allow=True) >= {":", "web:", "web:web-1"}


def test_a_caller_that_was_denied_in_between_does_not_get_its_old_chain_back() -> None:
    told = Told(WEB, API)
    before = dict(told.chains.all())[Caller("web", "web-1")]
    told.now(API)
    told.now(WEB, API)
    assert dict(told.chains.all())[Caller("web", "web-1")] != before


INTENTIONS = st.lists(
    st.builds(
        Intention,
        st.sampled_from(["*", "web", "api"]),
        st.sampled_from(["*", "backend", "db"]),
        action=st.sampled_from(["allow", "deny"]),
    ),
    max_size=5,
    unique_by=lambda one: (one.source_name, one.destination_name),
)
REVOKED = st.lists(
    st.sampled_from(
        [
            Revocation("service", "web"),
            Revocation("instance", "web-1"),
            Revocation("instance", "api-1", service="api"),
        ]
    ),
    unique=True,
)


@settings(deadline=None, max_examples=200)
@given(INTENTIONS, INTENTIONS, REVOKED, REVOKED, st.booleans(), st.booleans())
def test_whoever_is_refused_from_now_on_loses_every_chain_it_may_be_in(
    before: list[Intention],
    after: list[Intention],
    was: list[Revocation],
    revoked: list[Revocation],
    open1: bool,
    open2: bool,
) -> None:
    told = Told(*before, revocations=tuple(was), default_allow=open1, services=("web", "api"))
    held = {":".join(one.caller) for one in told.chains.all()}
    renamed = told.now(*after, revocations=tuple(revoked), default_allow=open2, services=("web", "api"))
    for service, instance in [
        ("web", "web-1"),
        ("web", "web-2"),
        ("web", "web-9"),
        ("api", "api-1"),
        ("new", "new-1"),
    ]:
        me = Identity(service, instance)

        def may(intentions: list[Intention], gone: list[Revocation], default: bool, me: Identity = me) -> bool:
            names = {(one.kind, one.value) for one in gone}
            if ("service", me.service) in names or ("instance", me.instance) in names:
                return False
            return compile_policy(intentions, default).decide(me, "backend", "backend-1").allowed

        if may(before, was, open1) and not may(after, revoked, open2):
            assert {":", f"{service}:", f"{service}:{instance}"} & held <= renamed
        elif may(after, revoked, open2) and f"{service}:{instance}" in held:
            assert f"{service}:{instance}" not in renamed, "who is still allowed is left alone"


def stream(*intentions: Intention) -> tuple[Session, Any]:
    """Return a session that has taken these, and how it is told of others."""
    session = Session("backend-1-sidecar-proxy")

    def take(*intentions: Intention) -> None:
        whole = make_snapshot(*intentions)
        session.update(SidecarUpdate(1, **{name: getattr(whole, name) for name in Snapshot.__struct_fields__}))

    take(*intentions)
    return session, take


def listeners(session: Session, initial: dict[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """Ask for listeners; return the versions that are sent and the names of the public one's chains."""
    session.request(messages.DeltaRequest(type_url=types.LISTENER, initial_resource_versions=initial or {}))
    sent = [one for push in session.responses() if push.type_url == types.LISTENER for one in push.resources]
    chains: list[str] = []
    for one in sent:
        if one.name == types.PUBLIC_LISTENER:
            listener = messages.listener_pb2.Listener.FromString(one.resource.value)
            chains = [chain.name for chain in listener.filter_chains]
    return {one.name: one.version for one in sent}, chains


def test_a_new_stream_goes_on_from_the_chains_that_envoy_has() -> None:
    first, take = stream(WEB, API)
    first.know(KNOWN, ())
    take(WEB)
    take(WEB, API)
    had, chains = listeners(first)
    assert "api:api-1 #2" in chains
    assert "web:web-1 #0" in chains
    again, _ = stream(WEB, API)
    assert listeners(again, had)[0] == {}, "nothing is sent, so nothing ends"
    changed, _ = stream(WEB)
    _, chains = listeners(changed, had)
    assert "web:web-1 #0" in chains
    assert not any(one.startswith("api") for one in chains), "what was withdrawn meanwhile ends"


@pytest.mark.parametrize("state", ["", "0", "7.abc", "AAAA", "é", "eJwDAAAAAAE=", "=" * 5000])
def test_a_state_that_is_none_of_ours_is_ignored(state: str) -> None:
    session, _ = stream(WEB)
    sent, chains = listeners(session, {types.PUBLIC_LISTENER: f"{state}|x", "upstream:db": f"{state}|x"})
    assert types.PUBLIC_LISTENER in sent
    assert "web #0" in chains


def test_each_chain_is_found_by_its_callers_name_and_demands_its_certificate() -> None:
    told = Told(WEB)
    found = resources(make_snapshot(WEB), told.chains.all())
    listener = found[types.LISTENER][types.PUBLIC_LISTENER]
    messages.encode(types.LISTENER, listener)
    chains = {one["name"]: one for one in listener["filter_chains"]}
    one = chains["web:web-1 #0"]
    assert one["filter_chain_match"] == {"server_names": [caller_name("web", "web-1")]}
    assert "/svc/web'" in str(one["transport_socket"])
    assert "UID=web-1" in str(one["filters"])
    wide = chains["web #0"]["filter_chain_match"]["server_names"]
    assert wide == ["*." + caller_name("web", "web-1").partition(".")[2]]
    assert "filter_chain_match" not in chains["everyone else #0"]
    assert caller_name("backend", "backend-1") in str(found[types.CLUSTER]["upstream:db"]["transport_socket"])


def test_a_revocation_renames_the_chain_of_the_upstream_that_may_lead_there() -> None:
    ways = Ways()
    two = tuple(msgspec.structs.replace(upstream(name, "tcp", f"{name}-1"), plan=None) for name in ("db", "mail"))

    def generations(*revoked: Revocation) -> list[int]:
        ways.follow(make_snapshot(upstreams=two, revocations=revoked))
        return [ways.generations.get(f"upstream:{name}", 0) for name in ("db", "mail")]

    assert generations() == [0, 0]
    assert generations(Revocation("instance", "db-1")) == [1, 0]
    assert generations(Revocation("instance", "db-1"), Revocation("serial", "0a")) == [1, 0]
    assert generations() == [1, 0]
    assert generations(Revocation("service", "mail")) == [1, 1]
    later, state = Ways(), ways.state("upstream:mail")
    later.resume("upstream:mail", state)
    later.follow(make_snapshot(upstreams=two, revocations=(Revocation("service", "mail"),)))
    assert later.generations["upstream:mail"] == 1
    later.resume("upstream:mail", state)
    later.follow(make_snapshot(upstreams=two, revocations=(Revocation("instance", "mail-1"),)))
    assert later.generations["upstream:mail"] == 2
