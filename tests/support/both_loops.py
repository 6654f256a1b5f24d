"""Running an async test on each event loop that a process of ours may run on.

They differ in when a connection is first read, and in what their clocks say.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest
import uvloop

from proxy.event_loop import SidecarLoop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    "sidecar": SidecarLoop,
}
"""The first two are a node's."""

AsyncTest = Callable[..., Coroutine[Any, Any, None]]


def both_loops(test: AsyncTest) -> Callable[..., None]:
    """Make an async test a plain one that runs on asyncio's loop and on uvloop."""
    return _on(("asyncio", "uvloop"), test)


def all_loops(test: AsyncTest) -> Callable[..., None]:
    """Make an async test a plain one that runs on these and on a sidecar's own loop."""
    return _on(LOOPS, test)


def _on(loops: Iterable[str], test: AsyncTest) -> Callable[..., None]:
    signature = inspect.signature(test)

    def run(loop_name: str, **arguments: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(test(**arguments))

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    run.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    first = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([first, *signature.parameters.values()])  # type: ignore[attr-defined]
    parametrized: Callable[..., None] = pytest.mark.parametrize("loop_name", list(loops))(run)
    return parametrized
