"""Frames survive any cutting of the byte stream, and no bytes from a peer do more than raise BadFrame."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import BadRequest
from node.protocol import command_name
from node.rpc import frames
from node.rpc.frames import BadFrame, Frame, FrameReader, encode_frame
from raftstate.model.connect import CARoot
from raftstate.state.commands import AddCARoot, Command, KVSet, SessionRenew

ids = st.integers(0, 2**63 - 1)
body = st.binary(max_size=64)
short = st.text(max_size=64)
any_frame: st.SearchStrategy[Frame] = st.one_of(
    st.builds(frames.Request, ids, short, st.integers(0, 86_400_000), body, st.booleans()),
    st.builds(frames.Response, ids, body),
    st.builds(frames.Failure, ids, short, st.text(max_size=200), short, st.integers(100, 599)),
    st.builds(frames.Item, ids, body),
    st.builds(frames.End, ids),
    st.builds(frames.Cancel, ids),
    st.builds(frames.Ping, ids),
    st.builds(frames.Pong, ids),
)


@given(st.lists(any_frame, max_size=8), st.lists(st.integers(1, 40), max_size=60))
def test_any_cutting_gives_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode_frame(frame) for frame in sent)
    reader = FrameReader(1_000_000)
    got: list[Frame] = []
    for size in [*cuts, len(data)]:
        piece, data = data[:size], data[size:]
        got.extend(reader.feed(piece))
    assert got == sent


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_noise_is_refused_or_waited_for_never_worse(pieces: list[bytes]) -> None:
    reader = FrameReader(4096)
    for piece in pieces:
        try:
            got = list(reader.feed(piece))
        except BadFrame:
            return
        assert all(isinstance(frame, Frame) for frame in got)


@given(st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(), st.lists, max_leaves=12))
def test_well_formed_messagepack_of_the_wrong_shape_is_refused(value: object) -> None:
    data = msgspec.msgpack.encode(value)
    try:
        (frame,) = FrameReader(1_000_000).feed(struct.pack(">I", len(data)) + data)
    except BadFrame:
        return
    assert isinstance(frame, Frame)


def test_an_oversized_length_is_refused_before_its_body_arrives() -> None:
    with pytest.raises(BadFrame, match="exceeds 100"):
        list(FrameReader(100).feed(struct.pack(">I", 101)))


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    data = b"\x91" * 100_000
    with pytest.raises(BadFrame):
        list(FrameReader(1_000_000).feed(struct.pack(">I", len(data)) + data))


@given(st.binary(max_size=80))
def test_a_commands_name_is_read_or_refused(data: bytes) -> None:
    try:
        assert command_name(data).isascii()
    except BadRequest:
        pass


@pytest.mark.parametrize("command", [KVSet("a"), AddCARoot(CARoot("a", "b", "c")), SessionRenew("s")])
def test_a_commands_name_is_its_type(command: Command) -> None:
    assert command_name(msgspec.Raw(msgspec.msgpack.encode(command))) == type(command).__name__
