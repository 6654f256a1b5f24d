"""What holds for every layer of tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

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
