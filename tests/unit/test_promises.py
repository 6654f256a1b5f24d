"""The measure of promised times can fail: on a quiet machine at once, on a crowded one within bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import promises
from tests.support.promises import STRETCH_MAX, Since, promptly, waited_s


def told(seconds: float) -> str:
    return f"some avg10=0.00 avg60=0.00 avg300=0.00 total={int(seconds * 1e6)}\nfull avg10=0.00 total=0\n"


@pytest.fixture
def pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel tells, written by the test."""
    path = tmp_path / "cpu"
    path.write_text(told(100))
    monkeypatch.setattr(promises, "PRESSURE", path)
    return path


def test_a_quiet_machine_allows_nothing_beside_the_promise(pressure: Path) -> None:
    since = Since()
    assert since.took(1.0, at=since.at + 0.9) == pytest.approx(0.9)
    with pytest.raises(AssertionError, match=r"the end took 1\.100 s, promised are 1\.0 s"):
        since.took(1.0, "the end", at=since.at + 1.1)


def test_what_tasks_waited_is_allowed_within_bounds(pressure: Path) -> None:
    since = Since()
    pressure.write_text(told(100.5))
    since.took(1.0, at=since.at + 1.4)
    with pytest.raises(AssertionError):
        since.took(1.0, at=since.at + 1.6)
    pressure.write_text(told(200))
    since.took(1.0, at=since.at + STRETCH_MAX - 0.1)
    with pytest.raises(AssertionError):
        since.took(1.0, at=since.at + STRETCH_MAX + 0.1)


def test_a_kernel_that_tells_nothing_allows_nothing(pressure: Path) -> None:
    pressure.unlink()
    assert waited_s() == 0.0
    since = Since()
    with pytest.raises(AssertionError):
        since.took(0.0, at=since.at + 0.1)


async def test_a_body_that_ends_too_late_or_never_fails(pressure: Path) -> None:
    async def fails_late() -> None:
        await asyncio.sleep(0.03)
        raise ConnectionError

    with pytest.raises(AssertionError, match="the end took"):
        async with promptly(0.01, "the end"):
            await asyncio.Event().wait()
    with pytest.raises(AssertionError):
        async with promptly(0.01):
            await asyncio.sleep(0.03)
    with pytest.raises(AssertionError):
        async with promptly(0.01):
            await fails_late()
    with pytest.raises(ConnectionError):
        async with promptly():
            await fails_late()
