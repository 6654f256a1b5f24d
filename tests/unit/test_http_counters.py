"""What callers choose the names of cannot grow the counters."""

from __future__ import annotations

from proxy.http import HttpCounters
from proxy.http.options import GRPC_METHODS_MAX
from tests.unit.test_http2_inbound import setting


def test_methods_that_nobody_registered_are_counted_as_one() -> None:
    counters = HttpCounters()
    for number in range(1000):
        counters.request(f"METHOD-{number}", 200, 0.001, "app")
    counters.request("GET", 200, 0.001, "app")
    counters.request("", 408, 0.001, "timeout")
    counters.request("other", 200, 0.001, "app")
    assert counters.requests == {("other", 200, "app"): 1001, ("GET", 200, "app"): 1, ("", 408, "timeout"): 1}
    assert counters.latency_count == 1003


def test_grpc_methods_beyond_a_bound_are_counted_as_one() -> None:
    counters = HttpCounters()
    for number in range(1000):
        counters.grpc(b"/s/%d" % number, b"0", "app")
    assert len(counters.grpc_calls) == GRPC_METHODS_MAX + 1
    assert counters.grpc_calls["other", "0", "app"] == 1000 - GRPC_METHODS_MAX


async def test_an_http2_client_that_makes_up_methods_fills_no_memory_with_them() -> None:
    async with setting() as s:
        for number in range(50):
            s.client.conn.send_headers(
                2 * number + 1,
                [(":method", f"X{number}"), (":scheme", "http"), (":authority", "db"), (":path", "/")],
                end_stream=True,
            )
        s.client.push()
        await s.step()
        s.connection.cut()
        assert {method for method, _, _ in s.counters.requests} == {"other"}
