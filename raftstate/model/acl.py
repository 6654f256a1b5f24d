"""Access tokens as the state keeps them: no secret is stored, only its hash."""

from __future__ import annotations

from typing import Any

from raftstate.model.wire import Wire


class Token(Wire, frozen=True):
    """An access token. ``document`` holds what the API shows beside these fields (policies, roles, description)."""

    accessor_id: str
    secret_hash: str
    """Lower-case hex SHA-256 of the secret."""
    document: dict[str, Any] = {}
    create_time: str = ""
    expiration_time: str = ""
    create_index: int = 0
    modify_index: int = 0
