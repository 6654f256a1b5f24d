"""CPU cost of one request through the inbound HTTP filter, without sockets: parse, decide, forward, answer.

python -m benchmarks.http_filter [--requests N] [--profile]

"new heads" is a load in which each request's target and one of its headers differ from all before. Then what the
decision alone costs, of a connection and of a request by method and path, at 10 intentions and at 10,000.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable

from proxy.authz import Policy, Request, compile_policy
from proxy.http import HttpCounters, HttpOptions, InboundHttp, client_cert_header
from proxy.stream import Channel, Data
from raftstate.model.identity import Identity
from raftstate.model.intention import HTTPMatch, Intention, Permission

WEB = Identity(service="web", instance="web-1", trust_domain="td.consul", datacenter="dc1")
WRK = b"GET /api/v1/users/42 HTTP/1.1\r\nHost: db.service.consul\r\n\r\n"
BROWSER = (
    b"GET /api/v1/users/42?full=1 HTTP/1.1\r\nHost: db.service.consul\r\nUser-Agent: Mozilla/5.0 (X11; Linux)\r\n"
    b"Accept: text/html,application/json\r\nAccept-Language: en\r\nAccept-Encoding: gzip, br\r\n"
    b"Cookie: session=0123456789abcdef\r\nX-Request-Id: 7d4c\r\ntraceparent: 00-abc-def-01\r\n"
    b"Connection: keep-alive\r\n\r\n"
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 13\r\nConnection: keep-alive\r\n\r\nhello, world\n"
)


class Sink:
    """A channel that drops what it gets."""

    def __init__(self) -> None:
        self.peer: Channel = self
        self.writes = 0

    def write(self, data: Data) -> None:
        self.writes += 1

    def write_eof(self) -> None: ...
    def abort(self, error: Exception | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def l7_policy(intentions: int) -> Policy:
    """A policy of so many intentions, one of which has permissions on calls from web to db."""
    others = [
        Intention(source_name=f"s{n % 100}", destination_name=f"d{n // 100}", action="allow")
        for n in range(intentions - 1)
    ]
    l7 = Intention(
        source_name="web",
        destination_name="db",
        permissions=(
            Permission("deny", HTTPMatch(path_prefix="/admin")),
            Permission("allow", HTTPMatch(path_prefix="/api/", methods=("GET", "POST"))),
        ),
    )
    return compile_policy([*others, l7], False)


def policies() -> dict[str, Policy]:
    """The policies measured: L4 only, and L7 among 10,000 others."""
    return {
        "allow": compile_policy([Intention(source_name="web", destination_name="db", action="allow")], False),
        "method and path": l7_policy(10_000),
    }


def fresh(request: bytes, count: int) -> list[bytes]:
    """Return so many requests that differ in target and in a header."""
    first, _, rest = request.partition(b" HTTP/1.1\r\n")
    return [b"%b/%d HTTP/1.1\r\nX-Call: %016x\r\n%b" % (first.partition(b"?")[0], n, n, rest) for n in range(count)]


def decision_us(decide: Callable[[], object], rounds: int = 100_000) -> float:
    """Return µs of CPU for one call, the least of five runs."""
    costs = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(rounds):
            decide()
        costs.append((time.process_time() - start) / rounds * 1e6)
    return min(costs)


async def measure(policy: Policy, requests: list[bytes]) -> float:
    """Return seconds of CPU per request."""
    count = len(requests)
    app, client = Sink(), Sink()

    async def dial(peer: Channel) -> Channel:
        app.peer = peer
        return app

    def decide(asked: Request):  # type: ignore[no-untyped-def]
        return policy.decide_request(WEB, "db", "db-1", asked)

    http = InboundHttp(HttpOptions(service="db"))
    identity = client_cert_header(WEB, "spiffe://td.consul/ns/default/dc/dc1/svc/db", "ab" * 32)
    connection = http.serve(client, peer=WEB, dial=dial, decide=decide, stats=HttpCounters(), identity=identity)
    connection.write(requests[0])
    await asyncio.sleep(0.01)
    app.peer.write(ANSWER)
    write, answer = connection.write, app.peer.write
    start = time.process_time()
    for request in requests:
        write(request)
        answer(ANSWER)
    spent = time.process_time() - start
    assert client.writes == app.writes == count + 1, (client.writes, app.writes)
    await http.close()
    return spent / count


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    made = policies()
    if options.profile:
        profile = cProfile.Profile()
        profile.enable()
        await measure(made["method and path"], [BROWSER] * options.requests)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    for name, policy in made.items():
        for kind, requests in (
            ("2 lines", [WRK] * options.requests),
            ("9 headers", [BROWSER] * options.requests),
            ("new heads", fresh(BROWSER, options.requests)),
        ):
            costs = [await measure(policy, requests) for _ in range(3)]
            print(f"{name:16} {kind:10} {sorted(costs)[1] * 1e6:6.1f} µs CPU per request (median of 3)")
    for count in (10, 10_000):
        policy = l7_policy(count)
        connection = decision_us(lambda: policy.decide(WEB, "db", "db-1"))  # noqa: B023 - called here
        l7 = decision_us(lambda: policy.decide_request(WEB, "db", "db-1", Request("GET", "/api/v1/users/42")))  # noqa: B023
        print(
            f"{count:6} intentions: a connection {connection:.2f} µs, a request {l7:.2f} µs, its path read included"
        )


if __name__ == "__main__":
    asyncio.run(main())
