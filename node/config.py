"""``cluster.toml``: one file describes the whole cluster; each node takes its own section. The sample at the
repository's root explains every key."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path

import msgspec

from node.config_reader import TableReader
from node.errors import ConfigErrors

SERVER, CLIENT = "server", "client"
ROLES = (SERVER, CLIENT)


class RaftTimings(msgspec.Struct, frozen=True):
    """Times of the raft core, seconds; see `raftstate.raft_config.RaftConfig` for what they trade."""

    heartbeat_s: float = 0.06
    election_timeout_min_s: float = 0.35
    election_timeout_max_s: float = 0.65


class Limits(msgspec.Struct, frozen=True):
    """Bounds; beyond them the answer is a clear refusal."""

    command_bytes_max: int = 576 * 1024
    rpc_connections_max: int = 8192
    """Open connections of agents on a server's RPC port."""
    rpc_inflight_max: int = 4096
    """Requests and streams in progress on one RPC connection."""
    rpc_handshake_timeout_s: float = 5.0
    http_connections_max: int = 20000
    http_connections_per_client_max: int = 256
    """From one address beyond this host; one of this host may have four fifths of all."""
    http_head_timeout_s: float = 10.0
    http_body_timeout_s: float = 30.0


class Liveness(msgspec.Struct, frozen=True):
    """Node failure detection."""

    heartbeat_s: float = 1.0
    node_ttl_s: float = 5.0
    """An agent not heard of for this long turns critical."""
    deregister_after_s: float = 72 * 3600.0
    """A node critical for this long leaves the catalog (Consul's reconnect timeout)."""
    remove_server_after_s: float = 72 * 3600.0
    """A server dead for this long leaves the raft membership, if that leaves three voters and most of them well."""


class NodeConfig(msgspec.Struct, frozen=True):
    """One node of the cluster."""

    name: str
    role: str
    bind_address: str
    """Where RPC listens (servers)."""
    advertise_address: str
    """How others reach this node; also its address in the catalog."""
    rpc_port: int
    """0 on a client, which does not listen for RPC."""
    join: bool
    """A server that is added to a running cluster: it does not count itself among the founding members."""
    http_address: str
    http_port: int
    """0: no plain HTTP."""
    https_port: int
    """0: no HTTPS."""
    https_cert_file: str
    https_key_file: str
    dns_address: str
    dns_port: int
    """0: no DNS."""
    data_dir: Path
    zone: str
    meta: dict[str, str]
    enable_script_checks: bool
    grpc_address: str = "127.0.0.1"
    """Where Envoys of this host get their configuration (xDS); loopback, because keys travel there in the clear."""
    grpc_port: int = 0
    """0: no xDS."""

    @property
    def is_server(self) -> bool:
        return self.role == SERVER

    @property
    def rpc_endpoint(self) -> str:
        """``host:port`` that others dial; IPv6 in brackets."""
        host = f"[{self.advertise_address}]" if ":" in self.advertise_address else self.advertise_address
        return f"{host}:{self.rpc_port}"


class ClusterConfig(msgspec.Struct, frozen=True):
    """The whole file."""

    path: Path
    datacenter: str
    dns_domain: str
    trust_domain: str
    """Empty: made once, as ``<uuid>.consul``, when the first root is made."""
    data_dir: Path
    tls_dir: Path
    default_intention_policy: str
    acl_enabled: bool
    acl_token_file: str
    """The management token that is there from the start; empty: the first one is made by ``lictor acl bootstrap``."""
    acl_default_policy: str
    """What no rule speaks of: ``deny`` or ``allow``."""
    fault_injection: bool
    log_level: str
    leaf_ttl_s: float
    raft: RaftTimings
    limits: Limits
    liveness: Liveness
    nodes: dict[str, NodeConfig]

    def servers(self) -> tuple[NodeConfig, ...]:
        """The servers, in the file's order."""
        return tuple(node for node in self.nodes.values() if node.is_server)

    def node(self, name: str) -> NodeConfig:
        """Return the named node. Raises ConfigErrors that lists the known names."""
        if name not in self.nodes:
            raise ConfigErrors(str(self.path), [f"nodes.{name}: not in this file; it has {', '.join(self.nodes)}"])
        return self.nodes[name]


def load_config(path: str | Path) -> ClusterConfig:
    """Read and check a file. Raises ConfigErrors with every fault found."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigErrors(
            str(path), [f"cannot be read: {error.strerror or error}; copy the sample cluster.toml"]
        ) from None
    return parse_config(data.decode(errors="replace"), path)


def parse_config(text: str, path: Path) -> ClusterConfig:
    """Parse the text of a file that lies (or would lie) at `path`; relative paths in it count from there."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigErrors(str(path), [f"not valid TOML: {error}"]) from None
    problems: list[str] = []
    top = TableReader("", document, problems)
    config = _cluster(top, path.absolute(), problems)
    top.finish()
    if problems:
        raise ConfigErrors(str(path), problems)
    return config


def _cluster(top: TableReader, path: Path, problems: list[str]) -> ClusterConfig:
    table = top.table("cluster")
    base = path.parent
    data_dir = base / table.text("data_dir", "lictor-data")
    tls_dir = base / table.text("tls_dir", str(data_dir / "tls"))
    acl_enabled = table.boolean("acl_enabled", False)
    token_file = table.text("acl_token_file")
    default_policy = table.choice("acl_default_policy", "deny", ("deny", "allow"))
    guarded = acl_enabled and default_policy == "deny"
    nodes = {name: _node(name, reader, base, data_dir, guarded) for name, reader in top.named_tables("nodes")}
    config = ClusterConfig(
        path=path,
        datacenter=table.text("datacenter", "dc1"),
        dns_domain=table.text("dns_domain", "consul"),
        trust_domain=table.host_name("trust_domain"),
        data_dir=data_dir,
        tls_dir=tls_dir,
        default_intention_policy=table.choice("default_intention_policy", "deny", ("deny", "allow")),
        acl_enabled=acl_enabled,
        acl_token_file=str(base / token_file) if token_file else "",
        acl_default_policy=default_policy,
        fault_injection=table.boolean("fault_injection", False),
        log_level=table.choice("log_level", "info", ("debug", "info", "warning", "error")),
        leaf_ttl_s=table.duration_s("leaf_ttl", "72h", 60.0, 8760 * 3600.0),
        raft=_raft(top.table("raft")),
        limits=_limits(top.table("limits")),
        liveness=_liveness(top.table("liveness")),
        nodes=nodes,
    )
    table.finish()
    _check_whole(config, problems)
    return config


def _raft(table: TableReader) -> RaftTimings:
    default = RaftTimings()
    timings = RaftTimings(
        heartbeat_s=table.duration_s("heartbeat", "60ms", 0.01, 10),
        election_timeout_min_s=table.duration_s("election_timeout_min", "350ms", 0.05, 60),
        election_timeout_max_s=table.duration_s("election_timeout_max", "650ms", 0.06, 120),
    )
    if not timings.heartbeat_s * 2 < timings.election_timeout_min_s < timings.election_timeout_max_s:
        table.fault("", "needs 2 x heartbeat < election_timeout_min < election_timeout_max")
        timings = default
    table.finish()
    return timings


def _limits(table: TableReader) -> Limits:
    default = Limits()
    limits = Limits(
        command_bytes_max=table.integer("command_bytes_max", default.command_bytes_max, 4096, 8 * 1024 * 1024),
        rpc_connections_max=table.integer("rpc_connections_max", default.rpc_connections_max, 8, 1_000_000),
        rpc_inflight_max=table.integer("rpc_inflight_max", default.rpc_inflight_max, 16, 1_000_000),
        rpc_handshake_timeout_s=table.duration_s("rpc_handshake_timeout", "5s", 0.1, 60),
        http_connections_max=table.integer("http_connections_max", default.http_connections_max, 8, 1_000_000),
        http_connections_per_client_max=table.integer(
            "http_connections_per_client_max", default.http_connections_per_client_max, 1, 1_000_000
        ),
        http_head_timeout_s=table.duration_s("http_head_timeout", "10s", 0.1, 3600),
        http_body_timeout_s=table.duration_s("http_body_timeout", "30s", 0.1, 3600),
    )
    table.finish()
    return limits


def _liveness(table: TableReader) -> Liveness:
    liveness = Liveness(
        heartbeat_s=table.duration_s("heartbeat", "1s", 0.05, 600),
        node_ttl_s=table.duration_s("node_ttl", "5s", 0.2, 3600),
        deregister_after_s=table.duration_s("deregister_after", "72h", 60, 8760 * 3600),
        remove_server_after_s=table.duration_s("remove_server_after", "72h", 1, 8760 * 3600),
    )
    if liveness.node_ttl_s < 2 * liveness.heartbeat_s:
        table.fault("node_ttl", "must be at least twice the heartbeat, or one lost message fails a healthy node")
    table.finish()
    return liveness


def _node(name: str, table: TableReader, base: Path, data_dir: Path, guarded: bool) -> NodeConfig:
    role = table.choice("role", CLIENT, ROLES)
    if not table.has("role"):
        table.fault("role", 'is missing: write role = "server" or role = "client"')
    bind = table.address("bind_address", "127.0.0.1")
    advertise = table.address("advertise_address", bind)
    if advertise in ("0.0.0.0", "::"):
        table.fault("advertise_address", f"must be an address that others can dial, not {advertise}")
    own_dir = table.text("data_dir")
    cert, key = table.text("https_cert_file"), table.text("https_key_file")
    http_port = table.port("http_port", 8500)
    node = NodeConfig(
        name=name,
        role=role,
        bind_address=bind,
        advertise_address=advertise,
        rpc_port=table.port("rpc_port", 8300 if role == SERVER else 0),
        join=table.boolean("join", False),
        http_address=table.address("http_address", "127.0.0.1"),
        http_port=http_port,
        https_port=table.port("https_port", 0),
        https_cert_file=str(base / cert) if cert else "",
        https_key_file=str(base / key) if key else "",
        dns_address=table.address("dns_address", "127.0.0.1"),
        dns_port=table.port("dns_port", 8600),
        data_dir=base / own_dir if own_dir else data_dir / name,
        zone=table.text("zone"),
        meta=table.text_map("meta"),
        enable_script_checks=table.boolean("enable_script_checks", False),
        grpc_address=table.address("grpc_address", "127.0.0.1"),
        # Two above HTTP's, as Consul's 8502 is; a server has no sidecars by default.
        grpc_port=table.port("grpc_port", http_port + 2 if role == CLIENT and 0 < http_port < 65534 else 0),
    )
    _check_node(node, table, guarded)
    table.finish()
    return node


def is_loopback(address: str) -> bool:
    """Return whether only this host can reach the address. A name other than ``localhost`` is not trusted to be."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _check_node(node: NodeConfig, table: TableReader, guarded: bool) -> None:
    if node.role == CLIENT and table.has("rpc_port"):
        table.fault("rpc_port", "a client does not listen for RPC: remove the key")
    if node.role == CLIENT and table.has("join"):
        table.fault("join", "is for servers: a client finds its servers in this file")
    if bool(node.https_cert_file) != bool(node.https_key_file):
        table.fault("https_cert_file", "https_cert_file and https_key_file go together: give both")
    if node.https_port and not node.https_cert_file:
        table.fault("https_port", "needs https_cert_file and https_key_file")
    if node.grpc_port and not is_loopback(node.grpc_address):
        table.fault(
            "grpc_address", f"xDS hands out private keys, on {node.grpc_address} to the network: keep 127.0.0.1"
        )
    if is_loopback(node.http_address):
        return
    if node.http_port:
        table.fault(
            "http_address",
            f"plain HTTP on {node.http_address} would let the network control the mesh: "
            "set http_port = 0 and an https_port with certificate, or keep 127.0.0.1",
        )
    if not guarded:
        table.fault(
            "http_address",
            f"the API on {node.http_address} needs tokens: set cluster.acl_enabled = true, and leave "
            'acl_default_policy at "deny"',
        )


def _check_whole(config: ClusterConfig, problems: list[str]) -> None:
    if config.acl_token_file and not config.acl_enabled:
        problems.append(
            "cluster.acl_token_file: has no effect without acl_enabled = true: set it, or remove the file"
        )
    if not config.nodes:
        problems.append("nodes: there is none; add a section like [nodes.server-1]")
        return
    if not config.servers():
        problems.append('nodes: none has role = "server"; a cluster needs 1, 3 or 5')
    elif all(node.join for node in config.servers()):
        problems.append("nodes: every server has join = true; the founding ones must not")
    if config.fault_injection:
        remote = [node.name for node in config.nodes.values() if not is_loopback(node.advertise_address)]
        if remote:
            problems.append(
                f"cluster.fault_injection: is for local clusters only, but {remote[0]} is not on loopback: remove it"
            )
    taken: dict[tuple[str, str, int], str] = {}
    for node in config.nodes.values():
        host = "loopback" if is_loopback(node.advertise_address) else node.advertise_address
        ports = (
            ("rpc_port", node.bind_address, node.rpc_port),
            ("http_port", node.http_address, node.http_port),
            ("https_port", node.http_address, node.https_port),
            ("dns_port", node.dns_address, node.dns_port),
            ("grpc_port", node.grpc_address, node.grpc_port),
        )
        for key, address, port in ports:
            where = f"nodes.{node.name}.{key}"
            # Only nodes of one host can clash; two hosts may well use the same ports.
            if port and (other := taken.setdefault((host, address, port), where)) != where:
                problems.append(f"{where}: {address}:{port} is taken by {other}: give each its own")
