"""The one stream of configuration from an agent to a sidecar.

The agent serves it as newline-delimited JSON at ``POST /v1/agent/connect/proxy/<sidecar-id>/stream``. Each line
is one :class:`SidecarUpdate`; a section that is not ``None`` replaces the sidecar's copy whole. The first line
carries every section; an update with no section is a heartbeat. When the stream ends, the sidecar keeps what
it has and dials again: nothing opens that was closed, nothing closes that was open.
"""

from __future__ import annotations

from typing import NamedTuple

from raftstate.model.connect import Leaf, Revocation
from raftstate.model.intention import Intention
from raftstate.model.plan import Plan
from raftstate.model.wire import Wire


class SidecarSelf(Wire, frozen=True):
    """Which instance the sidecar stands for and where it listens."""

    proxy_id: str
    service: str
    service_id: str
    node: str
    datacenter: str
    trust_domain: str
    public_address: str
    public_port: int
    local_address: str
    """Host of the app's own port; plain."""
    local_port: int
    """0 when the app takes no calls; the public listener then refuses every stream."""
    protocol: str = "tcp"
    """``tcp``, ``http``, ``http2`` or ``grpc``: what the app speaks. With ``tcp``, L7 permissions still make the
    sidecar parse HTTP."""
    zone: str = ""
    config: dict[str, object] = {}


class Endpoint(Wire, frozen=True):
    """One instance of an upstream's service: where its sidecar's public listener is and who must answer there."""

    node: str
    address: str
    port: int
    service: str
    service_id: str
    """The instance behind the sidecar; the peer certificate's UID must equal it."""
    weight: int = 1
    zone: str = ""
    healthy: bool = True
    """False when a check is critical; kept for panic routing."""
    meta: dict[str, str] = {}


class Key(NamedTuple):
    """What makes an endpoint the same one across updates."""

    address: str
    port: int
    service: str
    instance: str


def key_of(endpoint: Endpoint) -> Key:
    """Return the endpoint's key."""
    return Key(endpoint.address, endpoint.port, endpoint.service, endpoint.service_id)


LEFT_MAX = 1000
"""How many instances that its calls have left a sidecar may bring to an agent's mind again, for one upstream."""


class SidecarUpstream(Wire, frozen=True):
    """One upstream listener and the instances behind it."""

    name: str
    service: str
    """Resolved service name; empty while it cannot be resolved (then ``error`` says why)."""
    bind_address: str
    bind_port: int
    protocol: str = "tcp"
    endpoints: tuple[Endpoint, ...] = ()
    loopback_port: int = 0
    """When non-zero the upstream is the sidecar's own app: relay plainly to local_address at this port."""
    error: str = ""
    config: dict[str, object] = {}
    plan: Plan | None = None
    """How calls are routed, split and resolved; None: straight to ``endpoints``, which are empty with a plan."""
    targets: dict[str, tuple[Endpoint, ...]] = {}
    """With a plan: the instances of each of its targets, filtered already."""
    deregistered: tuple[Endpoint, ...] = ()
    """Instances to which calls were led before and that are no more: what is still under way there ends."""


class SidecarAnswer(Wire, frozen=True):
    """What a sidecar may say when it answers a line of its stream."""

    left: dict[str, tuple[Endpoint, ...]] = {}
    """By upstream: instances that calls were led to once and are led to no more, and of which the agent has not said
    that they are no more. Said after the stream was opened anew: an agent that has restarted does not know them."""


class SidecarUpdate(Wire, frozen=True, omit_defaults=True):
    """One line of the stream."""

    version: int
    self: SidecarSelf | None = None
    leaf: Leaf | None = None
    roots: tuple[str, ...] | None = None
    """The trust bundle, PEM, active root first."""
    intentions: tuple[Intention, ...] | None = None
    """Those whose destination may be this instance (its id, its service, ``*``), by falling precedence."""
    default_allow: bool | None = None
    """What holds when no intention matches. Missing knowledge is deny, whatever this says."""
    revocations: tuple[Revocation, ...] | None = None
    upstreams: tuple[SidecarUpstream, ...] | None = None
    registered: bool | None = None
    """False, in a stream's last line: the sidecar or its instance was deregistered. Calls to the app end, and none is
    taken until a line says True; the app's own calls go on."""
