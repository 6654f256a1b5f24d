"""Ids of new things: made here, because the state machine must not. A repeated request makes the same ones.

A write that is sent again under its request id must be the same command, or the state machine refuses it.
"""

from __future__ import annotations

import uuid

from aiohttp import web

from node.http.writing import request_id

_NAMESPACE = uuid.UUID("8c5f2e1a-6c1d-4f6b-9a51-0f2b7d1f3c64")


def new_id(request: web.Request, kind: str) -> str:
    """Return a UUID for a thing of this kind: random, or the one that belongs to the client's request id."""
    given = request_id(request)
    return str(uuid.uuid4() if given is None else uuid.uuid5(_NAMESPACE, f"{kind}/{given}"))
