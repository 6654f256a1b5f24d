"""Header compression (RFC 7541): the two ends' tables, and header blocks to field lists and back.

The static table and Huffman's code are the ``hpack`` package's. Its coders are not used: they take a tenth of a
millisecond for a call's blocks, nearly all of it for what an index or a dictionary says at once.

Fields are checked where they come in as literals (:mod:`proxy.http2.fields`): what a table holds was checked then.
After one that was not well-formed, each is checked wherever it comes from.

``tests/property/test_http2_hpack.py`` holds this against the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from h2.errors import ErrorCodes
from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.struct import NeverIndexedHeaderTuple
from hpack.table import HeaderTable

from proxy.http.head import Field
from proxy.http2.errors import Http2Error, StreamError
from proxy.http2.fields import malformed, name_problem, value_problem

TABLE_BYTES: Final = 4096
"""How large either table grows: what HTTP/2 begins with (RFC 9113, section 6.5.2). We never offer more, and use no
more of what is offered to us."""
ENTRY_BYTES: Final = 32
"""What an entry costs beside its bytes (RFC 7541, section 4.1)."""
STATIC: Final[list[Any]] = [(name, value) for name, value in HeaderTable.STATIC_TABLE]
_STATIC_COUNT: Final = 61
_INTEGER_OCTETS_MAX: Final = 5
"""After the prefix: enough for 32 bits."""
_NEXT: Final[list[int]] = [state * 16 for state, _, _ in HUFFMAN_TABLE]
_FLAGS: Final[list[int]] = [flags for _, flags, _ in HUFFMAN_TABLE]
_SYMBOL: Final[list[int]] = [symbol for _, _, symbol in HUFFMAN_TABLE]
_FAIL: Final[int] = HUFFMAN_FAIL
_EMIT: Final[int] = HUFFMAN_EMIT_SYMBOL
_COMPLETE: Final[int] = HUFFMAN_COMPLETE


def never_indexed(name: bytes, value: bytes) -> Any:
    """Return a field that no end may put into a table (RFC 7541, section 6.2.3); it is sent on as such."""
    return NeverIndexedHeaderTuple(name, value)


def is_never_indexed(field: Any) -> bool:
    """Whether a field came, or is to be sent, as one that no table may hold."""
    return type(field) is NeverIndexedHeaderTuple


def _broken(text: str) -> Http2Error:
    return Http2Error(ErrorCodes.COMPRESSION_ERROR, f"a header block cannot be decoded: {text}")


def unhuffman(data: bytes) -> bytes:
    """Return what Huffman-coded data says. Raises :class:`Http2Error`."""
    out = bytearray()
    node = 0
    flags = _COMPLETE
    for octet in data:
        at = node + (octet >> 4)
        flags = _FLAGS[at]
        if flags & _FAIL:
            raise _broken("no such Huffman code")
        if flags & _EMIT:
            out.append(_SYMBOL[at])
        at = _NEXT[at] + (octet & 15)
        flags = _FLAGS[at]
        if flags & _FAIL:
            raise _broken("no such Huffman code")
        if flags & _EMIT:
            out.append(_SYMBOL[at])
        node = _NEXT[at]
    if not flags & _COMPLETE:
        raise _broken("a Huffman code is incomplete")
    return bytes(out)


class Decoder:
    """What the other end's header blocks say. Once a block has failed, none can be decoded any more."""

    def __init__(self, list_bytes_max: int) -> None:
        """``list_bytes_max``: of one field list, as RFC 9113 (section 6.5.2) reckons it."""
        self._list_bytes_max = list_bytes_max
        self._entries: list[Any] = []
        """The newest last."""
        self._first = 0
        """What is before it has been dropped."""
        self._size = 0
        self._size_max = TABLE_BYTES
        self.problem = ""
        """What is wrong with the last block's list: a field that is not well-formed, or that there are too many."""
        self._too_long = False
        """It is that."""
        self._suspect = False
        """The table may hold fields that are not."""
        self._block = b""
        self._at = 0

    @property
    def table(self) -> list[Field]:
        """The dynamic table, the newest entry first."""
        return self._entries[: self._first - 1 if self._first else None : -1]

    def decode(self, block: bytes) -> list[Field]:
        """Return the fields of a whole header block, of which :meth:`check` says whether they may be used. Raises
        :class:`Http2Error`."""
        self.problem = ""
        self._too_long = False
        self._block = block
        self._at = 0
        end = len(block)
        fields: list[Any] = []
        size = 0
        while self._at < end:
            octet = block[self._at]
            field: Any
            if octet & 0x80:
                field = self._entry(self._integer(0x7F))
            elif octet & 0x40:
                field = self._literal(0x3F)
                self._add(field)
            elif octet & 0x20:
                if size:
                    raise _broken("a change of the table's size after a field")
                self._resize(self._integer(0x1F))
                continue
            else:
                field = self._literal(0x0F)
                if octet & 0x10:
                    field = never_indexed(field[0], field[1])
            name: bytes = field[0]
            value: bytes = field[1]
            size += len(name) + len(value) + ENTRY_BYTES
            if size <= self._list_bytes_max:
                fields.append(field)
            elif fields:
                fields.clear()  # nothing is kept of what unfolds; the table goes on (RFC 9113, section 10.5.1)
        self._block = b""
        if size > self._list_bytes_max:
            self.problem = f"a header list of more than {self._list_bytes_max} bytes"
            self._too_long = True
        elif self._suspect and not self.problem:
            self.problem = _problem_of(fields)
        return fields

    def check(self) -> None:
        """Raise :class:`StreamError` when the last block's fields may not be used."""
        if self._too_long:
            raise StreamError(ErrorCodes.ENHANCE_YOUR_CALM, self.problem)
        if self.problem:
            raise malformed(self.problem)

    def _integer(self, mask: int) -> int:
        """Read an integer at the place in the block, whose prefix is ``mask`` (RFC 7541, section 5.1)."""
        block = self._block
        number = block[self._at] & mask
        self._at += 1
        if number < mask:
            return number
        shift = 0
        for _ in range(_INTEGER_OCTETS_MAX):
            if self._at >= len(block):
                raise _broken("an integer is cut off")
            octet = block[self._at]
            self._at += 1
            number += (octet & 0x7F) << shift
            if octet < 0x80:
                return number
            shift += 7
        raise _broken("an integer is too long")

    def _string(self) -> bytes:
        """Read a string at the place in the block (RFC 7541, section 5.2)."""
        block = self._block
        if self._at >= len(block):
            raise _broken("a string is missing")
        coded = block[self._at] & 0x80
        length = self._integer(0x7F)
        begin = self._at
        end = begin + length
        if end > len(block):
            raise _broken("a string is cut off")
        self._at = end
        text = block[begin:end]
        return unhuffman(text) if coded else text

    def _literal(self, mask: int) -> Any:
        index = self._integer(mask)
        if index:
            name: bytes = self._entry(index)[0]
        else:
            name = self._string()
            self._note(name_problem(name))
        value = self._string()
        self._note(value_problem(value))
        return (name, value)

    def _note(self, problem: str) -> None:
        """Both tables have to go on as the other end's do, so that the block is decoded to its end all the same."""
        if problem and not self.problem:
            self.problem = problem
            self._suspect = True

    def _entry(self, index: int) -> Any:
        """Return an entry of the two tables by its index."""
        if index <= _STATIC_COUNT:
            if index:
                return STATIC[index - 1]
        else:
            at = len(self._entries) + _STATIC_COUNT - index
            if at >= self._first:
                return self._entries[at]
        raise _broken(f"no table has an entry {index}")

    def _add(self, field: Any) -> None:
        name: bytes = field[0]
        value: bytes = field[1]
        size = len(name) + len(value) + ENTRY_BYTES
        self._entries.append(field)
        self._size += size
        self._shrink()

    def _resize(self, size: int) -> None:
        if size > TABLE_BYTES:
            raise _broken("a table larger than was offered")
        self._size_max = size
        self._shrink()

    def _shrink(self) -> None:
        """Drop what the table has no room for: all of it, where the last entry is too large (section 4.4)."""
        entries = self._entries
        while self._size > self._size_max:
            field: Any = entries[self._first]
            name: bytes = field[0]
            value: bytes = field[1]
            self._size -= len(name) + len(value) + ENTRY_BYTES
            entries[self._first] = None
            self._first += 1
        if self._first > 128:
            del entries[: self._first]
            self._first = 0


def _problem_of(fields: list[Any]) -> str:
    """Return what is wrong with one of the fields; empty when they are all well-formed."""
    for field in fields:
        name: bytes = field[0]
        value: bytes = field[1]
        problem = name_problem(name) or value_problem(value)
        if problem:
            return problem
    return ""


_STATIC_FIELDS: Final[dict[Any, int]] = {}
_STATIC_NAMES: Final[dict[bytes, int]] = {}
for _field in STATIC:
    _STATIC_FIELDS[_field] = len(_STATIC_FIELDS) + 1
    _STATIC_NAMES.setdefault(_field[0], len(_STATIC_FIELDS))
_SECRET: Final = frozenset((b"authorization", b"proxy-authorization"))
_SECRET_COOKIE_BYTES: Final = 20
"""A shorter one could be guessed from how well it compresses."""
_SEEN_MAX: Final = 64


class Encoder:
    """Header blocks for the other end.

    A field is put into the table when it is sent for the second time: what differs from call to call, as deadlines
    and trace contexts do, would else drive out what does not. Strings are sent as they are: Huffman's code would save
    a third of bytes that are few, for more CPU than anything else here takes.
    """

    def __init__(self) -> None:
        self._fields: dict[Any, int] = {}
        """Fields in the table, by which insertion they came in."""
        self._names: dict[bytes, int] = {}
        """The newest field of each name."""
        self._order: list[Any] = []
        """The newest last."""
        self._first = 0
        """What is before it has been dropped."""
        self._dropped = 0
        """How many entries were dropped from the list itself."""
        self._size = 0
        self._size_max = TABLE_BYTES
        self._least = TABLE_BYTES
        """How small the table had to be since the last block."""
        self._resized = False
        self._seen: dict[Any, bool] = {}
        """Fields sent of late that are in no table."""

    def allow(self, size: int) -> None:
        """The other end's table may be so large from now on, in bytes."""
        size = min(size, TABLE_BYTES)
        if size != self._size_max or size < self._least:
            self._size_max = size
            self._least = min(self._least, size)
            self._resized = True
            self._shrink()

    def encode(self, fields: Sequence[Any]) -> bytes:
        """Return the header block of a field list."""
        out = bytearray()
        if self._resized:
            self._tell_size(out)
        for field in fields:
            inserted = self._fields.get(field, -1)
            index = self._index(inserted) if inserted >= 0 else _STATIC_FIELDS.get(field, 0)
            never = type(field) is not tuple and is_never_indexed(field)
            if index and not never:
                if index < 0x7F:
                    out.append(0x80 | index)
                else:
                    _put_integer(out, index, 0x7F, 0x80)
            else:
                self._put_literal(out, field, never)
        return bytes(out)

    def _put_literal(self, out: bytearray, field: Any, never: bool) -> None:
        name: bytes = field[0]
        value: bytes = field[1]
        never = never or name in _SECRET or (name == b"cookie" and len(value) < _SECRET_COOKIE_BYTES)
        index = _STATIC_NAMES.get(name, 0)
        if index == 0:
            inserted = self._names.get(name, -1)
            if inserted >= 0:
                index = self._index(inserted)
        if never:
            _put_integer(out, index, 0x0F, 0x10)
        elif len(name) + len(value) + ENTRY_BYTES > self._size_max // 4:
            _put_integer(out, index, 0x0F, 0x00)  # too large for the table, and for what is remembered
        elif field in self._seen:
            _put_integer(out, index, 0x3F, 0x40)
            del self._seen[field]
            self._add((name, value))
        else:
            _put_integer(out, index, 0x0F, 0x00)
            if len(self._seen) >= _SEEN_MAX:
                self._seen.clear()
            self._seen[field] = True
        if index == 0:
            _put_integer(out, len(name), 0x7F, 0x00)
            out += name
        _put_integer(out, len(value), 0x7F, 0x00)
        out += value

    def _index(self, inserted: int) -> int:
        return _STATIC_COUNT + self._dropped + len(self._order) - inserted

    def _add(self, field: Any) -> None:
        name: bytes = field[0]
        value: bytes = field[1]
        inserted = self._dropped + len(self._order)
        self._order.append(field)
        self._fields[field] = inserted
        self._names[name] = inserted
        self._size += len(name) + len(value) + ENTRY_BYTES
        self._shrink()

    def _shrink(self) -> None:
        while self._size > self._size_max:
            field: Any = self._order[self._first]
            name: bytes = field[0]
            value: bytes = field[1]
            inserted = self._dropped + self._first
            self._order[self._first] = None
            self._first += 1
            self._size -= len(name) + len(value) + ENTRY_BYTES
            if self._fields.get(field, -1) == inserted:
                del self._fields[field]
            if self._names.get(name, -1) == inserted:
                del self._names[name]
        if self._first > 128:
            del self._order[: self._first]
            self._dropped += self._first
            self._first = 0

    def _tell_size(self, out: bytearray) -> None:
        """Say how large the table is now, and before that how small it was (RFC 7541, section 4.2)."""
        if self._least < self._size_max:
            _put_integer(out, self._least, 0x1F, 0x20)
        _put_integer(out, self._size_max, 0x1F, 0x20)
        self._least = self._size_max
        self._resized = False


def _put_integer(out: bytearray, number: int, mask: int, flags: int) -> None:
    """Add an integer whose prefix is ``mask``, with the other bits of its first octet."""
    if number < mask:
        out.append(flags | number)
        return
    out.append(flags | mask)
    number -= mask
    while number >= 0x80:
        out.append((number & 0x7F) | 0x80)
        number >>= 7
    out.append(number)
