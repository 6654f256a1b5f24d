"""Which headers a collector is shown, by the environment."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from proxy.otlp_headers import CHARS_MAX, headers_of, read_headers
from proxy.sidecar import SidecarOptions
from proxy.span_export import SpanExporter
from proxy.tasks import Tasks
from tests.support.otlp import Collector
from tests.support.sidecars import until
from tests.unit.test_span_export import recorded

SECRET = "Bearer 5ecret"


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("", ()),
        (" , ", ()),
        ("api-key=abc", (("api-key", "abc"),)),
        (" a = 1 ,b=2,", (("a", "1"), ("b", "2"))),
        ("authorization=Bearer%20abc%3D%3D", (("authorization", "Bearer abc=="),)),
        ("Authorization=Basic dTpw==", (("Authorization", "Basic dTpw=="),)),
        ("a=x%2Cy", (("a", "x,y"),)),
        ("a=1+2", (("a", "1+2"),)),
        ("a=", (("a", ""),)),
    ],
)
def test_pairs_are_read_encoded_or_not(text: str, headers: tuple[tuple[str, str], ...]) -> None:
    assert read_headers(text) == headers


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ok=1,5ecret", "pair 2 must be"),
        ("=5ecret", "pair 1 must be"),
        ("a b=5ecret", "pair 1 must be"),
        ("a=5ecret%0D%0AHost: x", "value of a may"),
        ("a=5ecret%00", "value of a may"),
        ("a=5ecretä", "value of a may"),
        ("Content-Length=5ecret", "Content-Length cannot"),
        ("host=5ecret", "host cannot"),
        ("a=" + "5ecret" * CHARS_MAX, "longer than"),
    ],
)
def test_what_is_no_header_is_refused_without_its_value(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        read_headers(text)
    assert "5ecret" not in str(caught.value)


@given(st.text())
def test_whatever_is_read_can_be_sent(text: str) -> None:
    try:
        headers = read_headers(text)
    except ValueError:
        return
    for name, value in headers:
        assert name.isascii()
        assert name.isprintable()
        assert not {"\r", "\n", "\0"} & set(value)


def test_the_variable_for_traces_goes_before_the_general_one() -> None:
    both = {"OTEL_EXPORTER_OTLP_HEADERS": "a=1", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=2"}
    assert headers_of({}) == ()
    assert headers_of(both) == (("a", "2"),)
    assert headers_of({**both, "OTEL_EXPORTER_OTLP_TRACES_HEADERS": ""}) == (("a", "1"),)


def test_a_sidecar_does_not_begin_with_headers_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "5ecret")
    assert main(["connect", "-id", "a", "-otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: lictor connect: OTEL_EXPORTER_OTLP_HEADERS: pair 1 ")
    assert "5ecret" not in told


async def test_a_collector_is_shown_them_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("proxy.span_export.EXPORT_S", 0.01)
    caplog.set_level(logging.DEBUG)
    collector, tasks = Collector(), Tasks("test")
    headers = (("Authorization", SECRET), ("X-Scope-OrgID", "team"))
    exporter = SpanExporter(await collector.start(), dict, tasks, headers=headers)
    collector.answers = [(401, {}, b"")]
    exporter.take(recorded())
    await until(lambda: bool(collector.headers))
    await exporter.close()
    await tasks.close()
    await collector.stop()
    shown = collector.headers[0]
    assert (shown["Authorization"], shown["X-Scope-OrgID"]) == (SECRET, "team")
    assert (shown["User-Agent"], shown["Content-Type"]) == ("lictor", "application/json")
    assert SECRET not in caplog.text
    assert SECRET not in repr(SidecarOptions(otlp_headers=headers))
