"""Which times of a chaos run count as gaps in writing, and what they are laid to."""

from __future__ import annotations

from cli.chaos.gaps import told, write_gaps
from cli.chaos.history import READ, WRITE, Fault, History, Operation


def history(
    *returned_s: float, faults: tuple[Fault, ...] = (), tried_s: float = 20.0, duration_s: float = 20.0
) -> History:
    """A run with writes answered at these times, in which a client last tried something at `tried_s`."""
    operations = [Operation("c0", "k", WRITE, 0.0, at) for at in returned_s]
    operations.append(Operation("c1", "k", READ, tried_s))
    return History(1, duration_s, operations, list(faults), [])


def test_what_came_after_the_last_try_is_no_gap() -> None:
    one = history(1.0, 2.0, tried_s=5.0, duration_s=60.0)
    assert write_gaps(one)[0].length_s == 3.0


def test_a_last_try_that_got_no_answer_is_part_of_the_gap() -> None:
    """Clients that wait for one answer to the end try nothing more, and reads without an answer are not recorded."""
    one = history(1.0, 2.0, tried_s=5.0, duration_s=60.0)
    one.tried_s = 13.0
    assert write_gaps(one)[0].length_s == 11.0


def test_longest_gap_comes_first_and_the_runs_ends_count() -> None:
    gaps = write_gaps(history(1.0, 2.0, 6.0, 19.0))
    assert [(gap.begin_s, gap.end_s) for gap in gaps[:2]] == [(6.0, 19.0), (2.0, 6.0)]
    assert write_gaps(history())[0].length_s == 20.0


def test_reads_and_writes_of_unknown_outcome_end_no_gap() -> None:
    one = history(1.0, 19.0)
    one.operations.append(Operation("c0", "k", READ, 9.0, 10.0))
    one.operations.append(Operation("c0", "k", WRITE, 9.0))
    assert write_gaps(one)[0].length_s == 18.0


def test_gap_is_laid_to_the_faults_in_force_during_it() -> None:
    before, during = Fault("kill", ("a",), 0.0, 2.0), Fault("kill-all", ("a", "b", "c"), 4.5, 8.0)
    gap = write_gaps(history(5.0, 12.0, faults=(before, during)))[1]
    assert (gap.begin_s, gap.faults) == (5.0, (during,))
    assert gap.unharmed_s == 4.0
    assert "kill-all a, b, c 4.5-8.0 s" in told(gap)


def test_what_the_cluster_took_by_itself_is_the_longest_part_without_a_fault() -> None:
    faults = (Fault("kill-all", ("a",), 1.0, 4.0), Fault("pause", ("a",), 5.0, 6.0), Fault("kill", ("b",), 5.5, 7.0))
    gap = write_gaps(history(1.0, 10.0, 19.5, faults=faults))[1]
    assert (gap.begin_s, gap.end_s) == (1.0, 10.0)
    assert gap.unharmed_s == 3.0  # 7 to 10, more than 4 to 5
    assert write_gaps(history(1.0, 10.0))[0].unharmed_s == 10.0
