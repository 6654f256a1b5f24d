"""Which messages a simulated partition drops."""

from __future__ import annotations

import pytest

from node.errors import Refused
from node.faults import FaultFilter


def test_a_partition_drops_both_directions_and_heals() -> None:
    faults = FaultFilter(enabled=True)
    assert faults.block(["b", "a"]) == ["a", "b"]
    assert faults.blocks("a", "in")
    assert faults.blocks("a", "out")
    assert not faults.blocks("c")
    faults.block([])
    assert not faults.blocks("a")


def test_one_way_makes_a_node_deaf_and_not_dumb() -> None:
    faults = FaultFilter(enabled=True)
    faults.block(["a"], one_way=True)
    assert faults.blocks("a")
    assert not faults.blocks("a", "out")
    faults.block(["a"])
    assert faults.blocks("a", "out"), "a partition after a one-way one is whole again"


def test_faults_are_refused_where_they_are_off() -> None:
    faults = FaultFilter(enabled=False)
    with pytest.raises(Refused, match="fault_injection"):
        faults.block(["a"])
    assert not faults.blocks("a")
