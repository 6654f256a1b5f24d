"""Bugs planted on purpose: each must be caught by the test named beside it, or that test guards nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings

from raftstate.state import kv
from raftstate.state.changes import Floors
from raftstate.state.policy_tables import Requests
from raftstate.state.step import Step
from raftstate.state.table import TableCursor
from tests.property import test_state_laws
from tests.unit import test_state_catalog, test_state_kv, test_state_machine

_SETTINGS = "_hypothesis_internal_use_settings"
Plant = Callable[[pytest.MonkeyPatch], None]


def apply_retries_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "put", lambda self, key, row: None)


def forget_the_floor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Floors, "raise_to", lambda self, family, index: None)


def leave_no_tombstone(patch: pytest.MonkeyPatch) -> None:
    def remove(step: Step, key: str) -> None:
        step.store.kv.remove(key)
        step.touched.add(("kv", key))

    patch.setattr(kv, "remove_key", remove)


def skip_wakes_of_health(patch: pytest.MonkeyPatch) -> None:
    touch = Step.touch

    def mostly(self: Step, *key: str) -> None:
        if key[0] != "health":
            touch(self, *key)

    patch.setattr(Step, "touch", mostly)


def bump_on_equal_writes(patch: pytest.MonkeyPatch) -> None:
    stamp = Step.stamp

    def always(self: Step, row: Any, old: Any) -> Any:
        return stamp(self, row, None) if old is None else stamp(self, row, old) or stamp(self, row, None)

    patch.setattr(Step, "stamp", always)


def show_later_rows_in_a_snapshot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TableCursor, "note", lambda self, key, old: None)
    patch.setattr("raftstate.state.kv_tables._OrderedCursor.note", lambda self, key, old: None)


@pytest.mark.parametrize(
    ("plant", "caught_by"),
    [
        (apply_retries_twice, test_state_machine.test_a_retry_is_applied_once_also_after_a_snapshot),
        (apply_retries_twice, test_state_laws.test_a_retry_has_the_first_outcome_and_no_second_effect),
        (leave_no_tombstone, test_state_kv.test_deletes_keep_indexes_growing),
        (
            leave_no_tombstone,
            test_state_laws.test_indexes_grow_watchers_wake_exactly_and_the_naive_twin_agrees,
        ),
        (skip_wakes_of_health, test_state_catalog.test_a_change_of_another_service_leaves_the_index),
        (
            skip_wakes_of_health,
            test_state_laws.test_indexes_grow_watchers_wake_exactly_and_the_naive_twin_agrees,
        ),
        (forget_the_floor, test_state_laws.test_indexes_grow_watchers_wake_exactly_and_the_naive_twin_agrees),
        (
            bump_on_equal_writes,
            test_state_catalog.test_registering_the_same_again_changes_no_index_and_touches_nothing,
        ),
        (
            show_later_rows_in_a_snapshot,
            test_state_laws.test_a_snapshot_is_of_its_index_whatever_is_applied_while_it_is_read,
        ),
    ],
)
def test_a_planted_bug_is_caught(plant: Plant, caught_by: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        if (usual := getattr(caught_by, _SETTINGS, None)) is not None:
            # The first counterexample will do: to shrink it takes most of the time.
            patch.setattr(
                caught_by, _SETTINGS, settings(usual, phases=(Phase.generate,), max_examples=500, database=None)
            )
        with pytest.raises((AssertionError, KeyError, ExceptionGroup)):
            caught_by()
