"""Ports for tests that run side by side: what is merely found free may be another process's before it is used."""

from __future__ import annotations

import atexit
import functools
import itertools
import socket
from collections.abc import Iterator

from cli.cluster.layout import is_free

PORTS_FROM, BLOCKS, BLOCK = 26000, 60, 100
"""Blocks of ports below those that the kernel hands out by itself and above those of local clusters."""


def free_ports(count: int) -> list[int]:
    """Return ports that are free, and that no other process which asks here gets."""
    ports = _own_ports()
    return [next(port for port in ports if is_free("127.0.0.1", port)) for _ in range(count)]


@functools.cache
def _own_ports() -> Iterator[int]:
    """The ports of the block that this process holds, round and round.

    A port that is merely found free may be another's before our server is up: tests run side by side. What holds a
    block is a socket's name in Linux' abstract namespace, which ends with the process.
    """
    for block in range(BLOCKS):
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            holder.bind(f"\0lictor-test-ports-{block}")
        except OSError:
            holder.close()
            continue
        atexit.register(holder.close)
        return itertools.cycle(range(PORTS_FROM + block * BLOCK, PORTS_FROM + (block + 1) * BLOCK))
    raise RuntimeError(f"{BLOCKS} processes hold all ports that tests may use")
