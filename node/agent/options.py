"""How an agent is set up: handed in by the process that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class AgentOptions:
    """One node's agent."""

    node: str
    address: str
    """How others reach this node."""
    data_dir: Path
    """The agent keeps its files in ``agent/`` below it."""
    datacenter: str = "dc1"
    zone: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    is_server: bool = False
    rpc_port: int = 0
    http_port: int = 8500
    dns_port: int = 8600
    grpc_port: int = 0
    """Where Envoys of this host get their configuration; 0: nowhere."""
    default_allow: bool = False
    """Whether a call that no intention matches is allowed (``default_intention_policy``)."""
    enable_script_checks: bool = False
    sync_interval_s: float = 60.0
    """Period of the full comparison with the catalog; jittered."""
    register_wait_s: float = 5.0
    """How long a registration waits for the catalog before it is left to anti-entropy."""
    heartbeat_s: float = 3.0
    """Period of the empty lines on a sidecar's stream."""
    sidecar_silence_s: float = 10.0
    """A sidecar that answers its lines and has not done so for this long is taken for stopped: its check is critical
    until it answers again."""
    sidecar_grace_s: float = 10.0
    """How long after a start of the agent a sidecar may take to stream again before its check turns critical."""
    sidecar_port_min: int = 21000
    """Automatic ports of ``Connect.SidecarService``: Consul's range 21000 to 21255."""
    sidecar_port_max: int = 21255
