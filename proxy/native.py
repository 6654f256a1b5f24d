"""What the compiler is told beside the types; see ``docs/decisions/0023-*``. It is not needed where the code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**_: Any) -> Callable[[type], type]:
        """``allow_interpreted_subclasses``: classes that are not compiled may inherit from this one."""
        return lambda decorated: decorated
