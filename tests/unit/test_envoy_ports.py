"""The ports that `lictor connect envoy` chooses: kept for Envoy, and for one Envoy alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from cli import envoy
from cli.errors import CliError
from tests.support.ports import free_ports


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port from which on to look; what was chosen is let go in the end."""
    held: list[socket.socket] = []
    monkeypatch.setattr(envoy, "_held", held)
    yield free_ports(1)[0]
    for one in held:
        one.close()


@pytest.mark.parametrize("look", [1, 2])
def test_two_that_look_at_the_same_time_never_choose_the_same(
    first: int, look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, binds, rivals = socket.socket, list[int](), list[socket.socket]()

    class Outrun(real):
        """Another command takes the port just before it is bound for the first or second time."""

        def bind(self, address: tuple[str, int], /) -> None:
            binds.append(address[1])
            if len(binds) == look:
                rivals.append(real())
                rivals[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                rivals[0].bind(address)
            super().bind(address)

    with monkeypatch.context() as racing:
        racing.setattr(socket, "socket", Outrun)
        chosen = envoy.free_port("127.0.0.1", first)
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(rival).getsockname()[1] for rival in rivals]
    assert chosen not in taken


def test_nobody_but_envoy_gets_it(first: int) -> None:
    port = envoy.free_port("127.0.0.1", first)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 10).close()
    with socket.socket() as as_envoy:
        as_envoy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        as_envoy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        as_envoy.bind(("127.0.0.1", port))
        as_envoy.listen()
        socket.create_connection(("127.0.0.1", port), 10).close()
        assert envoy.free_port("127.0.0.1", port) > port


def test_what_listens_is_not_chosen(first: int) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("0.0.0.0", first))
        taken.listen()
        assert envoy.free_port("127.0.0.1", first) > first


def test_none_left_is_one_error(first: int) -> None:
    with pytest.raises(CliError, match=r"no port is free on 203\.0\.113\.1 from"):
        envoy.free_port("203.0.113.1", first)
