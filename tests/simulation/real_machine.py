"""The real state machine behind the small one's face: its key/value rows are the registers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from raftstate.state.commands import Envelope, KVSet, encode_envelope
from raftstate.state.machine import StateMachine
from raftstate.state.refusal import REUSED
from tests.support.raft_machine import TestApplied


class RealMachine:
    """`raftstate.state.machine.StateMachine`, which remembers request ids, snapshots and digests by itself."""

    def __init__(self) -> None:
        self.inner = StateMachine()

    @property
    def registers(self) -> dict[str, str]:
        return {key: (row.value or b"").decode() for key, row in self.inner.store.kv.rows.items()}

    def apply(self, index: int, data: bytes) -> TestApplied:
        request, key, value = msgspec.msgpack.decode(data, type=tuple[str, str, str | None])
        row = self.inner.store.kv.rows.get(key)
        if value is None:
            # A retry computes another sum here, which makes it another command: it must be refused, not counted.
            value = str(int((row.value or b"0") if row is not None else b"0") + 1)
        before = self.inner.store.requests.rows.get(request)
        command: Any = KVSet(key, value.encode())
        applied = self.inner.apply(index, encode_envelope(Envelope(request, "2026-01-01T00:00:00Z", command)))
        if before is not None and applied.refusal is not None:
            assert key == "n", applied.refusal
            assert applied.refusal.code == REUSED, applied.refusal
            return TestApplied(before.index, None)
        assert applied.refusal is None, applied.refusal
        # What the first attempt left behind is in the log; the referee knows it.
        return TestApplied(applied.index, value if before is None else None)

    def snapshot(self) -> Any:
        return self.inner.snapshot()

    @property
    def offset(self) -> int:
        return self.inner.offset

    def restorer(self) -> Any:
        return self.inner.restorer()

    def restore(self, chunks: Iterable[bytes]) -> None:
        self.inner.restore(chunks)

    def digest(self) -> str:
        return self.inner.digest()
