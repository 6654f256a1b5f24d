"""Access control's rows: links, the builtin ones, the first token, and what a secret comes to."""

from __future__ import annotations

import msgspec
import pytest

from raftstate.model.acl import ANONYMOUS_ID, MANAGEMENT_ID, NodeIdentity, Policy, Role, ServiceIdentity, Token
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from tests.unit.support_state import Log

SECRET = "ab" * 32


def test_a_secret_comes_to_the_rules_of_its_policies_and_roles() -> None:
    log = Log()
    log.do(c.UpsertPolicy(Policy("p1", "kv-read", rules='key_prefix "" { policy = "read" }')))
    log.do(c.UpsertPolicy(Policy("p2", "elsewhere", rules='operator = "read"', datacenters=("dc9",))))
    log.do(c.UpsertRole(Role("r1", "web", policies=("p1", "p2"), service_identities=(ServiceIdentity("web"),))))
    identity = NodeIdentity("n1", "dc1")
    log.do(c.UpsertToken(Token("t1", SECRET, roles=("r1",), policies=("p1",), node_identities=(identity,))))
    grants = log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1").value
    assert grants.rules == ('key_prefix "" { policy = "read" }',)
    assert [one.service_name for one in grants.service_identities] == ["web"]
    assert [one.node_name for one in grants.node_identities] == ["n1"]
    assert log.ask("acl.resolve", secret_hash="0" * 64).value is None
    before = log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1")
    assert log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1").value is before.value, "remembered"
    log.do(c.DeletePolicy("p1"))
    after = log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1")
    assert after.value.rules == ()
    assert after.index > before.index
    log.do(c.DeleteRole("r1"))
    assert log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1").value.service_identities == ()
    log.do(c.DeleteToken("t1"))
    assert log.ask("acl.resolve", secret_hash=SECRET, datacenter="dc1").value is None


def test_a_token_is_looked_at_anew_only_when_one_of_its_own_rows_changes() -> None:
    log = Log()
    for name in ("a", "b"):
        log.do(c.UpsertPolicy(Policy(f"p-{name}", f"policy-{name}")))
        log.do(c.UpsertRole(Role(f"r-{name}", f"role-{name}", policies=(f"p-{name}",))))
    log.do(c.UpsertToken(Token("t", SECRET, roles=("r-a",))))

    def index() -> int:
        answer = log.ask("acl.resolve", secret_hash=SECRET)
        assert ("token-secret", SECRET) in answer.watch
        return answer.index

    def changes(command: c.Command) -> bool:
        before, watch = index(), set(log.ask("acl.resolve", secret_hash=SECRET).watch)
        applied = log.apply(command)
        assert applied.refusal is None
        woken = bool(applied.touched & watch)
        assert (index() > before) == woken, "whoever is woken finds something newer, and nobody else does"
        return woken

    assert not changes(c.UpsertPolicy(Policy("p-b", "policy-b", rules="# other")))
    assert not changes(c.UpsertToken(Token("other", "cd" * 32, roles=("r-b",))))
    assert changes(c.UpsertPolicy(Policy("p-a", "policy-a", rules='operator = "read"')))
    assert changes(c.UpsertRole(Role("r-a", "role-a", policies=("p-a", "p-b"))))
    assert changes(c.DeletePolicy("p-b"))
    assert changes(c.DeleteRole("r-a"))
    assert not changes(c.DeletePolicy("p-a"))
    assert changes(c.UpsertToken(Token("t", SECRET, policies=())))
    assert changes(c.DeleteToken("t"))
    assert changes(c.UpsertToken(Token("again", SECRET)))


def test_without_a_secret_one_is_anonymous() -> None:
    log = Log()
    assert log.ask("acl.resolve").value.accessor_id == ANONYMOUS_ID
    assert log.ask("acl.token", accessor_id=ANONYMOUS_ID).value.description == "Anonymous Token"
    log.do(c.UpsertPolicy(Policy("p", "p", rules='node_prefix "" { policy = "read" }')))
    assert log.do(c.UpsertToken(Token(ANONYMOUS_ID, "", policies=("p",)))) is True
    assert log.ask("acl.resolve").value.rules == ('node_prefix "" { policy = "read" }',)
    assert log.refused(c.DeleteToken(ANONYMOUS_ID))[0] == "invalid"
    assert log.refused(c.UpsertToken(Token(ANONYMOUS_ID, SECRET)))[0] == "invalid", "it has no secret"
    assert log.refused(c.UpsertToken(Token("other", "")))[0] == "invalid", "every other one has"


def test_the_builtin_policies_are_there_and_stay() -> None:
    log = Log()
    assert [row.name for row in log.ask("acl.policies").value] == ["builtin/global-read-only", "global-management"]
    assert log.ask("acl.policy", name="global-management").value.id == MANAGEMENT_ID
    assert log.refused(c.DeletePolicy(MANAGEMENT_ID))[0] == "invalid"
    assert log.refused(c.UpsertPolicy(Policy(MANAGEMENT_ID, "mine")))[0] == "invalid"
    assert log.refused(c.UpsertPolicy(Policy("mine", "global-management")))[0] == "conflict"


@pytest.mark.parametrize(
    "command",
    [
        c.UpsertToken(Token("t", SECRET, policies=("missing",))),
        c.UpsertToken(Token("t", SECRET, roles=("missing",))),
        c.UpsertToken(Token("t", SECRET, service_identities=(ServiceIdentity("a/b"),))),
        c.UpsertToken(Token("t", SECRET, policies=tuple(str(i) for i in range(300)))),
        c.UpsertRole(Role("r", "r", policies=("missing",))),
        c.UpsertRole(Role("r", "no spaces")),
        c.UpsertPolicy(Policy("p", "no/slashes")),
        c.UpsertPolicy(Policy("p", "")),
        c.UpsertPolicy(Policy("p", "p", rules="x" * 70_000)),
    ],
)
def test_what_is_not_sound_is_refused(command: c.Command) -> None:
    log = Log()
    assert log.refused(command)[0] == "invalid"


def test_a_change_by_an_old_index_does_not_bring_a_deleted_token_back() -> None:
    log = Log()
    log.do(c.UpsertToken(Token("t", SECRET)))
    held = log.ask("acl.token", accessor_id="t").value
    log.do(c.DeleteToken("t"))
    changed = msgspec.structs.replace(held, description="new")
    assert log.do(c.UpsertToken(changed, cas_index=held.modify_index)) is False
    assert log.ask("acl.token", accessor_id="t").value is None
    assert log.do(c.UpsertToken(changed, cas_index=0)) is True


def test_the_first_token_is_made_once() -> None:
    log = Log()
    assert log.ask("acl.bootstrap").value is None
    assert log.do(c.BootstrapACL(Token("a", SECRET, policies=(MANAGEMENT_ID,)))) is True
    reset = log.ask("acl.bootstrap").value.modify_index
    again = Token("b", "cd" * 32, policies=(MANAGEMENT_ID,))
    assert log.do(c.BootstrapACL(again)) is False
    assert log.do(c.BootstrapACL(again, reset_index=reset)) is True
    third = Token("c", "ef" * 32, policies=(MANAGEMENT_ID,))
    assert log.do(c.BootstrapACL(third, reset_index=reset)) is False, "an index is good for one reset"


def test_a_snapshot_carries_all_of_it() -> None:
    log = Log()
    log.do(c.UpsertPolicy(Policy("p", "p", rules='node_prefix "" { policy = "read" }')))
    log.do(c.UpsertRole(Role("r", "r", policies=("p",), node_identities=(NodeIdentity("n"),))))
    log.do(c.BootstrapACL(Token("t", SECRET, roles=("r",), description="first")))
    with log.machine.snapshot() as snapshot:
        chunks = list(snapshot)
    other = StateMachine()
    other.restore(chunks)
    assert other.digest() == log.machine.digest()
    assert other.store.acl_roles.by_name["r"].policies == ("p",)
    assert other.store.tokens.by_secret_hash[SECRET].description == "first"


def test_a_token_that_an_older_version_wrote_is_read() -> None:
    """Its row in a snapshot, and its command in a journal, had no links."""
    old = {"AccessorID": "t", "SecretHash": SECRET, "Document": {}, "CreateTime": "", "ExpirationTime": ""}
    data = msgspec.msgpack.encode(("1", "2030-01-01T00:00:00+00:00", ("UpsertToken", old, False)))
    command = c.decode_envelope(data).command
    assert isinstance(command, c.UpsertToken)
    assert (command.token.policies, command.cas_index) == ((), None)
