"""CPU cost of one unary gRPC call at each of the two sidecars, without sockets: bytes in, bytes out.

python -m benchmarks.http2_calls [--calls N] [--at-once N] [--profile]

What the client and the app send is made beforehand, as grpcio would: header blocks that refer to what was sent
before, a deadline that differs from call to call and is not indexed, a message of 32 bytes each way, trailers. So the
figures hold the sidecar's work alone. "at once" is how many calls come in one read.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable

from hpack import Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import DataFrame, Frame, HeadersFrame, SettingsFrame, WindowUpdateFrame

from benchmarks.http_filter import WEB, Sink, l7_policy
from proxy.authz import Request
from proxy.http import HttpCounters, HttpOptions, OutboundOptions, client_cert_header
from proxy.http2 import InboundHttp2, OutboundHttp2
from proxy.http2.link import Link
from proxy.stream import Channel

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MESSAGE = b"\0\0\0\0\x1b" + b"m" * 27


class Lease:
    """The right to use the one link there is."""

    key = "db-1"

    def __init__(self, link: Link) -> None:
        self._link = link

    def link(self) -> Link | None:
        return self._link

    async def connect(self) -> Link:
        return self._link

    def failed(self, reason: str) -> None: ...
    def silent(self, reason: str) -> None: ...
    def answered(self, status: int) -> None: ...
    def refusal(self, refused: object) -> tuple[int, str] | None: ...
    def done(self) -> None: ...


class Fleet:
    """One instance, without a plan."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def aim(self, head: object, client: Channel) -> None:
        return None

    def unavailable(self) -> str:
        return ""

    def pick(self, tried: object, aim: object) -> Lease:
        return Lease(self._link)

    def may_retry(self) -> bool:
        return True


def opening() -> bytes:
    """Return what an end says first: settings, and room for all that comes."""
    window = WindowUpdateFrame(0)
    window.window_increment = 1 << 30
    return SettingsFrame(0, settings={3: 10_000}).serialize() + window.serialize()


def headers(stream_id: int, block: bytes, *, end: bool = False) -> bytes:
    frame = HeadersFrame(stream_id, block, flags=["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"])
    return frame.serialize()


def data(stream_id: int, *, end: bool = False) -> bytes:
    frame: Frame = DataFrame(stream_id, MESSAGE, flags=["END_STREAM"] if end else [])
    return frame.serialize()


def asked(calls: int, identity: bytes) -> list[bytes]:
    """Return what the client sends for each call."""
    encoder = Encoder()
    fields = [
        (b":scheme", b"http"),
        (b":method", b"POST"),
        (b":authority", b"db.service.consul:9000"),
        (b":path", b"/api/v1.Users/Get"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"grpc-python/1.68.1 grpc-c/45.0.0 (linux; chttp2)"),
        (b"grpc-accept-encoding", b"identity, deflate, gzip"),
    ]
    if identity:
        fields.append((b"x-forwarded-client-cert", identity))
    made = []
    for n in range(calls):
        deadline = NeverIndexedHeaderTuple(b"grpc-timeout", b"%dm" % (9000 + n % 1000))
        block = encoder.encode([*fields, deadline], huffman=False)
        made.append(headers(2 * n + 1, block) + data(2 * n + 1, end=True))
    return made


def answered(calls: int) -> list[bytes]:
    """Return what the app sends for each call."""
    encoder = Encoder()
    made = []
    for n in range(calls):
        stream_id = 2 * n + 1
        head = encoder.encode(
            [
                (b":status", b"200"),
                (b"content-type", b"application/grpc"),
                (b"grpc-accept-encoding", b"identity, deflate, gzip"),
            ],
            huffman=False,
        )
        ending = encoder.encode([(b"grpc-status", b"0"), (b"grpc-message", b"")], huffman=False)
        made.append(headers(stream_id, head) + data(stream_id) + headers(stream_id, ending, end=True))
    return made


class Sender:
    """Sends from the far side of a channel; who is there may change."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, data: bytes) -> None:
        self._sink.peer.write(data)


async def run(ask: Callable[[bytes], None], answer: Callable[[bytes], None], calls: int, at_once: int) -> float:
    """Play all calls; return seconds of CPU for one."""
    requests, answers = asked(calls, b""), answered(calls)
    ask(PREFACE + opening() + requests[0])
    await asyncio.sleep(0.01)  # the connection to the app is made
    answer(opening() + answers[0])
    start = time.process_time()
    for at in range(1, calls, at_once):
        ask(b"".join(requests[at : at + at_once]))
        answer(b"".join(answers[at : at + at_once]))
    return (time.process_time() - start) / (calls - 1)


async def inbound(calls: int, at_once: int) -> float:
    """The destination's sidecar, with an intention by method and path among 10,000 others."""
    app, client, counters = Sink(), Sink(), HttpCounters()
    policy = l7_policy(10_000)

    async def dial(peer: Channel) -> Channel:
        app.peer = peer
        return app

    def decide(request: Request):  # type: ignore[no-untyped-def]
        return policy.decide_request(WEB, "db", "db-1", request)

    side = InboundHttp2(HttpOptions(service="db"))
    identity = client_cert_header(WEB, "spiffe://td.consul/ns/default/dc/dc1/svc/db", "ab" * 32)
    side.serve(client, peer=WEB, dial=dial, decide=decide, stats=counters, identity=identity)
    spent = await run(Sender(client), Sender(app), calls, at_once)
    assert counters.requests == {("POST", 200, "app"): calls}, counters.requests
    await side.close()
    return spent


async def outbound(calls: int, at_once: int) -> float:
    """The caller's sidecar."""
    instance, client, counters = Sink(), Sink(), HttpCounters()
    link = Link(linger_s=1.0, on_end=lambda link, error: None)
    link.attach(instance)
    side = OutboundHttp2(OutboundOptions(http=HttpOptions(service="db")), Fleet(link), counters)  # type: ignore[arg-type]
    side.serve(client)
    spent = await run(Sender(client), Sender(instance), calls, at_once)
    assert counters.requests == {("POST", 200, "app"): calls}, counters.requests
    await side.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many is told")
    parser.add_argument("--profile", action="store_true", help="say where it goes")
    args = parser.parse_args()
    for name, side in (("inbound", inbound), ("outbound", outbound)):
        for at_once in args.at_once:
            if args.profile:
                profile = cProfile.Profile()
                profile.runcall(asyncio.run, side(args.calls, at_once))
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
                continue
            spent = min(asyncio.run(side(args.calls, at_once)) for _ in range(args.rounds))
            print(f"{name:>9}, {at_once:3} at once: {spent * 1e6:6.0f} µs of CPU a call")


if __name__ == "__main__":
    main()
