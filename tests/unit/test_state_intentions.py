from __future__ import annotations

from typing import Any

import pytest

from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from raftstate.state import commands as c
from tests.unit.support_state import Log

IDS = iter(range(10**9))


def allow(source: str, destination: str, **fields: Any) -> c.UpsertIntention:
    return c.UpsertIntention(
        Intention(source, destination, id=fields.pop("id", f"i{next(IDS)}"), action="allow", **fields)
    )


@pytest.fixture
def log() -> Log:
    log = Log()
    log.node("n1")
    log.node("n2")
    log.service("n1", "echo-client-1", "echo-client")
    log.service("n1", "echo-server-1", "echo-server", port=8080)
    log.service("n2", "echo-server-2", "echo-server", port=8080)
    return log


def test_instance_ids_are_stored_with_their_service(log: Log) -> None:
    value = log.do(allow("echo-client-1", "echo-server-1"))
    assert (value["SourceService"], value["SourceName"]) == ("echo-client", "echo-client-1")
    assert (value["DestinationService"], value["DestinationName"]) == ("echo-server", "echo-server-1")
    assert value["Precedence"] == 14
    assert value["CreateIndex"] == value["ModifyIndex"] == log.index


def test_a_service_of_the_name_comes_before_an_instance_of_that_id(log: Log) -> None:
    log.service("n2", "echo-client", "intruder")
    value = log.do(allow("echo-client", "echo-server"))
    assert (value["SourceService"], value["SourceName"], value["Precedence"]) == ("", "echo-client", 9)


def test_a_name_that_nothing_has_is_a_service_to_come(log: Log) -> None:
    value = log.do(allow("later", "*"))
    assert (value["SourceService"], value["SourceName"], value["Precedence"]) == ("", "later", 6)


def test_an_id_of_several_services_is_refused_and_told(log: Log) -> None:
    log.service("n2", "echo-client-1", "intruder")
    code, text = log.refused(allow("echo-client-1", "echo-server"))
    assert code == "ambiguous"
    assert "echo-client:echo-client-1, intruder:echo-client-1" in text
    value = log.do(allow("echo-client:echo-client-1", "echo-server"))
    assert value["SourceService"] == "echo-client"


def test_one_service_with_the_id_on_several_nodes_is_no_ambiguity(log: Log) -> None:
    log.service("n2", "echo-client-1", "echo-client")
    assert log.do(allow("echo-client-1", "echo-server"))["SourceService"] == "echo-client"


def test_without_resolving_a_name_is_a_service(log: Log) -> None:
    intention = Intention("echo-client-1", "echo-server:echo-server-1", id="x", action="deny")
    value = log.do(c.UpsertIntention(intention, resolve=False))
    assert (value["SourceService"], value["SourceName"]) == ("", "echo-client-1")
    assert (value["DestinationService"], value["DestinationName"]) == ("echo-server", "echo-server-1")


def test_upserting_the_pair_keeps_id_and_birth(log: Log) -> None:
    first = log.do(allow("echo-client", "echo-server", id="first"))
    log.pass_time(60)
    second = log.do(
        c.UpsertIntention(Intention("echo-client", "echo-server", id="second", action="deny", description="no more"))
    )
    assert (second["ID"], second["Action"], second["CreatedAt"]) == ("first", "deny", first["CreatedAt"])
    assert second["CreateIndex"] == first["CreateIndex"]
    assert second["ModifyIndex"] == log.index
    assert second["UpdatedAt"] > first["UpdatedAt"]
    assert len(log.ask("intentions.list").value) == 1


def test_upserting_the_same_wakes_nobody(log: Log) -> None:
    log.do(allow("echo-client", "echo-server"))
    log.pass_time(60)
    applied = log.apply(allow("echo-client", "echo-server"))
    assert not applied.touched
    assert applied.value["ModifyIndex"] == log.index - 1


def test_create_without_replace_refuses_a_duplicate(log: Log) -> None:
    log.do(allow("echo-client", "echo-server", id="first"))
    again = Intention("echo-client", "echo-server", id="second", action="allow")
    code, text = log.refused(c.UpsertIntention(again, replace=False))
    assert code == "conflict"
    assert "duplicate intention found" in text


def test_an_id_moves_its_intention_but_not_onto_another(log: Log) -> None:
    log.do(allow("echo-client", "echo-server", id="one"))
    log.do(allow("echo-client", "*", id="two"))
    assert log.refused(allow("echo-client", "*", id="one"))[0] == "conflict"
    log.do(allow("*", "echo-server", id="one"))
    assert log.ask("intentions.exact", source="echo-client", destination="echo-server").value is None
    assert log.ask("intentions.get", id="one").value.source_name == "*"


def test_exact_finds_the_service_first_and_an_instance_even_when_it_is_gone(log: Log) -> None:
    log.do(allow("echo-client-1", "echo-server-1", id="instances"))
    log.do(c.DeregisterService("n1", "echo-client-1"))
    assert log.ask("intentions.exact", source="echo-client-1", destination="echo-server-1").value.id == "instances"
    log.do(c.UpsertIntention(Intention("echo-client-1", "echo-server-1", id="names", action="deny"), resolve=False))
    assert log.ask("intentions.exact", source="echo-client-1", destination="echo-server-1").value.id == "names"
    explicit = log.ask(
        "intentions.exact", source="echo-client:echo-client-1", destination="echo-server:echo-server-1"
    )
    assert explicit.value.id == "instances"


def test_delete_by_id_by_pair_and_of_nothing(log: Log) -> None:
    log.do(allow("echo-client", "echo-server", id="one"))
    log.do(allow("echo-client-1", "echo-server-1", id="two"))
    assert log.do(c.DeleteIntention("one")) is True
    assert log.do(c.DeleteIntention("one")) is False
    assert log.do(c.DeleteIntention(source="echo-client-1", destination="echo-server-1")) is True
    assert log.do(c.DeleteIntention(source="echo-client-1", destination="echo-server-1")) is False
    assert log.ask("intentions.list").value == []


def test_deleting_an_ambiguous_pair_is_refused(log: Log) -> None:
    log.do(allow("a:x", "echo-server", id="one"))
    log.do(allow("b:x", "echo-server", id="two"))
    code, text = log.refused(c.DeleteIntention(source="x", destination="echo-server"))
    assert code == "ambiguous"
    assert "a:x => echo-server (ID one); b:x => echo-server (ID two)" in text
    assert log.do(c.DeleteIntention(source="b:x", destination="echo-server")) is True


def test_match_gives_what_may_apply_by_falling_precedence(log: Log) -> None:
    for source, destination in (
        ("*", "*"),
        ("echo-client", "echo-server"),
        ("*", "echo-server"),
        ("echo-client-1", "echo-server-1"),
        ("echo-client", "echo-server-2"),
        ("echo-client", "other"),
    ):
        log.do(allow(source, destination))

    def destinations(instance: str) -> list[tuple[str, str]]:
        rows = log.ask("intentions.match", by="destination", name="echo-server", instance=instance).value
        return [(row.source_name, row.destination_name) for row in rows]

    service_level = [("echo-client", "echo-server"), ("*", "echo-server"), ("*", "*")]
    assert destinations("") == service_level
    assert destinations("echo-server-1") == [("echo-client-1", "echo-server-1"), *service_level]
    assert destinations("*") == [
        ("echo-client-1", "echo-server-1"),
        ("echo-client", "echo-server-2"),
        *service_level,
    ]
    sources = log.ask("intentions.match", by="source", name="echo-client", instance="echo-client-1").value
    assert len(sources) == 6
    assert [row.precedence for row in sources] == sorted((row.precedence for row in sources), reverse=True)


def test_an_instances_intention_is_not_shown_to_a_foreign_service_with_that_id(log: Log) -> None:
    log.do(allow("echo-client-1", "echo-server"))
    assert log.ask("intentions.match", by="source", name="intruder", instance="echo-client-1").value == []


def test_match_of_one_service_is_not_woken_by_another(log: Log) -> None:
    answer = log.ask("intentions.match", by="destination", name="echo-server", instance="echo-server-1")
    for destination, wakes in (
        ("other", False),
        ("echo-server-2", False),
        ("echo-server", True),
        ("echo-server-1", True),
        ("*", True),
    ):
        applied = log.apply(allow("echo-client", destination))
        assert bool(applied.touched.intersection(answer.watch)) is wakes, destination


def test_resolve_tells_what_a_reference_means(log: Log) -> None:
    def told(reference: str) -> Any:
        return log.ask("intentions.resolve", reference=reference).value

    assert told("echo-client-1") == {"Service": "echo-client", "Instance": "echo-client-1", "Exists": True}
    assert told("echo-client") == {"Service": "echo-client", "Instance": "", "Exists": True}
    assert told("later") == {"Service": "later", "Instance": "", "Exists": False}
    assert told("*") == {"Service": "*", "Instance": "", "Exists": True}
    log.service("n2", "echo-client-1", "intruder")
    assert "several services" in told("echo-client-1")["Error"]


def permission(http: HTTPMatch, action: str = "allow") -> Intention:
    return Intention("a", "b", id="x", permissions=(Permission(action, http),))


@pytest.mark.parametrize(
    "intention",
    [
        Intention("a", "b", id="x"),
        Intention("a", "b", id="x", action="maybe"),
        Intention("", "b", id="x", action="allow"),
        Intention("a", "", id="x", action="allow"),
        Intention("a", "b", id="", action="allow"),
        Intention("a:*", "b", id="x", action="allow"),
        Intention("a:", "b", id="x", action="allow"),
        Intention("a/b", "b", id="x", action="allow"),
        Intention("a\x00", "b", id="x", action="allow"),
        Intention("a" * 300, "b", id="x", action="allow"),
        Intention("a", "b", id="x", action="allow", source_ns="other"),
        Intention("a", "b", id="x", action="allow", permissions=(Permission("allow"),)),
        permission(HTTPMatch(), action="maybe"),
        permission(HTTPMatch(path_exact="/a", path_prefix="/b")),
        permission(HTTPMatch(path_exact="a")),
        permission(HTTPMatch(methods=("",))),
        permission(HTTPMatch(header=(HeaderMatch("h"),))),
        permission(HTTPMatch(header=(HeaderMatch("h", exact="a", prefix="b"),))),
        permission(HTTPMatch(header=(HeaderMatch("", present=True),))),
    ],
)
def test_invalid_intentions_are_refused(intention: Intention) -> None:
    assert Log().refused(c.UpsertIntention(intention))[0] == "invalid"


def test_permissions_are_kept_in_order() -> None:
    log = Log()
    rules = (
        Permission("deny", HTTPMatch(path_prefix="/admin", methods=("POST",))),
        Permission("allow", HTTPMatch(header=(HeaderMatch("x-team", exact="a"),))),
    )
    log.do(c.UpsertIntention(Intention("a", "b", id="x", permissions=rules)))
    assert log.ask("intentions.get", id="x").value.permissions == rules
