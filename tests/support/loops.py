"""Running a test on each event loop that a process of ours may have chosen."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.support.both_loops import LOOPS
from tests.support.sidecars import Mesh


def with_mesh(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Give an async test a :class:`Mesh` as ``mesh``, and run it on asyncio's loop, uvloop and a sidecar's own."""
    signature = inspect.signature(test)
    others = [parameter for name, parameter in signature.parameters.items() if name != "mesh"]

    def run(loop_name: str, **arguments: Any) -> None:
        async def body() -> None:
            async with Mesh() as mesh:
                await test(mesh=mesh, **arguments)

        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(body())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    run.__module__ = test.__module__
    run.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    loop_parameter = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([loop_parameter, *others])  # type: ignore[attr-defined]
    parametrized: Callable[..., None] = pytest.mark.parametrize("loop_name", list(LOOPS))(run)
    return parametrized
