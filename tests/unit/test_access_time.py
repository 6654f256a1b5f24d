"""The time in an access log's lines."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from proxy.access import LineClock

YEAR_2200_NS = 7_258_118_400_000_000_000


@given(st.lists(st.integers(0, YEAR_2200_NS) | st.integers(10**18, 10**18 + 3 * 10**9), min_size=1, max_size=20))
def test_it_is_utc_to_the_millisecond_whichever_second_was_asked_for_before(times_ns: list[int]) -> None:
    clock = LineClock()
    for now_ns in times_ns:
        exact = datetime.fromtimestamp(now_ns // 10**9, UTC).replace(microsecond=now_ns % 10**9 // 1000)
        assert clock.text(now_ns) == exact.isoformat(timespec="milliseconds").replace("+00:00", "Z")
