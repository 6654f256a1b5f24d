"""What holds for every layer of tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import HealthCheck, settings

from cli.cluster.processes import reap
from cli.compiled import warning

# No example of a property test has a deadline, and no slow generation of examples fails one: on a loaded machine both
# would measure the machine. Each test as a whole has pytest's timeout.
settings.register_profile("lictor", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lictor")

LONG_FIRST = ("simulation", "soak", "chaos", "e2e", "gate", "security", "property", "unit")
"""The layers in the order of how long their longest file takes."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long ones: where files run side by side, none of them is then left over at the end."""
    ranks = {layer: rank for rank, layer in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.split("/")[1] if "/" in item.nodeid else "", len(ranks)))


def pytest_configure() -> None:
    """Test no code that is not what stands in the sources."""
    if (stale := warning()) is not None:
        raise pytest.UsageError(stale)


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the last test of a file that leaves a process running, or one that has ended and was not waited for.

    Python's own warning of it comes when the object is freed, often in another file's tests or at the very end.
    """
    before, failed = {child.pid for child in psutil.Process().children()}, request.session.testsfailed
    yield
    reap()
    if request.session.testsfailed > failed:
        gc.collect()  # what a failed test left open is told of here, and fails no other file's test
    left = [_told(child) for child in psutil.Process().children() if child.pid not in before]
    # Python's own, begun with the first pool and ended with the interpreter.
    assert [told for told in left if told and "multiprocessing.resource_tracker" not in told] == []


def _told(process: psutil.Process) -> str:
    """Return a process as a failure shows it, empty when somebody has just waited for it."""
    try:
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())}"
    except psutil.ZombieProcess:
        return f"{process.pid}, ended and not waited for"
    except psutil.NoSuchProcess:
        return ""
