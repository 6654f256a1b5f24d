"""A refusal by the state machine: a value with a code for programs and a text for people."""

from __future__ import annotations

import msgspec

MALFORMED = "malformed"
INVALID = "invalid"
UNKNOWN_NODE = "unknown-node"
UNKNOWN_SERVICE = "unknown-service"
UNKNOWN_SESSION = "unknown-session"
UNKNOWN_ROOT = "unknown-root"
CHECK_FAILS = "check-fails"
CONFLICT = "conflict"
AMBIGUOUS = "ambiguous"
TOO_LARGE = "too-large"
REUSED = "request-id-reused"
INTERNAL = "internal"

HTTP_STATUS: dict[str, int] = {
    MALFORMED: 400,
    INVALID: 400,
    UNKNOWN_NODE: 500,
    UNKNOWN_SERVICE: 500,
    UNKNOWN_SESSION: 500,
    UNKNOWN_ROOT: 404,
    CHECK_FAILS: 500,
    CONFLICT: 409,
    AMBIGUOUS: 409,
    TOO_LARGE: 413,
    REUSED: 409,
    INTERNAL: 500,
}
"""The HTTP status that Consul answers with for each kind of refusal (409 where Consul has no such refusal)."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a command had no effect. ``code`` is one of this module's constants."""

    code: str
    message: str

    @property
    def http_status(self) -> int:
        """Consul's HTTP status for this kind of refusal."""
        return HTTP_STATUS.get(self.code, 400)


class Refused(Exception):
    """Carries a refusal from where it is found to `StateMachine.apply`, which undoes the command; never leaves it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(code, message)
