"""Durations and loosely spelled JSON: what is written is read back, what is junk is refused by name."""

from __future__ import annotations

import json
import string
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node import loose_json
from node.agent.definitions import CheckDefinition, ServiceDefinition
from node.durations import format_duration, parse_duration_s
from node.http.catalog import Deregistration, Registration
from node.loose_json import BadJson, loads
from raftstate.model.intention import Intention
from raftstate.model.kv import KVEntry


@given(st.integers(-(10**15), 10**15))
def test_duration_round_trip(nanos: int) -> None:
    assert round(parse_duration_s(format_duration(nanos / 1e9)) * 1e9) == pytest.approx(nanos, rel=1e-12, abs=1)
    assert parse_duration_s(nanos) == nanos / 1e9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("72h0m0s", 259200.0), ("1h30m", 5400.0), ("15.0s", 15.0), ("1.5h", 5400.0), ("250ms", 0.25), ("-5s", -5.0),
        ("0", 0.0), ("", 0.0), (".5s", 0.5), ("1µs", 1e-6),
    ],
)  # fmt: skip
def test_go_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "5", "5 s", "s", "1d", "1s1", "--1s", "١s", "1e3s", "inf", "9" * 99 + "s"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


def respelled(value: Any, how: str) -> Any:
    """Spell struct keys otherwise; keys of the user's own maps stay."""
    if isinstance(value, dict):
        spelled = {}
        for key, item in value.items():
            if key in ("Meta", "Config", "TaggedAddresses", "Header", "Locality"):
                spelled[key.lower() if how == "lower" else key] = item
            else:
                spelled[_spell(key, how)] = respelled(item, how)
        return spelled
    return [respelled(item, how) for item in value] if isinstance(value, list | tuple) else value


def _spell(key: str, how: str) -> str:
    if how == "lower":
        return key.lower()
    if how == "snake":
        return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key).lstrip("_")
    return key


NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)
META = st.dictionaries(st.text(string.ascii_letters + "_.", min_size=1, max_size=8), st.text(max_size=8), max_size=3)
CHECKS = st.builds(
    CheckDefinition, check_id=NAMES, name=NAMES, http=st.just("http://127.0.0.1/"), interval=st.just(10.0),
    tls_skip_verify=st.booleans(), success_before_passing=st.integers(0, 5),
)  # fmt: skip
SERVICES = st.builds(
    ServiceDefinition, name=NAMES, id=NAMES, port=st.integers(0, 65535), tags=st.lists(NAMES, max_size=3).map(tuple),
    meta=META, enable_tag_override=st.booleans(), checks=st.lists(CHECKS, max_size=2).map(tuple),
)  # fmt: skip


@given(SERVICES, st.sampled_from(["as it is", "lower", "snake"]))
def test_any_spelling_means_the_same(definition: ServiceDefinition, how: str) -> None:
    built = msgspec.to_builtins(definition)
    for check in built["Checks"]:
        for name in ("Interval", "Timeout", "TTL", "DeregisterCriticalServiceAfter"):
            check[name] = format_duration(check[name])
    assert loads(json.dumps(respelled(built, how)).encode(), ServiceDefinition) == definition


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "web", "80", "true", "null", "5s", "1.5"]), st.lists(NAMES, max_size=2),
    st.dictionaries(NAMES, st.one_of(st.none(), NAMES, st.integers()), max_size=2),
)  # fmt: skip


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """JSON of a struct's shape here and there: exact keys, others, nulls, structs where they belong or not."""
    hints = get_type_hints(kind)
    exact = {field.encode_name: _of(hints[field.name]) for field in msgspec.structs.fields(kind)}
    odd = {_spell(name, "lower"): _LEAVES for name in exact} | {"Unknown": _LEAVES}
    return st.fixed_dictionaries({}, optional=exact | odd)


def _of(hint: Any) -> st.SearchStrategy[Any]:
    kinds = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    if not kinds:
        return _LEAVES
    within = _values(kinds[0])
    return st.one_of(_LEAVES, within, st.lists(st.one_of(st.none(), within), max_size=2))


def _pair(kind: Any) -> st.SearchStrategy[tuple[Any, Any]]:
    return st.tuples(st.just(kind), _values(kind))


def _outcome(value: Any, kind: Any, *, always_fold: bool = False) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if always_fold:
            patch.setattr(loose_json, "_exact_for", lambda _: None)
        try:
            return loads(msgspec.json.encode(value), kind)
        except BadJson as error:
            return str(error)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from([Registration, Deregistration, Intention, KVEntry]).flatmap(_pair))
def test_exactly_spelled_json_means_what_folding_makes_of_it(pair: tuple[Any, Any]) -> None:
    kind, value = pair
    assert _outcome(value, kind) == _outcome(value, kind, always_fold=True)


def test_exact_keys_are_not_folded_and_others_are() -> None:
    exact = {"Node": "n", "Service": {"ID": "a", "Weights": {"Passing": 2}}, "Checks": [{"Status": "passing"}]}
    sees = loose_json._exact_for(Registration)
    assert sees is not None
    assert sees(exact)
    assert not sees(exact | {"node": "n"})
    assert not sees(exact | {"Service": {"id": "a"}})
    assert not sees(exact | {"Service": {"Weights": {"passing": 2}}})
    assert not sees(exact | {"Checks": [{"Status": "passing"}, {"status": "passing"}]})
    assert loose_json._exact_for(ServiceDefinition) is None, "its checks have durations"


@given(st.binary(max_size=80))
def test_any_bytes_are_a_definition_or_a_clear_refusal(data: bytes) -> None:
    try:
        definition = loads(data, ServiceDefinition)
    except BadJson:
        return
    assert isinstance(definition, ServiceDefinition)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"Port": "x"}', "Port"),
        (b'{"Tags": 5}', "Tags"),
        (b'{"Checks": [{"Interval": "soon"}]}', "Interval"),
        (b'{"Meta": {"a": {}}}', "Meta"),
        (b"[]", "object"),
    ],
)
def test_refusals_name_the_field(body: bytes, named: str) -> None:
    with pytest.raises(BadJson, match=named):
        loads(body, ServiceDefinition)
