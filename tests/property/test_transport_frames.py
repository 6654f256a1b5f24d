"""However the network cuts a stream of raft messages, the same ones are handed on, and each read is answered once."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from raftstate.errors import RaftError
from raftstate.transport_link import Receiver

FRAME_BYTES_MAX = 300


class Pipe:
    """A transport that takes what it is given."""

    def __init__(self) -> None:
        self.aborted = False

    def get_extra_info(self, _name: str) -> None:
        return None

    def write(self, _data: bytes) -> None: ...

    def abort(self) -> None:
        self.aborted = True


class Link:
    """A receiver and what it did: frames and reads in order."""

    def __init__(self, refuse: bytes | None = None) -> None:
        self.did: list[bytes | str] = []
        self.pipe = Pipe()
        self._refuse = refuse
        self.receiver = Receiver(
            "peer",
            FRAME_BYTES_MAX,
            on_frame=self._frame,
            on_read=lambda: self.did.append("read"),
            on_open=lambda _receiver: None,
            on_closed=lambda _receiver: None,
        )
        self.receiver.connection_made(cast(asyncio.Transport, cast(Any, self.pipe)))

    def _frame(self, _peer: str, frame: bytes) -> None:
        if frame == self._refuse:
            raise RaftError("not that one")
        self.did.append(frame)


def stream(frames: list[bytes]) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


frames = st.lists(st.binary(max_size=40), min_size=1, max_size=8)
cuts = st.lists(st.integers(0, 1000), max_size=12)


@given(frames, cuts)
def test_any_split_gives_the_same_frames(sent: list[bytes], where: list[int]) -> None:
    link = Link()
    for part in parts(stream(sent), where):
        before = len(link.did)
        link.receiver.data_received(part)
        new = link.did[before:]
        # A read that completed frames ends with one answer; one that completed none asks for nothing.
        assert new == [] or (new[-1] == "read" and new.count("read") == 1)
        assert new != ["read"]
    assert [step for step in link.did if step != "read"] == sent


@given(frames, st.integers(0, 7), cuts)
def test_nothing_is_handed_on_behind_a_frame_that_is_refused(sent: list[bytes], which: int, where: list[int]) -> None:
    bad = b"\xff" * 41
    at = which % len(sent)
    link = Link(refuse=bad)
    for part in parts(stream([*sent[:at], bad, *sent[at:]]), where):
        link.receiver.data_received(part)
    assert [step for step in link.did if step != "read"] == sent[:at]
    assert link.pipe.aborted


def test_a_frame_above_the_bound_is_refused_before_it_is_there() -> None:
    for data in ((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), stream([b"x" * (FRAME_BYTES_MAX + 1)])):
        link = Link()
        link.receiver.data_received(data)
        assert link.pipe.aborted
        assert link.did == []
