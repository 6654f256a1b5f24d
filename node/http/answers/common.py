"""Answers of many endpoints."""

from __future__ import annotations

from typing import TypedDict


class Empty(TypedDict):
    """``{}``."""


class Created(TypedDict):
    """The id of what was made."""

    ID: str
