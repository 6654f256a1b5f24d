"""Errors of the `node` package: one root, a code that survives RPC, and the HTTP status Consul's clients expect.

A text says what to do next. The codes are part of the RPC protocol: never reuse one.
"""

from __future__ import annotations

from typing import ClassVar


class NodeError(Exception):
    """Root of everything `node` raises on purpose."""

    code: ClassVar[str] = "internal"
    http_status: int = 500


class Refused(NodeError):
    """The request was understood and turned down; asking again changes nothing until something else does."""

    code = "refusal"

    def __init__(self, message: str, *, reason: str = "refused", http_status: int = 400) -> None:
        super().__init__(message)
        self.reason = reason
        """The machine-readable kind, for example the state machine's refusal code."""
        self.http_status = http_status


class NoLeader(NodeError):
    """No leader could be reached within the time allowed; nothing is known to have been written."""

    code = "not-leader"

    def __init__(self, message: str = "", *, leader: str | None = None) -> None:
        self.leader = leader
        super().__init__(message or "No cluster leader: retry once an election has ended")


class UnknownOutcome(NodeError):
    """The write may or may not have happened; repeating it with the same request id is safe."""

    code = "unknown-outcome"

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "the outcome of this write is unknown: read the state back, or repeat it with the same request id"
        )


class Busy(NodeError):
    """A bounded queue is full; nothing was done. Try again after a short wait."""

    code = "too-busy"
    http_status = 429

    def __init__(self, message: str = "") -> None:
        super().__init__(message or "this server is too busy: try again in a moment")


class TimedOut(NodeError):
    """The deadline passed before an answer; for a write the outcome is unknown (see UnknownOutcome)."""

    code = "timeout"
    http_status = 504

    def __init__(self, message: str = "") -> None:
        super().__init__(message or "no answer within the deadline: try again with a longer one")


class BadRequest(NodeError):
    """The request itself is wrong; the text names the part."""

    code = "bad-request"
    http_status = 400


class Stopped(NodeError):
    """This process is stopping; ask another server."""

    code = "stopped"
    http_status = 503

    def __init__(self, message: str = "") -> None:
        super().__init__(message or "this node is stopping: ask another one")


class Unreachable(NodeError):
    """No server could be reached, or the connection to it broke; another server may answer."""

    code = "unreachable"
    http_status = 503

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message or "no server can be reached: check that the servers run and that the certificates match"
        )


class Overloaded(Unreachable):
    """A server that lives has more to do than it can: come back later, and not all at once."""


class PkiError(NodeError):
    """A certificate or key file is missing, unreadable or unfit; the text names the file and the remedy."""

    code = "pki"


class ConfigErrors(NodeError):
    """The configuration file is wrong; `problems` lists every fault, each naming its key and the fix."""

    code = "config"

    def __init__(self, path: str, problems: list[str]) -> None:
        self.path, self.problems = path, tuple(problems)
        super().__init__(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  - {line}" for line in problems))


_BY_CODE: dict[str, type[NodeError]] = {
    kind.code: kind for kind in (NoLeader, UnknownOutcome, Busy, TimedOut, BadRequest, Stopped, Unreachable)
}


def to_wire(error: NodeError) -> tuple[str, str, str, int]:
    """Return (code, text, reason, http status): what an RPC error reply carries."""
    reason = error.reason if isinstance(error, Refused) else ""
    return error.code, str(error), reason, error.http_status


def from_wire(code: str, text: str, reason: str, http_status: int) -> NodeError:
    """Rebuild an error from an RPC reply; a code of a newer version becomes a plain NodeError with its text."""
    if code == Refused.code:
        return Refused(text, reason=reason, http_status=http_status)
    kind = _BY_CODE.get(code)
    error = kind(text) if kind is not None else NodeError(text or f"the server failed with {code!r}: see its log")
    error.http_status = http_status
    return error
