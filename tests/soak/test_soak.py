"""The soak's referee convicts what it should, and a short soak finds nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.e2e.support_e2e import Mesh
from tests.soak.apps import pattern
from tests.soak.referee import DENIED, ERROR, OK, WRONG, Attempt, Referee, Withdrawal, course_of, growth
from tests.soak.run import Held, Plan, Soak, soak


def attempt(outcome: str, began: float, ended: float, *, source: str = "web", ident: str = "web-1") -> Attempt:
    return Attempt("l4", "l4", source, ident, began, ended, outcome)


def test_an_error_needs_a_killed_instance_of_that_service_at_that_time() -> None:
    referee = Referee()
    referee.kills = [("l4", "soak-l4-1", 100.0), ("http", "soak-http-1", 200.0)]
    referee.note(attempt(ERROR, 99.0, 100.01))
    referee.note(attempt(ERROR, 100.5, 100.6))
    referee.note(attempt(OK, 300.0, 300.1))
    assert referee.verdict() == []
    referee.note(attempt(ERROR, 98.0, 99.0))  # before
    referee.note(attempt(ERROR, 101.5, 101.6))  # long after
    referee.note(attempt(ERROR, 200.0, 200.1))  # another service's
    assert len(referee.verdict()) == 3


def test_an_error_on_another_instance_than_the_killed_one_is_not_excused() -> None:
    referee = Referee()
    referee.kills = [("l4", "soak-l4-1", 100.0)]
    for instance in ("soak-l4-1", "soak-l4-2"):
        referee.underway["web-1"] = instance
        referee.note(attempt(ERROR, 99.0, 100.01))
    assert len(referee.verdict()) == 1
    assert "soak-l4-2" in referee.verdict()[0]


def test_a_withdrawn_source_that_arrives_is_a_fault_and_its_errors_are_not() -> None:
    now = time.monotonic()
    referee = Referee(within_s=1.0)
    referee.withdrawals = [Withdrawal("flap", "l4", asked=now - 5, acknowledged=now - 4)]
    referee.arrived("l4", "soak-l4-1", "web", "web-1")
    referee.arrived("http", "soak-http-1", "flap", "flap-1")
    assert referee.faults == []
    referee.arrived("l4", "soak-l4-1", "flap", "flap-2")
    assert len(referee.faults) == 1
    assert referee.delay_max_s >= 4
    referee.faults.clear()
    referee.withdrawals[0].lifting = now - 3
    referee.withdrawals[0].lifted = now - 2.9
    referee.arrived("l4", "soak-l4-1", "flap", "flap-3")
    assert referee.faults == []
    referee.note(attempt(DENIED, now - 3.5, now - 3.4, source="flap", ident="flap-4"))
    assert referee.verdict() == []
    referee.note(attempt(DENIED, now - 1.5, now - 1.4, source="flap", ident="flap-5"))
    assert len(referee.verdict()) == 1


def test_a_wrong_answer_is_never_excused() -> None:
    referee = Referee()
    referee.kills = [("l4", "soak-l4-1", 100.0)]
    referee.note(attempt(WRONG, 99.9, 100.1))
    assert len(referee.verdict()) == 1


@pytest.mark.parametrize(("per_second", "found"), [(0.0, 0.0), (1.0, 2 / 3), (-0.1, -0.25), (0.025, 1 / 21)])
def test_growth_is_from_the_middle_to_the_end(per_second: float, found: float) -> None:
    samples = [(1000.0 + t, 100 + per_second * t) for t in range(401)]
    assert growth(samples) == pytest.approx(found, rel=0.01)


def test_the_course_of_a_figure_has_its_ends() -> None:
    samples = [(float(at), at * 2.0) for at in range(100)]
    course = course_of(samples)
    assert (course[0], course[-1], len(course)) == (0.0, 198.0, 10)
    assert course == sorted(course)
    assert course_of(samples[:1]) == [0.0] * 10


def test_growth_sees_through_noise_and_not_what_was_before() -> None:
    samples = [(float(t), (50 + t / 4 if t < 200 else 100) + (t % 7)) for t in range(400)]
    assert abs(growth(samples)) < 0.01


def test_a_kind_of_call_that_never_went_well_proves_nothing() -> None:
    referee = Referee()
    referee.withdrawals = [Withdrawal("flap", "l4", asked=0.0)]
    referee.note(attempt(DENIED, 1.0, 1.1, source="flap"))
    assert referee.unproven() == ["no l4 of flap went well"]
    referee.note(attempt(OK, 0.0, 0.1, source="flap"))
    assert referee.unproven() == []


def test_what_was_kept_open_may_have_ended_since_it_was_last_well() -> None:
    referee = Referee(within_s=1.0)
    referee.withdrawals = [Withdrawal("flap", "l4", asked=100.0, acknowledged=100.1, lifting=101.0, lifted=101.1)]
    referee.note(attempt(ERROR, 103.0, 103.1, source="flap"), since=99.9)
    assert referee.verdict() == []
    referee.note(attempt(ERROR, 103.0, 103.1, source="flap"), since=102.5)
    assert len(referee.verdict()) == 1


def test_errors_that_began_after_a_kill_are_told_apart() -> None:
    referee = Referee()
    referee.kills = [("l4", "soak-l4-1", 100.0)]
    referee.note(attempt(ERROR, 99.0, 100.01))
    referee.note(attempt(ERROR, 100.25, 100.6))
    assert "2 failed" in referee.around_kills()
    assert "1 of them began after it, the latest 250 ms" in referee.around_kills()


def test_what_is_held_beyond_a_few_more_than_before_is_left_behind() -> None:
    before = Held(live_calls=15, descriptors=40, tasks=30)
    assert not Held(0, 44, 34).exceeds(before)
    for held in (Held(1, 40, 30), Held(0, 45, 30), Held(0, 40, 35)):
        assert held.exceeds(before)


async def test_what_a_sidecar_says_after_it_is_ready_is_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "soak-web-1" / "sidecar.log"
    log.parent.mkdir()
    log.write_text("Sidecar of soak-web (soak-web-1) is ready, pid 7\n  upstream  l4 -> localhost:21")
    run = Soak(cast(Mesh, SimpleNamespace(directory=tmp_path)), Plan())
    asked = asyncio.ensure_future(run.said("web", r"upstream  l4 -> localhost:(\d+) "))
    await asyncio.sleep(0)
    assert not asked.done()
    with log.open("a") as more:
        more.write("001  (L4_ADDR)\n")
    assert await asked == "21001"
    with pytest.raises(TimeoutError):
        await run.said("web", "never said", timeout_s=0.05)


def test_each_requests_bytes_are_its_own() -> None:
    assert pattern("a", 100_000) != pattern("b", 100_000)
    assert len(pattern("a", 100_001)) == 100_001


@pytest.mark.timeout(400)
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    # A machine under load may take its time to withdraw; the acceptance run asks for one second.
    report = soak(tmp_path, Plan(minutes=0.35, seed=7, within_s=4.0))
    assert report.faults == [], "\n".join([*report.faults[:10], *report.lines])
