"""Writes of callers that have no task: outcomes are told by calling back, all of one turn of the loop together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from raftstate.errors import RaftError

log = logging.getLogger(__name__)

Told = Callable[[Any, RaftError | None], None]
"""Called once, with (applied, None) or (None, error)."""


class Submission:
    """One write that waits; to `Replica` it is what a future is for a caller with a task."""

    __slots__ = ("_all", "_settled", "told")

    def __init__(self, all_of_them: Submissions, told: Told) -> None:
        self._all, self.told = all_of_them, told
        self._settled = False

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._settled

    def settle(self, applied: Any, error: Any) -> None:
        """Note the outcome; a second one is ignored."""
        if not self._settled:
            self._settled = True
            self._all.add(self, applied, error)

    def set_exception(self, error: RaftError) -> None:
        """Note that the outcome is not known."""
        self.settle(None, error)


class Submissions:
    """Outcomes on their way to their callers.

    The core tells outcomes while it applies. What callers do then, write to sockets and propose more, must not run in
    the midst of that: who lets the core apply calls `tell` afterwards. For outcomes of another origin the loop does.
    """

    def __init__(self, forget: Callable[[Submission], object]) -> None:
        """``forget`` is told which submissions wait no longer."""
        self._forget = forget
        self._due: list[tuple[Submission, Any, RaftError | None]] = []

    def add(self, submission: Submission, applied: Any, error: RaftError | None) -> None:
        """Have the caller told: by `tell`, or in the next turn of the loop."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self.tell)
        self._due.append((submission, applied, error))

    def tell(self) -> None:
        """Tell what is known by now."""
        if not self._due:
            return
        due, self._due = self._due, []
        for submission, applied, error in due:
            self._forget(submission)
            try:
                submission.told(applied, error)
            except Exception:
                # One caller's fault must not leave the others without their outcome.
                log.exception("raft: a caller failed at its write's outcome")
