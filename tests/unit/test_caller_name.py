"""The server name by which a sidecar hints who calls: it fits DNS whatever the names are, and tells callers apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raftstate.model.caller_name import caller_name, service_domain

NAMES = st.text(min_size=0, max_size=300)


@given(NAMES, NAMES)
def test_any_name_makes_a_valid_dns_name_below_its_services_domain(service: str, instance: str) -> None:
    name = caller_name(service, instance)
    label, _, domain = name.partition(".")
    assert domain == service_domain(service)
    assert len(name) < 254
    assert all(0 < len(part) < 64 and part.isalnum() and part == part.lower() for part in name.split("."))
    assert label.isascii()


@given(st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=2, unique=True))
def test_two_callers_have_two_names(two: list[tuple[str, str]]) -> None:
    assert caller_name(*two[0]) != caller_name(*two[1])
    services = {service for service, _ in two}
    assert len({service_domain(service) for service in services}) == len(services)
