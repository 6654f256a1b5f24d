"""The short look at a text takes nothing that the rule itself refuses."""

from __future__ import annotations

import sys

import pytest

from raftstate.state import names
from raftstate.state.names import NAME_MAX, is_text, require_text
from raftstate.state.refusal import Refused


def test_no_control_character_passes_the_short_look() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    short = [one for one in every if is_text(one)]
    assert len(short) == 95  # printable ASCII, whatever Python's Unicode tables say of the rest
    assert not [one for one in short if names._CONTROL.search(one)]


def test_a_text_beyond_ascii_is_looked_at_by_the_rule() -> None:
    require_text("größe", "tag")
    require_text("x" * NAME_MAX, "tag")
    for bad in ("a\x00", "a\x7f", "a\x85", "a\u2028", "a\u202e", "x" * (NAME_MAX + 1), "ü" * (NAME_MAX + 1)):
        assert not is_text(bad)
        with pytest.raises(Refused, match=r"^tag "):
            require_text(bad, "tag")
