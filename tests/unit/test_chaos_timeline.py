"""The picture of a chaos run: every kind of fault has its own colour, and hides no leader."""

from __future__ import annotations

import re

from cli.chaos.history import WRITE, Fault, History, LeaderSpan, Operation
from cli.chaos.runner import FAULT_KINDS
from cli.chaos.timeline import FAULT_COLOURS, FAULT_MEANINGS, TERM_COLOURS, UNKNOWN_FAULT, draw

NODES = ["server-1", "server-2", "server-3"]
_BOX = re.compile(
    r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="(#\w+)"><title>([^<]*)</title>'
)


def _history(faults: list[Fault]) -> History:
    operations = [Operation("c", "k", WRITE, n / 2, n / 2 + 0.1, value=str(n)) for n in range(18)]
    return History(1, 10.0, operations, faults, [LeaderSpan(0.0, "server-1", 1), LeaderSpan(5.0, "server-2", 2)])


def _boxes(svg: str, words: str) -> list[tuple[float, float, float, float, str]]:
    return [
        (float(x), float(y), float(width), float(height), colour)
        for x, y, width, height, colour, title in _BOX.findall(svg)
        if words in title
    ]


def test_every_kind_of_fault_has_a_colour_of_its_own() -> None:
    assert set(FAULT_COLOURS) == set(FAULT_MEANINGS) == set(FAULT_KINDS)
    colours = [*FAULT_COLOURS.values(), *TERM_COLOURS, UNKNOWN_FAULT]
    assert len(set(colours)) == len(colours)


def test_faults_hide_no_leader() -> None:
    svg = draw(_history([Fault(kind, tuple(NODES), 0.0, 10.0) for kind in FAULT_KINDS]), NODES)
    bars, bands = _boxes(svg, " leads term "), [box for kind in FAULT_KINDS for box in _boxes(svg, f"{kind} server-")]
    assert [bar[4] for bar in bars] == [TERM_COLOURS[1], TERM_COLOURS[2]]
    assert len(bands) == len(NODES) * len(FAULT_KINDS)
    for _, top, _, height, _ in bars:
        assert height >= 5
        assert all(top >= y + h or top + height <= y for _, y, _, h, _ in bands)


def test_the_legend_names_what_came() -> None:
    svg = draw(_history([Fault("one-way", ("server-1",), 1.0, 2.0), Fault("flood", ("server-2",), 3.0, 4.0)]), NODES)
    assert "deaf, but heard" in svg
    assert "other fault" in svg
    assert "disk full" not in svg
