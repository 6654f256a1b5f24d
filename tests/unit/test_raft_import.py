"""What importing the adapter does to the rest of the process: nothing."""

from __future__ import annotations

import subprocess
import sys


def test_the_adapter_leaves_the_socket_module_as_it_was() -> None:
    program = (
        "import socket; before = dict(vars(socket));"
        "import raftstate.raft_driven;"
        "changed = [name for name, value in before.items() if vars(socket).get(name) is not value];"
        "assert not changed, changed;"
        "assert socket.inet_ntop(socket.AF_INET, bytes(4)) == '0.0.0.0'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
