"""A small state machine with the shape of the real one: registers, request ids, a hash of all it applied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec


def command(request: str, key: str, value: str | None = None) -> bytes:
    """Write `value` to `key`, or with None add one to it as a counter; applied once per `request`."""
    return msgspec.msgpack.encode((request, key, value))


@dataclass
class TestApplied:
    __test__ = False
    index: int
    value: Any
    refusal: None = None
    touched: tuple[Any, ...] = ()


@dataclass
class RegisterMachine:
    """`dedup=False` is the planted bug 'a retry is applied twice'."""

    dedup: bool = True
    index: int = 0
    chain: str = ""
    registers: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    offset: int = 0
    """request id -> the value it left behind."""

    def apply(self, index: int, data: bytes) -> TestApplied:
        index += self.offset
        assert index > self.index, f"index {index} after {self.index}"
        self.index = index
        request, key, value = msgspec.msgpack.decode(data, type=tuple[str, str, str | None])
        self.chain = hashlib.blake2b(self.chain.encode() + data + index.to_bytes(8), digest_size=8).hexdigest()
        if request in self.requests and self.dedup:
            return TestApplied(index, self.requests[request])
        if value is None:
            value = str(int(self.registers.get(key, "0")) + 1)
        self.registers[key] = value
        self.requests[request] = value
        return TestApplied(index, value, touched=((key,),))

    def snapshot(self) -> FrozenRegisters:
        state = (self.index, self.offset, self.chain, self.registers, self.requests)
        return FrozenRegisters(msgspec.msgpack.encode(state))

    def restore(self, chunks: Iterable[bytes]) -> None:
        fresh = self.restorer()
        for chunk in chunks:
            fresh.feed(chunk)
        fresh.finish()

    def restorer(self) -> RegisterRestorer:
        return RegisterRestorer(self)

    def digest(self) -> str:
        return self.chain


class RegisterRestorer:
    """Collects chunks; what cannot be read is found by `check`."""

    def __init__(self, machine: RegisterMachine) -> None:
        self._machine, self._data = machine, bytearray()

    def feed(self, chunk: bytes) -> None:
        self._data += chunk

    def check(self) -> Any:
        form = tuple[int, int, str, dict[str, str], dict[str, str]]
        return msgspec.msgpack.decode(self._data, type=form)

    def finish(self, at: int | None = None) -> None:
        machine, before = self._machine, self._machine.offset
        machine.index, machine.offset, machine.chain, machine.registers, machine.requests = self.check()
        if at is not None:
            machine.offset = max(before, machine.index - at)


class FrozenRegisters:
    """Cut into small chunks, so that even a little state is sent in several."""

    def __init__(self, data: bytes, size: int = 512) -> None:
        self._data, self._size = data, size

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._data), self._size):
            yield self._data[start : start + self._size]

    def close(self) -> None: ...
