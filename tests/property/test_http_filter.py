"""Filter expressions against a naive reading of random ones, and junk against the parser."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.http.filter import BadFilter, apply_filter, compile_filter

NAMES = ("Service", "Port", "Tags", "Meta.env", "Nothing")
VALUES = ("web", "db", "80", "a", "prod", "")
ROWS = st.fixed_dictionaries(
    {
        "Service": st.sampled_from(["web", "db", "webby"]),
        "Port": st.sampled_from([80, 81]),
        "Tags": st.lists(st.sampled_from(["a", "b", "web"]), max_size=3),
        "Meta": st.dictionaries(st.just("env"), st.sampled_from(["prod", "test"]), max_size=1),
    }
)


def value_of(row: dict[str, Any], name: str) -> Any:
    found: Any = row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def comparison(name: str, operator: str, value: str) -> tuple[str, Any]:
    """Return an expression and its meaning, spelled out."""
    quoted = f'"{value}"'
    text = {
        "==": f"{name} == {quoted}",
        "!=": f"{name} != {quoted}",
        "contains": f"{name} contains {quoted}",
        "in": f"{quoted} in {name}",
        "not in": f"{quoted} not in {name}",
        "empty": f"{name} is empty",
        "not empty": f"{name} is not empty",
    }[operator]

    def meaning(row: dict[str, Any]) -> bool:
        held = value_of(row, name)
        if operator in ("==", "!="):
            same = held == int(value) if isinstance(held, int) else (held or "") == value
            return same if operator == "==" else not same
        if operator in ("empty", "not empty"):
            return (held is None or held in ([], "", {})) == (operator == "empty")
        contained = held is not None and not isinstance(held, int) and value in held
        return contained != (operator == "not in")

    return text, meaning


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[str, Any]:
    name = draw(st.sampled_from(NAMES))
    operators = ["empty", "not empty", "contains", "in", "not in"]
    values = VALUES
    if name != "Tags":
        operators += ["==", "!="]
    if name == "Port":
        operators, values = ["==", "!="], ("80", "81")
    return comparison(name, draw(st.sampled_from(operators)), draw(st.sampled_from(values)))


EXPRESSIONS = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(
            lambda two: (
                (f"({two[0][0]}) and {two[1][0]}", lambda row: two[0][1](row) and two[1][1](row))
                if " or " not in two[1][0]
                else (f"({two[0][0]}) and ({two[1][0]})", lambda row: two[0][1](row) and two[1][1](row))
            )
        ),
        st.tuples(inner, inner).map(
            lambda two: (f"{two[0][0]} or {two[1][0]}", lambda row: two[0][1](row) or two[1][1](row))
        ),
        inner.map(lambda one: (f"not ({one[0]})", lambda row: not one[1](row))),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.lists(ROWS, max_size=4))
@settings(max_examples=300, deadline=None)
def test_expressions_mean_what_they_say(expression: tuple[str, Any], rows: list[dict[str, Any]]) -> None:
    text, meaning = expression
    assert apply_filter(text, rows) == [row for row in rows if meaning(row)], text


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_filter_or_a_clear_refusal(text: str) -> None:
    with suppress(BadFilter):
        compile_filter(text)({"Service": "web", "Port": 80, "Tags": ["a"]})


@given(st.lists(st.sampled_from(["a", "==", '"x"', "and", "or", "not", "(", ")", "in", "is", "empty", "matches"])))
@settings(max_examples=300, deadline=None)
def test_any_tokens_are_a_filter_or_a_clear_refusal(tokens: list[str]) -> None:
    with suppress(BadFilter):
        compile_filter(" ".join(tokens))({"a": "x"})


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('Meta["a.b"] == "1"', True),
        ('"/Meta/a.b" == "1"', True),
        ("Meta.v matches `^1\\.`", True),
        ("Meta.v not matches `^2`", True),
        ("Checks.Status == critical", True),
        ("Native == true and Port==80", True),
        ("isolated is empty", True),
        ("Native == maybe", None),
        ("Tags == a", None),
        ("not " * 80 + "a == b", None),
    ],
)
def test_forms(text: str, held: bool | None) -> None:
    row = {
        "Meta": {"a.b": "1", "v": "1.2"}, "Checks": [{"Status": "passing"}, {"Status": "critical"}],
        "Native": True, "Port": 80, "Tags": ["a"],
    }  # fmt: skip
    if held is None:
        with pytest.raises(BadFilter):
            compile_filter(text)(row)
    else:
        assert compile_filter(text)(row) is held


def test_a_costly_pattern_costs_little() -> None:
    assert not compile_filter('a matches "(a+)+$"')({"a": "a" * 5000 + "b"})
