"""A state machine with a log index and a clock of its own, for readable tests."""

from __future__ import annotations

from typing import Any

from raftstate.model.catalog import Check, Node, ServiceInstance, ServiceProxy
from raftstate.state import commands as c
from raftstate.state.machine import Applied, StateMachine
from raftstate.state.queries import Answer, run_query


class Log:
    """Applies commands one after another; seconds of log time pass only by `pass_time`."""

    def __init__(self) -> None:
        self.machine = StateMachine()
        self.index = 0
        self.second = 0

    def apply(self, command: c.Command, request_id: str = "") -> Applied:
        self.index += 1
        at = f"2026-01-01T{self.second // 3600:02}:{self.second // 60 % 60:02}:{self.second % 60:02}Z"
        return self.machine.apply(self.index, c.encode_envelope(c.Envelope(request_id, at, command)))

    def do(self, command: c.Command) -> Any:
        """Apply a command that must not be refused; return its value."""
        applied = self.apply(command)
        assert applied.refusal is None, applied.refusal
        return applied.value

    def refused(self, command: c.Command) -> tuple[str, str]:
        """Apply a command that must be refused without effect; return code and text."""
        before = self._rows()
        applied = self.apply(command)
        assert applied.refusal is not None, applied.value
        assert not applied.touched
        assert self._rows() == before
        return applied.refusal.code, applied.refusal.message

    def _rows(self) -> list[bytes]:
        with self.machine.snapshot() as snapshot:
            return list(snapshot)[1:]

    def ask(self, query: str, /, **params: Any) -> Answer:
        return run_query(self.machine.store, query, params)

    def pass_time(self, seconds: int) -> None:
        self.second += seconds

    def node(self, name: str, status: str = "passing", **fields: Any) -> None:
        self.do(
            c.CatalogRegister(
                Node(name, f"address-of-{name}", **fields), checks=(Check(name, "serfHealth", status=status),)
            )
        )

    def service(self, node: str, id: str, name: str, **fields: Any) -> None:
        self.do(c.RegisterService(ServiceInstance(node, id, name, **fields)))

    def sidecar(self, node: str, id: str, destination: str) -> None:
        proxy = ServiceProxy(destination)
        self.service(node, id, f"{destination}-sidecar-proxy", kind="connect-proxy", proxy=proxy, port=20000)
