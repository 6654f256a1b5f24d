"""Spans on their way to a collector: batches, what is tried again and when, what is dropped and counted, the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from proxy import span_export
from proxy.access import Entry
from proxy.span_export import FULL, REFUSED, STOPPING, UNREACHABLE, SpanExporter, read_rejected, read_retry_after
from proxy.tasks import Tasks
from proxy.tracing import RequestTrace
from tests.support.otlp import Collector
from tests.support.sidecars import until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENTRY = Entry("inbound", "http/1.1", "web", "web-1", "db", "db-1", "GET", "/x", 200, "app", 12, 0.5)


def recorded(flags: int = 1) -> Entry:
    return ENTRY._replace(trace=RequestTrace(TRACE, PARENT, "a" * 16, flags, began_ns=time.time_ns()))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 0.01)
    monkeypatch.setattr(span_export, "BACKOFF_S", 0.02)


@contextlib.asynccontextmanager
async def exporting(collector: Collector) -> AsyncIterator[SpanExporter]:
    tasks = Tasks("test")
    exporter = SpanExporter(await collector.start(), lambda: {"service.name": "db"}, tasks)
    try:
        yield exporter
    finally:
        await exporter.close(1.0)
        await tasks.close()
        assert tasks.failures == 0
        await collector.stop()


async def test_spans_leave_in_batches_and_full_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 3600.0)
    monkeypatch.setattr(span_export, "SPANS_PER_BATCH", 10)
    collector = Collector()
    async with exporting(collector) as exporter:
        for _ in range(25):
            exporter.take(recorded())
        await until(lambda: len(collector.spans) == 20)
        await exporter.close(5.0)
        assert collector.batches == [10, 10, 5]
        assert (exporter.exported, exporter.dropped) == (25, 0)
    assert collector.resource("db") == {"service.name": "db"}


async def test_spans_that_come_just_as_the_last_ones_have_left_are_sent() -> None:
    collector = Collector()
    async with exporting(collector) as exporter:
        for number in range(1, 31):
            exporter.take(recorded())
            await until(lambda number=number: exporter.exported == number)  # type: ignore[misc]
        assert len(collector.connections) == 1, "the connection is kept"


async def test_only_what_is_recorded_is_sent() -> None:
    collector = Collector()
    async with exporting(collector) as exporter:
        exporter.take(ENTRY)
        exporter.take(recorded(flags=0))
        exporter.take(recorded(flags=2))
        exporter.take(recorded())
        await until(lambda: bool(collector.spans))
        assert (exporter.exported, exporter.dropped) == (1, 0)


async def test_what_does_not_fit_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "SPANS_MAX", 10)
    collector = Collector()
    async with exporting(collector) as exporter:
        for _ in range(25):
            exporter.take(recorded())
        assert exporter.dropped_by == {FULL: 15}
        await until(lambda: exporter.exported == 10)
        monkeypatch.setattr(span_export, "SPANS_MAX_BYTES", 3000)
        for _ in range(25):
            exporter.take(recorded())
        assert 15 < exporter.dropped_by[FULL] - 15 < 25, "big spans are bounded by their bytes"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_collector_gets_the_same_spans_again(status: int) -> None:
    collector = Collector()
    collector.answers = [(status, {}, b"")] * 3
    async with exporting(collector) as exporter:
        for _ in range(5):
            exporter.take(recorded())
        await until(lambda: exporter.exported == 5)
        assert collector.batches == [5, 5, 5, 5]
        first, second, third, fourth = collector.asked
        assert second - first > 0.009, "half of the back-off at least"
        assert fourth - third > 0.039, "which doubles"
        assert exporter.dropped == 0


async def test_a_collector_that_is_away_is_asked_again() -> None:
    collector, tasks = Collector(), Tasks("test")
    endpoint = await collector.start()
    await collector.stop()
    exporter = SpanExporter(endpoint, dict, tasks)
    exporter.take(recorded())
    await until(lambda: exporter._failures >= 3)
    assert (exporter.exported, exporter.dropped) == (0, 0)
    await exporter.close(0.5)
    assert exporter.dropped_by == {STOPPING: 1}
    await tasks.close()


async def test_spans_that_nobody_takes_for_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "GIVE_UP_S", 1.0)
    collector = Collector(status=503)
    async with exporting(collector) as exporter:
        exporter.take(recorded())
        await until(lambda: exporter.dropped == 1)
        assert exporter.dropped_by == {UNREACHABLE: 1}
        collector.status = 200
        exporter.take(recorded())
        await until(lambda: exporter.exported == 1)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 413, 500, 501])
async def test_what_is_refused_is_not_sent_again(status: int) -> None:
    collector = Collector()
    collector.answers = [(status, {"Location": "/v1/traces"}, b"")]
    async with exporting(collector) as exporter:
        exporter.take(recorded())
        await until(lambda: exporter.dropped == 1)
        assert exporter.dropped_by == {REFUSED: 1}
        exporter.take(recorded())
        await until(lambda: exporter.exported == 1)
        assert collector.batches == [1, 1]


async def test_a_collector_is_left_alone_for_as_long_as_it_asks() -> None:
    collector = Collector()
    collector.answers = [(503, {"Retry-After": "1"}, b"")]
    async with exporting(collector) as exporter:
        exporter.take(recorded())
        await until(lambda: exporter.exported == 1)
        first, second = collector.asked
        assert 0.99 < second - first < 5.0


async def test_a_collector_that_asks_to_be_left_alone_is_so_at_the_end_too() -> None:
    collector = Collector()
    collector.answers = [(429, {"Retry-After": "30"}, b"")]
    async with exporting(collector) as exporter:
        exporter.take(recorded())
        await until(lambda: exporter._told_to_wait)
        began = asyncio.get_running_loop().time()
        await exporter.close(5.0)
        assert asyncio.get_running_loop().time() - began < 2.0, "there is nothing to wait for"
        assert collector.batches == [1]
        assert exporter.dropped_by == {STOPPING: 1}


async def test_what_a_collector_rejects_of_a_batch_is_counted() -> None:
    collector = Collector()
    answer = b'{"partialSuccess":{"rejectedSpans":"2","errorMessage":"too old"}}'
    collector.answers = [(200, {}, answer)]
    async with exporting(collector) as exporter:
        for _ in range(5):
            exporter.take(recorded())
        await until(lambda: exporter.exported == 3)
        assert exporter.dropped_by == {REFUSED: 2}


async def test_a_collector_that_does_not_answer_holds_up_an_end_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 3600.0)
    monkeypatch.setattr(span_export, "SPANS_PER_BATCH", 10)
    collector, tasks = Collector(), Tasks("test")
    collector.hold = asyncio.Event()
    exporter = SpanExporter(await collector.start(), dict, tasks)
    for _ in range(25):
        exporter.take(recorded())
    loop = asyncio.get_running_loop()
    began = loop.time()
    await exporter.close(0.2)
    assert loop.time() - began < 3.0
    exporter.take(recorded())
    assert exporter.exported == 0
    assert exporter.dropped_by == {STOPPING: 26}, "what was lost is counted"
    await exporter.close(0.2)
    assert exporter.dropped == 26
    collector.hold.set()
    await tasks.close()
    await collector.stop()


async def test_an_endless_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "ANSWER_BYTES_MAX", 1000)
    collector = Collector()
    collector.answers = [(200, {}, b" " * 10_000_000)]
    async with exporting(collector) as exporter:
        exporter.take(recorded())
        await until(lambda: exporter.exported == 1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0.0), ("7", 7.0), ("100000", 300.0), ("9" * 5000, 300.0), ("", None), ("soon", None), ("-1", None),
     ("1.5", None), ("²", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2015 07:28:00", 0.0),
     ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 300.0)],
)  # fmt: skip
def test_when_to_come_again_is_read(value: str, seconds: float | None) -> None:
    assert read_retry_after(value, datetime(2026, 1, 1, tzinfo=UTC).timestamp()) == seconds


@pytest.mark.parametrize(
    ("answer", "rejected"),
    [(b"", 0), (b"{}", 0), (b'{"partialSuccess":{}}', 0), (b'{"partialSuccess":null}', 0), (b"junk", 0), (b"[]", 0),
     (b'{"partialSuccess":{"rejectedSpans":3}}', 3), (b'{"partialSuccess":{"rejectedSpans":"3"}}', 3),
     (b'{"partialSuccess":{"rejectedSpans":"x"}}', 0), (b'{"partialSuccess":{"rejectedSpans":-3}}', 0)],
)  # fmt: skip
def test_what_was_rejected_is_read(answer: bytes, rejected: int) -> None:
    assert read_rejected(answer)[0] == rejected
