"""The authority's rows, revocations, configuration entries, tokens."""

from __future__ import annotations

import inspect

import msgspec

from raftstate.model.acl import Token
from raftstate.model.connect import CARoot
from raftstate.model.intention import Intention
from raftstate.model.wire import to_json
from raftstate.state import commands as c
from raftstate.state.queries import QUERIES
from tests.unit.support_state import Log


def root(id: str) -> CARoot:
    return CARoot(id, f"root {id}", f"PEM of {id}")


def test_of_two_first_roots_one_wins() -> None:
    log = Log()
    assert log.do(c.AddCARoot(root("r1"), b"sealed 1", True, "")) is True
    code, text = log.refused(c.AddCARoot(root("r2"), b"sealed 2", True, ""))
    assert code == "conflict"
    assert "the active root is r1, not none" in text
    assert log.ask("internal.ca_signing_material").value.sealed_key == b"sealed 1"


def test_rotation_keeps_both_roots_until_the_old_is_retired() -> None:
    log = Log()
    log.do(c.SetCAConfig(trust_domain="td.example"))
    log.do(c.AddCARoot(root("r1"), b"sealed 1"))
    log.do(c.AddCARoot(root("r2"), b"sealed 2", True, "r1"))
    roots = log.ask("connect.roots").value
    assert (roots.active_root_id, roots.trust_domain) == ("r2", "td.example")
    assert [(row.id, row.active, row.modify_index) for row in roots.roots] == [("r2", True, 3), ("r1", False, 3)]
    assert log.refused(c.RetireCARoot("r2"))[0] == "conflict"
    assert log.do(c.RetireCARoot("r1")) is True
    assert log.do(c.RetireCARoot("r1")) is False
    assert list(log.machine.store.sealed_keys.rows) == ["r2"]


def test_an_active_root_needs_a_key_and_a_passive_one_does_not() -> None:
    log = Log()
    assert log.refused(c.AddCARoot(root("r1")))[0] == "invalid"
    log.do(c.AddCARoot(root("r1"), make_active=False))
    assert log.ask("internal.ca_signing_material").value is None
    log.do(c.AddCARoot(root("r1"), b"sealed", True))
    assert log.ask("connect.roots").value.active_root_id == "r1"


def test_no_public_query_shows_a_sealed_key() -> None:
    log = Log()
    log.do(c.SetCAConfig(trust_domain="td"))
    log.do(c.AddCARoot(root("r1"), b"sealed-secret"))
    params = {
        "service": "web", "node": "n1", "port": 80, "id": "x", "source": "a", "destination": "b", "by": "source",
        "name": "a", "key": "k", "kind": "k", "reference": "web",
    }  # fmt: skip
    for name, query in QUERIES.items():
        if name == "internal.ca_signing_material":
            continue
        _, *parameters = inspect.signature(query).parameters.values()
        wanted = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
        answer = log.ask(name, **{parameter: params[parameter] for parameter in wanted})
        assert b"sealed-secret" not in to_json(answer.value)
        assert b"c2VhbGVkLXNlY3JldA" not in to_json(answer.value)


def test_the_first_trust_domain_stays_and_cas_holds() -> None:
    log = Log()
    assert log.do(c.SetCAConfig(trust_domain="one", cas_index=0)) is True
    assert log.do(c.SetCAConfig(trust_domain="two", cas_index=0)) is False
    assert log.do(c.SetCAConfig(config={"LeafCertTTL": "1h"}, trust_domain="two", cas_index=1)) is True
    config = log.ask("connect.ca_config").value
    assert (config.trust_domain, config.config, config.modify_index) == ("one", {"LeafCertTTL": "1h"}, 3)


def test_revocations_come_and_go() -> None:
    log = Log()
    log.do(c.Revoke("instance", "web-1", "web", "stolen"))
    log.do(c.Revoke("serial", "aa:bb"))
    assert not log.apply(c.Revoke("serial", "aa:bb")).touched
    rows = log.ask("connect.revocations").value
    assert [(row.kind, row.service, row.value, row.reason) for row in rows] == [
        ("instance", "web", "web-1", "stolen"),
        ("serial", "", "aa:bb", ""),
    ]
    assert rows[0].created_at == "2026-01-01T00:00:00Z"
    assert log.do(c.Restore("instance", "web-1")) is False
    assert log.do(c.Restore("instance", "web-1", "web")) is True
    assert log.refused(c.Revoke("planet", "x"))[0] == "invalid"
    assert log.refused(c.Revoke("serial", "x", "web"))[0] == "invalid"
    assert log.refused(c.Revoke("serial", ""))[0] == "invalid"


def test_config_entries() -> None:
    log = Log()
    put = c.SetConfigEntry("service-defaults", "web", {"Protocol": "http", "Kind": "lies", "ModifyIndex": 99})
    assert log.do(put) is True
    assert log.ask("config.get", kind="service-defaults", name="web").value == {
        "Kind": "service-defaults", "Name": "web", "Protocol": "http", "CreateIndex": 1, "ModifyIndex": 1,
    }  # fmt: skip
    assert not log.apply(put).touched
    assert log.do(msgspec.structs.replace(put, cas_index=7)) is False
    assert log.do(c.DeleteConfigEntry("service-defaults", "web", 7)) is False
    log.do(c.SetConfigEntry("proxy-defaults", "global", {}))
    assert [row["Name"] for row in log.ask("config.list").value] == ["global", "web"]
    assert [row["Name"] for row in log.ask("config.list", kind="service-defaults").value] == ["web"]
    assert log.do(c.DeleteConfigEntry("service-defaults", "web", 1)) is True
    assert log.ask("config.get", kind="service-defaults", name="web").index == log.index
    assert log.refused(c.SetConfigEntry("mystery", "web", {}))[0] == "invalid"
    assert log.refused(c.SetConfigEntry("proxy-defaults", "local", {}))[0] == "invalid"


def test_tokens_are_found_by_the_hash_of_their_secret() -> None:
    log = Log()
    first, second = Token("a", "0" * 64), Token("b", "1" * 64, {"Description": "ci"})
    assert log.do(c.UpsertToken(first, only_first=True)) is True
    assert log.do(c.UpsertToken(second, only_first=True)) is False
    log.do(c.UpsertToken(second))
    assert log.ask("acl.token", secret_hash="1" * 64).value.accessor_id == "b"
    assert log.ask("acl.token", accessor_id="a").value.secret_hash == "0" * 64
    assert log.refused(c.UpsertToken(Token("c", "0" * 64)))[0] == "conflict"
    assert log.refused(c.UpsertToken(Token("c", "the secret itself")))[0] == "invalid"
    log.do(c.UpsertToken(Token("b", "2" * 64)))
    assert log.ask("acl.token", secret_hash="1" * 64).value is None
    assert log.do(c.DeleteToken("b")) is True
    assert log.do(c.DeleteToken("b")) is False
    assert [row.accessor_id for row in log.ask("acl.tokens").value] == ["a"]


def test_a_service_intentions_entry_is_the_intentions_on_its_service() -> None:
    log = Log()
    for source, destination, id in (("old", "web", "i1"), ("kept", "web", "i2"), ("x:x-1", "web:web-1", "i3")):
        log.do(c.UpsertIntention(Intention(source, destination, id=id, action="allow")))
    put = c.SetConfigEntry(
        "service-intentions",
        "web",
        {
            "Kind": "service-intentions",
            "Sources": [
                {"Name": "kept", "Action": "allow", "Precedence": 9},
                {
                    "Name": "*",
                    "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/v1", "Methods": ["GET"]}}],
                },
            ],
        },
    )
    assert log.do(put) is True
    assert not log.apply(put).touched
    rows = log.ask("intentions.match", by="destination", name="web", instance="web-1").value
    assert [(row.source_name, row.id in ("i2", "i3")) for row in rows] == [
        ("x-1", True),
        ("kept", True),
        ("*", False),
    ]
    entry = log.ask("config.get", kind="service-intentions", name="web").value
    assert [(source["Name"], source["Precedence"]) for source in entry["Sources"]] == [("kept", 9), ("*", 8)]
    assert entry["Sources"][1]["Permissions"][0]["HTTP"]["PathPrefix"] == "/v1"
    assert log.do(msgspec.structs.replace(put, cas_index=1)) is False
    assert log.do(msgspec.structs.replace(put, entry=entry, cas_index=entry["ModifyIndex"])) is True
    assert [row["Name"] for row in log.ask("config.list", kind="service-intentions").value] == ["web"]
    assert log.do(c.DeleteConfigEntry("service-intentions", "web")) is True
    assert log.ask("config.get", kind="service-intentions", name="web").value is None
    assert [row.id for row in log.ask("intentions.list").value] == ["i3"]


def test_a_bad_service_intentions_entry_is_refused_whole() -> None:
    log = Log()
    for sources in (
        [{"Name": "a", "Action": "allow"}, {"Name": "b", "Action": "maybe"}],
        [{"Name": "a", "Action": "allow"}, {"Name": "a", "Action": "deny"}],
        [{"Action": "allow"}],
        "a",
    ):
        code, text = log.refused(c.SetConfigEntry("service-intentions", "web", {"Sources": sources}))
        assert code == "invalid", text
