"""The TLS transport's short way of one record in one read, and its long one: cut as it may be, the same comes out."""

from __future__ import annotations

import asyncio
import random
import ssl

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.poller import Poller
from proxy.receiver import Receiver
from proxy.secure import RECORD_BYTES, SecureTransport
from proxy.tls import make_material
from tests.support.certs import TestCA
from tests.support.tls_peers import context

CA = TestCA()
PEER = context(CA.leaf("backend", "backend-1"), CA.root_pem, server=True)
OURS = make_material(CA.leaf("web", "web-1"), (CA.root_pem,)).client_plain


class Recorder(Receiver):
    def __init__(self) -> None:
        self.data = bytearray()
        self.told: list[str] = []

    def connection_made(self, transport: object) -> None:
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        assert data
        assert "eof" not in self.told
        self.data += data

    def eof_received(self) -> bool:
        self.told.append("eof")
        return True


class Ends:
    """Our end of a TLS connection, and Python's own at the other, with nothing between but this."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.poller = Poller()
        self.ours = SecureTransport(self.poller, self.recorder, OURS, server=False)
        self.to_peer, self.from_peer = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.peer = PEER.wrap_bio(self.to_peer, self.from_peer, server_side=True)
        self.ours.connection_made(None)
        while True:
            self.carry()
            try:
                self.peer.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.ours.data_received(self.from_peer.read())
        self.carry()
        assert self.recorder.told == ["made"]

    def carry(self) -> None:
        """Give the peer what ours has sent, which stands in a queue since there is no connection."""
        queue = self.ours._plain._queue
        while queue:
            self.to_peer.write(bytes(queue.popleft()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 60), st.integers(1, 40_000)), max_size=12),
    st.sampled_from(["records", "pieces", "all"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_whatever_the_cuts_the_same_comes_out(sizes: list[int], cuts: str, ends: bool, seed: int) -> None:
    rng = random.Random(seed)

    async def play() -> None:
        both = Ends()
        sent = b""
        wire: list[bytes] = [both.from_peer.read()]  # the tickets, as records of their own
        for size in sizes:
            data = rng.randbytes(size)
            sent += data
            at = 0
            while at < size:  # a record each
                at += both.peer.write(data[at : at + 16384])
                wire.append(both.from_peer.read())
        if ends:
            try:
                both.peer.unwrap()
            except ssl.SSLWantReadError:
                wire.append(both.from_peer.read())
        if cuts == "all":
            wire = [b"".join(wire)]
        elif cuts == "pieces":
            whole, wire = b"".join(wire), []
            while whole:
                count = rng.choice((1, 4, 5, 6, 20, 1000, 16_406, 50_000))
                # Sometimes what follows is a whole record again, and sometimes the rest of one is.
                wire.append(whole[:count])
                whole = whole[count:]
        for piece in wire:
            if piece:
                both.ours.data_received(piece)
        assert both.recorder.data == sent
        assert both.recorder.told == (["made", "eof"] if ends else ["made"])
        if not ends:
            answer = rng.randbytes(20_000)
            both.ours.write(answer)
            both.carry()
            heard = b""
            while len(heard) < len(answer):
                heard += both.peer.read(65536)
            assert heard == answer
        both.ours.abort()
        await asyncio.sleep(0)
        both.poller.close()

    asyncio.run(play())


def records(wire: bytes) -> int:
    """How many TLS records these bytes are (RFC 8446, section 5.1)."""
    count = at = 0
    while at < len(wire):
        at += 5 + int.from_bytes(wire[at + 3 : at + 5])
        count += 1
    assert at == len(wire)
    return count


sizes_of_pieces = st.one_of(
    st.just(8),
    st.integers(0, 60),
    st.integers(1, 70_000),
    st.sampled_from([RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 2 * RECORD_BYTES, RECORD_BYTES - 8]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes_of_pieces, max_size=12), st.integers(0, 2**32))
def test_pieces_leave_in_one_write_and_by_full_records(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    pieces: list[bytes | memoryview] = [rng.randbytes(size) for size in sizes]
    whole = b"".join(pieces)
    pieces = [memoryview(piece) if rng.random() < 0.5 else piece for piece in pieces]

    async def play() -> None:
        both = Ends()
        both.ours.write_pieces(pieces)
        sent = list(both.ours._plain._queue or ())
        assert len(sent) == (1 if whole else 0)
        assert records(b"".join(sent)) == -(-len(whole) // RECORD_BYTES)
        both.carry()
        heard = b""
        while len(heard) < len(whole):
            heard += both.peer.read(65536)
        assert heard == whole
        both.ours.abort()
        both.ours.write_pieces([b"too late"])
        assert not both.ours._plain._queue
        await asyncio.sleep(0)
        both.poller.close()

    asyncio.run(play())


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.integers(RECORD_BYTES + 257, 65535))
def test_a_record_longer_than_any_is_refused_by_its_header(aligned: bool, length: int) -> None:
    async def play() -> None:
        both = Ends()
        both.ours.data_received(both.from_peer.read())  # the ticket, after which it is known where records begin
        header = b"\x17\x03\x03" + length.to_bytes(2)
        if aligned:
            both.ours.data_received(header + b"x")
        else:
            both.ours.data_received(header[:4])
            both.ours.data_received(header[4:] + b"x")
        assert both.ours.is_closing()
        assert not both.recorder.data
        await asyncio.sleep(0)
        both.poller.close()

    asyncio.run(play())
