"""The compiled part of the build; everything else about the package stands in ``pyproject.toml``.

The modules below, which carry every byte of the data plane, are compiled by mypyc when the package is built. The same
files run as plain Python where they are not. See ``docs/decisions/0023-*``; CONTRIBUTING.md has the commands.

    LICTOR_PURE unset   compile where a C compiler and Python's headers are, else build plain Python and say so
    LICTOR_PURE=1       do not compile; in a source checkout, remove what was compiled before
    LICTOR_PURE=0       compile, or fail
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

COMPILED = [
    "proxy/authz/permission.py",
    "proxy/authz/policy.py",
    "proxy/authz/request.py",
    "proxy/call.py",
    "proxy/foreign.py",
    "proxy/http/connection.py",
    "proxy/http/head.py",
    "proxy/http/inbound.py",
    "proxy/http/intake.py",
    "proxy/http/known_heads.py",
    "proxy/http/options.py",
    "proxy/http/outbound.py",
    "proxy/http/parser.py",
    "proxy/http/upstream.py",
    "proxy/http2/connection.py",
    "proxy/http2/core.py",
    "proxy/http2/events.py",
    "proxy/http2/exchange.py",
    "proxy/http2/fields.py",
    "proxy/http2/frames.py",
    "proxy/http2/half.py",
    "proxy/http2/head.py",
    "proxy/http2/hpack.py",
    "proxy/http2/inbound.py",
    "proxy/http2/link.py",
    "proxy/http2/outbound.py",
    "proxy/http2/sending.py",
    "proxy/http2/streams.py",
    "proxy/mux/core.py",
    "proxy/mux/flow.py",
    "proxy/mux/frames.py",
    "proxy/mux/session.py",
    "proxy/outbound_http.py",
    "proxy/outgoing.py",
    "proxy/plain.py",
    "proxy/poller.py",
    "proxy/receiver.py",
    "proxy/relay.py",
    "proxy/secure.py",
    "proxy/stream.py",
]
"""Compiled together, as one library. A class in here may inherit from classes in here, and from no others."""

LIBRARY = "proxy._compiled"
"""What the library is called, with ``__mypyc`` after it."""
HERE = Path(__file__).resolve().parent
EXTENSION = str(sysconfig.get_config_var("EXT_SUFFIX"))
STARTED_S = time.time()
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
"""The commands that need the compiled modules; the others are asked for names and dependencies only."""


def say(text: str) -> None:
    sys.stderr.write(f"lictor: {text}\n")


def remove_libraries(root: Path, keep: set[Path]) -> None:
    """Remove what an earlier build left under ``root``: what is on no list any more would be imported too."""
    for package in sorted({source.partition("/")[0] for source in COMPILED}):
        for library in (root / package).rglob(f"*{EXTENSION}"):
            if library not in keep:
                library.unlink()


class Build(build_ext):
    """Builds extensions as setuptools does, and leaves none that is not of this build."""

    def run(self) -> None:
        built = {HERE / self.build_lib / self.get_ext_filename(extension.name) for extension in self.extensions}
        remove_libraries(HERE / self.build_lib, built)
        if self.inplace:
            remove_libraries(HERE, set())
        super().run()
        if self.inplace:
            # A source that was touched and makes the same C makes no new library, and is not newer for that; what was
            # edited while this ran is.
            for extension in self.extensions:
                os.utime(HERE / self.get_ext_filename(extension.name), (STARTED_S, STARTED_S))


def why_not() -> str | None:
    """Compile a file that needs Python's headers; return why that fails, or None."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "probe.c"
        source.write_text("#include <Python.h>\nPyMODINIT_FUNC PyInit_probe(void) { return NULL; }\n")
        extension = Extension("probe", [str(source)])
        probe = build_ext(Distribution({"ext_modules": [extension], "script_name": "setup.py"}))
        probe.build_lib = probe.build_temp = place
        try:
            probe.ensure_finalized()
            probe.run()
        except (BaseError, CCompilerError, OSError) as error:
            return f"no C compiler that finds Python.h: {str(error)[:80]}"
    return None


def extensions() -> list[Any]:
    """Return what is to be compiled: nothing, or all of it."""
    wish = os.environ.get("LICTOR_PURE", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"LICTOR_PURE is {wish!r}; unset it (compile if possible), or set 1 (never) or 0 (must)")
    if wish == "1" or not BUILDING.intersection(sys.argv[1:]):
        return []
    if (reason := why_not()) is not None:
        if wish == "0":
            raise SystemExit(f"lictor cannot be compiled, as LICTOR_PURE=0 demands: {reason}")
        say(f"NOT COMPILED, the data plane runs as plain Python and is slower: {reason}")
        say("install a C compiler and Python's headers (gcc, python3-dev) and install again to compile it")
        return []
    from mypyc.build import mypycify

    # The types of what the modules import are not at hand where pip builds in a place of its own: none are asked for.
    flags = ["--config-file=", "--ignore-missing-imports", "--no-warn-unused-ignores"]
    # Nearly all of the time goes into calls of CPython's functions: -O2 and -O3 gain nothing and take twice as long.
    found = mypycify([*flags, *COMPILED], opt_level="1", debug_level="0", group_name=LIBRARY)
    if sys.platform == "linux":
        # Calls within the library, and those into CPython, go straight there and not by way of a stub that the linker
        # made: a tenth of the CPU, and a tenth of the library.
        for extension in found:
            extension.extra_compile_args += ["-fno-plt", "-fvisibility=hidden"]
    return found


os.chdir(HERE)
setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
