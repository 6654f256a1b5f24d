"""One cluster per module: starting five processes for every test would take longer than the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.support_e2e import Mesh, mesh
from tests.e2e.support_envoy import cleaned, need_envoy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A cluster of three servers and two client agents."""
    with mesh(tmp_path_factory.mktemp("mesh")) as stage:
        yield stage


@pytest.fixture
def lictor(cluster: Mesh) -> Iterator[Mesh]:
    """The module's cluster; what a test stood up on it is ended after the test."""
    yield cluster
    for one in reversed(cluster.backgrounds):
        one.end()
    cluster.backgrounds.clear()
    cluster.revive()


@pytest.fixture
def stage(lictor: Mesh) -> Iterator[Mesh]:
    """The same for tests with Envoys, with no rule that an earlier test wrote."""
    need_envoy()
    with cleaned(lictor) as stage:
        yield stage
