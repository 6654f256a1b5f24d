"""``/v1/agent``: the node itself, its members, leaving, metrics."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from contextlib import suppress
from typing import Any

from aiohttp import web

from node.errors import NodeError
from node.http.answers.agent import AgentHost, AgentMetrics, AgentSelf, AgentVersion, MemberRow
from node.http.context import VERSION, Context, Routes
from node.http.errors import BadRequest, HttpError, NotFound, NotSupported
from node.http.respond import empty, json_response
from node.http.writing import body_as
from raftstate.model.catalog import SERF_HEALTH, Check, Node
from raftstate.model.wire import Wire

routes = Routes("agent")

SHORT_WAIT_S = 1.0
"""What the cluster may take to tell something that the answer can do without."""
ALIVE, LEFT, FAILED = 1, 3, 4
SERF_PORT = 8301
LOG_LEVELS = ("trace", "debug", "info", "warn", "err", "error")


async def _ask(ctx: Context, verb: str, otherwise: Any) -> Any:
    """Run an operator's verb, but do not wait long for it."""
    with suppress(NodeError, TimeoutError):
        async with asyncio.timeout(SHORT_WAIT_S):
            return await ctx.backend.operator(verb, {})
    return otherwise


def _member(ctx: Context, node: Node, status: int, server_address: str) -> MemberRow:
    host, _, port = server_address.rpartition(":")
    tags = {
        "role": "consul" if server_address else "node",
        "dc": node.datacenter,
        "id": node.id,
        "build": f"{VERSION}:lictor",
        "vsn": "2",
    }
    if server_address:
        tags |= {"port": port, "raft_vsn": "3"}
    return {
        "Name": node.node,
        "Addr": host.strip("[]") or node.address,
        "Port": int(port) if port else SERF_PORT,
        "Tags": tags,
        "Status": status,
        "ProtocolMin": 1,
        "ProtocolMax": 5,
        "ProtocolCur": 2,
        "DelegateMin": 2,
        "DelegateMax": 5,
        "DelegateCur": 4,
    }


async def members(ctx: Context) -> list[MemberRow]:
    """Return every node with an agent, this one always among them."""
    configuration = await _ask(ctx, "raft.configuration", {"Servers": []})
    servers = {server["Node"]: server["Address"] for server in configuration["Servers"]}
    own = ctx.agent.node_row()
    nodes, failed = {own.node: own}, set[str]()
    with suppress(NodeError, TimeoutError):
        async with asyncio.timeout(SHORT_WAIT_S):
            known = await ctx.backend.query("catalog.nodes", {}, mode="stale")
            critical = await ctx.backend.query("health.state", {"state": "critical"}, mode="stale")
            nodes = {row.node: row for row in known.decode(list[Node])} | nodes
            failed = {row.node for row in critical.decode(list[Check]) if row.check_id == SERF_HEALTH}
    return [
        _member(ctx, node, FAILED if name in failed and name != own.node else ALIVE, servers.get(name, ""))
        for name, node in sorted(nodes.items())
    ]


@routes.add("GET", "/v1/agent/self", answer=AgentSelf)
async def self_(ctx: Context, request: web.Request) -> web.StreamResponse:
    """What this agent is."""
    options = ctx.agent.options
    leader, raft, found = await asyncio.gather(
        _ask(ctx, "status.leader", ""),
        _ask(ctx, "raft.status", None) if options.is_server else _nothing(),
        members(ctx),
    )
    member = next(one for one in found if one["Name"] == options.node)
    stats: dict[str, dict[str, str]] = {
        "agent": {
            "check_monitors": str(len(ctx.agent.local.checks)),
            "services": str(len(ctx.agent.local.services)),
            "unsynced": str(ctx.agent.sync.pending),
        },
        "consul": {"leader_addr": leader, "server": "true" if options.is_server else "false"},
        "runtime": {"uptime_s": str(int(time.time() - ctx.agent.started_at))},
    }
    if raft is not None:
        stats["raft"] = _raft_stats(raft)
    body: AgentSelf = {
        "Config": {
            "Datacenter": options.datacenter,
            "PrimaryDatacenter": options.datacenter,
            "NodeName": options.node,
            "NodeID": ctx.agent.node_id,
            "Revision": "lictor",
            "Server": options.is_server,
            "Version": VERSION,
            "BuildDate": "2025-01-01T00:00:00Z",
        },
        "DebugConfig": {
            "Datacenter": options.datacenter,
            "NodeName": options.node,
            "ServerMode": options.is_server,
            "ConnectEnabled": True,
            "LictorVersion": ctx.options.lictor_version,
            "HTTPPort": options.http_port,
            "DNSPort": options.dns_port,
        },
        "Coord": {"Vec": [0.0] * 8, "Error": 1.5, "Adjustment": 0.0, "Height": 0.00001},
        "Member": member,
        "Stats": stats,
        "Meta": dict(ctx.agent.node_row().meta),
        "xDS": {
            "SupportedProxies": {"envoy": []},
            "Port": options.grpc_port,
            "Ports": {"Plaintext": options.grpc_port, "TLS": 0},
        },
    }
    return json_response(request, body)


async def _nothing() -> None:
    return None


def _raft_stats(status: Any) -> dict[str, str]:
    """Return raft's figures as texts, under Consul's names (lower-case with underscores) where it has them."""
    import msgspec

    built = status if isinstance(status, dict) else msgspec.to_builtins(status)
    stats = {
        _snake(name): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in built.items()
    }
    if "role" in stats and "state" not in stats:
        stats["state"] = stats["role"]
    return stats


def _snake(name: str) -> str:
    out = ""
    for i, letter in enumerate(name):
        if letter.isupper() and i and not name[i - 1].isupper():
            out += "_"
        out += letter.lower()
    return out


@routes.add("GET", "/v1/agent/host", answer=AgentHost)
async def host(ctx: Context, request: web.Request) -> web.StreamResponse:
    """What is known of the machine: as little as is useful."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    memory = {"rssMax": usage.ru_maxrss * 1024}
    return json_response(request, {"Memory": memory, "CPU": [], "Host": {"hostname": ctx.agent.options.node}})


@routes.add("GET", "/v1/agent/version", answer=AgentVersion)
async def version(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The version of the API and of Lictor."""
    return json_response(
        request,
        {
            "SHA": "lictor",
            "BuildDate": "2025-01-01T00:00:00Z",
            "HumanVersion": VERSION,
            "FIPS": "",
            "Lictor": ctx.options.lictor_version,
        },
    )


@routes.add("GET", "/v1/agent/members", answer=list[MemberRow])
async def members_(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Every node with an agent."""
    return json_response(request, [] if "wan" in request.query else await members(ctx))


@routes.add("PUT", "/v1/agent/reload")
async def reload(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Compare the registrations with the catalog now; Lictor reads its file at start only."""
    ctx.agent.sync.compare_now()
    return empty()


@routes.add("PUT", "/v1/agent/leave")
async def leave(ctx: Context, request: web.Request) -> web.StreamResponse:
    """End the process."""
    if ctx.options.on_leave is None:
        raise NotSupported("Leaving on request", "end the process with SIGTERM")
    asyncio.get_running_loop().call_later(0.1, ctx.options.on_leave)
    return empty()


@routes.add("PUT", "/v1/agent/join/{address:.*}")
async def join(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Accepted: nodes find each other by the cluster's configuration, so there is nothing to join."""
    if not request.match_info["address"]:
        raise BadRequest("Missing address")
    return empty()


@routes.add("PUT", "/v1/agent/force-leave/{node:.*}")
async def force_leave(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Remove a node that has failed from the catalog."""
    from node.http.writing import write
    from raftstate.state import commands

    name = request.match_info["node"]
    known = await ctx.backend.query("catalog.node", {"node": name})
    if known.raw is None:
        raise HttpError(500, f"agent: No node found with name '{name}'")
    if any(one["Name"] == name and one["Status"] == ALIVE for one in await members(ctx)):
        raise HttpError(500, f"node {name!r} is alive: stop its agent first")
    await write(ctx, request, commands.DeregisterNode(node=name))
    return empty()


_GAUGES = {
    "lictor.agent.services": "Services registered at this agent.",
    "lictor.agent.checks": "Checks registered at this agent.",
    "lictor.agent.unsynced": "Services and checks that the servers do not know as this agent does.",
    "lictor.agent.views": "Answers that this agent keeps up to date for those who ask it.",
    "lictor.agent.sidecar_streams": "Sidecars that this agent configures.",
    "lictor.process.tasks": "Tasks of the event loop.",
    "lictor.process.cpu_seconds": "Processor time used since the start.",
    "lictor.process.rss_bytes_max": "Greatest resident memory since the start.",
    "lictor.process.uptime_seconds": "Time since the start.",
}
"""What this agent's figures are."""


@routes.add("GET", "/v1/agent/metrics", answer=AgentMetrics, text="text/plain")
async def metrics(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Figures of this agent, as JSON or with ``?format=prometheus`` as text."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    gauges = {
        "lictor.agent.services": len(ctx.agent.local.services),
        "lictor.agent.checks": len(ctx.agent.local.checks),
        "lictor.agent.unsynced": ctx.agent.sync.pending,
        "lictor.agent.views": len(ctx.agent.views),
        "lictor.agent.sidecar_streams": len(ctx.agent.streams),
        "lictor.process.tasks": len(asyncio.all_tasks()),
        "lictor.process.cpu_seconds": usage.ru_utime + usage.ru_stime,
        "lictor.process.rss_bytes_max": usage.ru_maxrss * 1024,
        "lictor.process.uptime_seconds": time.time() - ctx.agent.started_at,
    }
    if request.query.get("format") == "prometheus":
        lines = []
        for name, value in gauges.items():
            flat = name.replace(".", "_")
            lines.append(f"# HELP {flat} {_GAUGES[name]}\n# TYPE {flat} gauge\n{flat} {value:.10g}\n")
        return web.Response(text="".join(lines), content_type="text/plain", charset="utf-8")
    body = {
        "Timestamp": time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime()),
        "Gauges": [{"Name": name, "Value": value, "Labels": {}} for name, value in gauges.items()],
        "Points": [],
        "Counters": [],
        "Samples": [],
    }
    return json_response(request, body)


class _Lines(logging.Handler):
    """Queues log lines for one follower; drops the oldest when it does not keep up."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.queue: asyncio.Queue[str] = asyncio.Queue(512)
        self._loop = asyncio.get_running_loop()
        self.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._loop.call_soon_threadsafe(self._put, text)

    def _put(self, text: str) -> None:
        if self.queue.full():
            self.queue.get_nowait()
        self.queue.put_nowait(text)


@routes.add("GET", "/v1/agent/monitor", answer=bytes, streams=True)
async def monitor(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The agent's log as it is written, from a level on."""
    level = request.query.get("loglevel", "info").lower()
    if level not in LOG_LEVELS:
        raise BadRequest(f"Unknown log level: {level[:20]}")
    name = {"trace": "DEBUG", "warn": "WARNING", "err": "ERROR"}.get(level, level.upper())
    handler = _Lines(logging.getLevelNamesMapping()[name])
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    logger = logging.getLogger("lictor")
    logger.addHandler(handler)
    try:
        while True:
            await response.write((await handler.queue.get() + "\n").encode())
    finally:
        logger.removeHandler(handler)


class TokenBody(Wire, frozen=True):
    """``PUT /v1/agent/token/:kind``."""

    token: str = ""


@routes.add("PUT", "/v1/agent/token/{kind}", body=TokenBody)
async def token(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a token that this agent uses where none is shown: ``default``, ``dns``; an empty one clears it."""
    if ctx.access is None:
        raise HttpError(401, "ACL support disabled")
    body = await body_as(ctx, request, TokenBody)
    kind = request.match_info["kind"]
    try:
        await asyncio.to_thread(ctx.access.agent_tokens.set, kind, body.token)
    except KeyError:
        raise NotFound(f"Token {kind[:40]!r} is unknown; known: {', '.join(ctx.access.agent_tokens.KINDS)}") from None
    return empty()
