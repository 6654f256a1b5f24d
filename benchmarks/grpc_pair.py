"""CPU of each of two real sidecars for one unary gRPC call, with the real grpcio before and behind them.

    python -m benchmarks.grpc_pair [--calls 4000] [--at-once 16] [--rounds 3] [--protocol grpc|tcp]

The calling sidecar gives each call an instance, the called one decides it by its method; with ``tcp`` both relay the
connection as it is, for comparison. Needs the extra ``lictor[envoy]`` for grpcio. Client and app share a process of
their own, whose CPU does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from benchmarks.data_plane import Target, first_update, free_port, wait_for
from raftstate.model.intention import HTTPMatch, Intention, Permission
from raftstate.model.sidecar import Endpoint, SidecarUpstream
from tests.support.certs import TestCA

METHOD = "/test.Echo/Unary"
ROOT = Path(__file__).resolve().parents[1]


class Echo(grpc.GenericRpcHandler):
    """The app."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._echo)

    async def _echo(self, request: bytes, context: object) -> bytes:
        return request


@contextlib.contextmanager
def pair(directory: Path, app_port: int, protocol: str) -> Iterator[tuple[int, list[Target]]]:
    """Two sidecars in processes of their own; gives the port to call, and the calling and the called one."""
    ca = TestCA()
    public, own_public, upstream = free_port(), free_port(), free_port()
    allowed = Permission("allow", HTTPMatch(path_exact=METHOD, methods=("POST",)))
    intention = Intention(source_name="web", destination_name="backend", permissions=(allowed,))
    if protocol == "tcp":
        intention = Intention(source_name="web", destination_name="backend", action="allow")

    update = partial(first_update, ca, intention, protocol)

    endpoint = Endpoint("n", "127.0.0.1", public, "backend", "backend-1")
    to_backend = SidecarUpstream("backend", "backend", "127.0.0.1", upstream, protocol, endpoints=(endpoint,))
    sides = [
        ("calling", own_public, [["backend", "127.0.0.1", upstream]], update("web", own_public, 0, (to_backend,))),
        ("called", public, [], update("backend", public, app_port, ())),
    ]
    targets = []
    try:
        for side, port, upstreams, first in sides:
            path = directory / f"{side}.json"
            spec = {"public_port": port, "upstreams": upstreams, "workers": 1, "access_log": ""}
            path.write_text(json.dumps({**spec, "update": msgspec.to_builtins(first)}))
            command = [sys.executable, str(ROOT / "benchmarks/data_plane.py"), "--sidecar", str(path)]
            targets.append(Target(side, port, [subprocess.Popen(command, cwd=ROOT)]))
        wait_for(upstream)
        wait_for(public)
        yield upstream, targets
    finally:
        for target in targets:
            for process in target.processes:
                process.terminate()
                process.wait()


async def load(port: int, calls: int, at_once: int) -> None:
    """Make so many calls, so many at once."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        unary = channel.unary_unary(METHOD)

        async def some(count: int) -> None:
            for _ in range(count):
                assert await unary(b"m" * 27, timeout=20, wait_for_ready=True) == b"m" * 27

        await asyncio.gather(*(some(calls // at_once) for _ in range(at_once)))


async def run(options: argparse.Namespace) -> None:
    app = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    app.add_generic_rpc_handlers((Echo(),))
    app_port = app.add_insecure_port("127.0.0.1:0")
    await app.start()
    with (
        tempfile.TemporaryDirectory() as directory,
        pair(Path(directory), app_port, options.protocol) as (port, sides),
    ):
        await load(port, 10 * options.at_once, options.at_once)
        for _ in range(options.rounds):
            before = [side.cpu_s() for side in sides]
            await load(port, options.calls, options.at_once)
            spent = [(side.cpu_s() - was) / options.calls * 1e6 for side, was in zip(sides, before, strict=True)]
            told = ", ".join(f"{side.name} {us:.0f} µs" for side, us in zip(sides, spent, strict=True))
            print(f"{options.protocol}, {options.at_once} at once: {told} of CPU a call")
    await app.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--protocol", choices=["grpc", "tcp"], default="grpc")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
