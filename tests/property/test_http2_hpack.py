"""Our header compression says what the ``hpack`` package says, of every block that either can make and of junk."""

from __future__ import annotations

from typing import Any

import pytest
from h2.errors import ErrorCodes
from hpack import Decoder as TheirDecoder
from hpack import Encoder as TheirEncoder
from hpack import HPACKError, NeverIndexedHeaderTuple
from hpack.huffman_table import decode_huffman
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.http2.errors import Http2Error, StreamError
from proxy.http2.fields import name_problem, value_problem
from proxy.http2.hpack import TABLE_BYTES, Decoder, Encoder, is_never_indexed, unhuffman

LIST_BYTES_MAX = 64 * 1024
names = st.sampled_from(
    [
        b":method",
        b":path",
        b":status",
        b"content-type",
        b"x-a",
        b"x-b",
        b"cookie",
        b"authorization",
        b"te",
        b"x" * 200,
    ]
) | st.text("abcxyz-_.", min_size=1, max_size=20).map(str.encode)
values = st.sampled_from([b"", b"GET", b"200", b"0", b"gzip, deflate", b"v" * 130, b"long" * 700]) | st.text(
    "abc012 -/", max_size=40
).map(lambda text: text.strip().encode())
plain = st.tuples(names, values)
secret = st.builds(NeverIndexedHeaderTuple, names, values)
lists = st.lists(plain | plain | secret, max_size=12)


def verdict(theirs: TheirDecoder, block: bytes) -> list[tuple[bytes, bytes]] | None:
    try:
        return [tuple(field) for field in theirs.decode(block, raw=True)]  # type: ignore[misc]
    except HPACKError:
        return None


def well_formed(fields: list[Any]) -> bool:
    return not any(name_problem(name) or value_problem(value) for name, value in fields)


def table(theirs: TheirDecoder) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in theirs.header_table.dynamic_entries]


@settings(max_examples=100, deadline=None)
@given(st.lists(lists | st.integers(0, 6000), max_size=12))
def test_the_package_reads_what_we_write(steps: list[Any]) -> None:
    ours, theirs = Encoder(), TheirDecoder()
    for step in steps:
        if isinstance(step, int):
            ours.allow(step)
            theirs.max_allowed_table_size = step
        else:
            block = ours.encode(step)
            assert [tuple(field) for field in theirs.decode(block, raw=True)] == [tuple(field) for field in step]
            for read, field in zip(theirs.decode(b"", raw=True), step, strict=False):
                assert read == field
            assert theirs.header_table_size <= TABLE_BYTES


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(lists, st.booleans()) | st.integers(0, TABLE_BYTES), max_size=12))
def test_we_read_what_the_package_writes(steps: list[Any]) -> None:
    theirs, ours, third = TheirEncoder(), Decoder(LIST_BYTES_MAX), TheirDecoder()
    changed = False
    for step in steps:
        if isinstance(step, int):
            # Of several changes before one block the package's encoder may lose some.
            if not changed and step != theirs.header_table_size:
                theirs.header_table_size = step
                changed = True
            continue
        changed = False
        fields, huffman = step
        block = theirs.encode(fields, huffman=huffman)
        third.decode(block, raw=True)
        read: list[Any] = ours.decode(block)
        assert [tuple(field) for field in read] == [tuple(field) for field in fields]
        assert ours.table == table(third)
        for got, field in zip(read, fields, strict=True):
            # Whether a field may be indexed is not told of one that is in the table anyhow.
            if is_never_indexed(got):
                assert is_never_indexed(field)


@settings(max_examples=200, deadline=None)
@given(st.lists(lists, max_size=3), st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.randoms())
def test_of_junk_we_say_what_the_package_says(before: list[Any], junk: list[bytes], random: Any) -> None:
    encoder, ours, theirs = TheirEncoder(), Decoder(LIST_BYTES_MAX), TheirDecoder(LIST_BYTES_MAX)
    for fields in before:
        block = bytearray(encoder.encode(fields, huffman=random.random() < 0.5))
        if block and random.random() < 0.5:
            block[random.randrange(len(block))] = random.randrange(256)
        junk.append(bytes(block))
    for block in junk:
        expected = verdict(theirs, bytes(block))
        if expected is None:
            with pytest.raises(Http2Error):
                ours.decode(bytes(block))
            return  # neither goes on after an error
        read = ours.decode(bytes(block))
        assert [tuple(field) for field in read] == expected
        assert (ours.problem == "") == well_formed(expected), "be it from a literal or from a table"
        assert ours.table == table(theirs)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=24))
def test_huffman(data: bytes) -> None:
    try:
        expected: bytes | None = decode_huffman(data)
    except HPACKError:
        expected = None
    if expected is None:
        with pytest.raises(Http2Error):
            unhuffman(data)
    else:
        assert unhuffman(data) == expected


def test_a_list_beyond_the_limit_is_refused_however_short_its_block_is() -> None:
    """A bomb: one large entry, named again and again by one octet each."""
    entry = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000
    ours = Decoder(LIST_BYTES_MAX)
    ours.decode(entry)
    assert len(ours.decode(b"\xbe" * 16)) == 16
    ours.check()
    assert ours.decode(b"\xbe" * 17 + b"\x40\x01b\x01c") == [], "nothing of it is kept"
    with pytest.raises(StreamError) as caught:
        ours.check()
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM
    assert ours.table[0] == (b"b", b"c"), "but what it adds to the table, as the other end's does"
    assert ours.decode(b"\xbe") == [(b"b", b"c")]
    ours.check()
    ours.decode(entry)
    with pytest.raises(Http2Error):
        ours.decode(b"\xbe" * 17 + b"\x20")


def test_the_table_stays_within_its_size_whatever_comes() -> None:
    ours = Decoder(LIST_BYTES_MAX)
    for n in range(3000):
        ours.decode(b"\x40\x04n%03d" % (n % 1000) + b"\x7f\x49" + b"v" * 200)
        assert sum(len(name) + len(value) + 32 for name, value in ours.table) <= TABLE_BYTES
    assert len(ours._entries) <= 256, "what was dropped is let go of"
    ours.decode(b"\x40\x01a\x7f\x85\x1f" + b"v" * 4100)  # larger than the table: it empties it
    assert ours.table == []
    for size in (b"\x20", b"\x3f\xe1\x1f"):
        ours.decode(size)
    with pytest.raises(Http2Error):
        ours.decode(b"\x3f\xe2\x1f")  # 4097


def test_our_table_stays_within_what_is_ours_whatever_is_offered() -> None:
    ours, theirs = Encoder(), TheirDecoder()
    theirs.max_allowed_table_size = 1 << 31
    ours.allow(1 << 31)
    for n in range(2000):
        fields = [(b"x-%d" % (n // 2), b"v" * 100)]
        assert theirs.decode(ours.encode(fields), raw=True) == fields
    assert theirs.header_table_size == TABLE_BYTES
    assert len(ours._fields) <= TABLE_BYTES // 132
    assert len(ours._order) <= 256
    assert len(ours._seen) <= 64


def test_what_is_too_large_for_the_table_is_not_remembered() -> None:
    ours, theirs = Encoder(), TheirDecoder()
    for n in range(100):
        fields = [(b"x-large", b"%d" % n + b"v" * 30_000), (b"x-limit", b"%3d" % n + b"v" * 1000)]
        assert theirs.decode(ours.encode(fields), raw=True) == fields
    assert sum(len(name) + len(value) for name, value in ours._seen) <= 64 * TABLE_BYTES // 4


def test_what_differs_each_time_drives_nothing_out() -> None:
    ours, theirs = Encoder(), TheirDecoder()
    same = [(b"x-same", b"1"), (b"user-agent", b"grpc")]
    for n in range(500):
        fields = [*same, (b"traceparent", b"00-%032x-01" % n), (b"grpc-timeout", b"%dm" % n)]
        assert theirs.decode(ours.encode(fields), raw=True) == fields
    assert sorted(table(theirs)) == sorted(same)


def test_secrets_are_in_no_table_and_marked_so() -> None:
    ours, theirs = Encoder(), TheirDecoder()
    fields: list[Any] = [
        (b"authorization", b"Bearer x"),
        (b"proxy-authorization", b"Basic x"),
        (b"cookie", b"a=short"),
        NeverIndexedHeaderTuple(b"x-secret", b"said so"),
    ]
    for _ in range(3):
        read = theirs.decode(ours.encode(fields), raw=True)
        assert [type(field) for field in read] == [NeverIndexedHeaderTuple] * 4
    assert table(theirs) == []
