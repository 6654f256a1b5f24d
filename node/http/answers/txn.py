"""Transactions."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class TxnKVRow(TypedDict):
    """A key as a transaction's result shows it; without its value after a write."""

    LockIndex: int
    Key: str
    Flags: int
    Value: NotRequired[str | None]
    Session: NotRequired[str]
    CreateIndex: int
    ModifyIndex: int


class TxnResult(TypedDict):
    """One result of a transaction: exactly one of these."""

    KV: NotRequired[TxnKVRow]
    Node: NotRequired[dict[str, Any]]
    Service: NotRequired[dict[str, Any]]
    Check: NotRequired[dict[str, Any]]


class TxnError(TypedDict):
    """Which operation failed, and why."""

    OpIndex: int
    What: str


class TxnAnswer(TypedDict):
    """``/v1/txn``."""

    Results: list[TxnResult] | None
    Errors: list[TxnError] | None
