"""What a client agent does not load when it starts: its memory is mostly code, and each shows in every agent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from node import pki
from node.config import parse_config
from tests.support.ports import free_ports

NOT_NEEDED = {
    "cryptography": "7 MiB; comes with the first leaf certificate",
    "re2": "3 MiB with libstdc++; comes with the first pattern of a permission, a route or a filter",
    "lark": "3 MiB; comes with the first filter expression",
    "grpc": "17 MiB with Envoy's messages; comes with the first Envoy",
    "google.protobuf": "comes with the first Envoy",
    "node.xds.server": "comes with the first Envoy",
    "pysyncobj": "servers only",
    "raftstate.replica": "servers only",
    "raftstate.state.queries": "servers only: an agent asks them",
    "node.server_process": "servers only",
    "node.ca": "servers only",
    "node.pki": "issues certificates of nodes, which commands do",
    "proxy.sidecar": "a sidecar is a process of its own",
    "h2": "gRPC checks only",
    "rich": "commands only",
    "psutil": "commands only",
}

PROGRAM = """
import json, logging, os, signal, sys
from cli.main import main

class AtReady(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("ready: "):
            print(json.dumps(sorted(sys.modules)), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

logging.getLogger("lictor.node").addHandler(AtReady())
sys.exit(main(["agent", "-config", sys.argv[1], "-node", "client-1"]))
"""


def test_a_client_agent_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    rpc, http, dns, grpc = free_ports(4)
    path = tmp_path / "cluster.toml"
    path.write_text(
        f'[nodes.server-1]\nrole = "server"\nrpc_port = {rpc}\n'
        f'[nodes.client-1]\nrole = "client"\nhttp_port = {http}\ndns_port = {dns}\ngrpc_port = {grpc}\n'
    )
    pki.ensure_local_pki(parse_config(path.read_text(), path))
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"node.http.health", "node.dns", "node.xds.door", "node.server_link"} <= loaded, "the agent did not start"
    found = {name: why for name, why in NOT_NEEDED.items() if name in loaded}
    assert not found, f"the agent's start loads what it does not need: {found}"
