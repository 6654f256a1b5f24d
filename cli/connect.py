"""``lictor connect``: stand a sidecar before a service's instance, and perhaps start the app behind it."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from cli import envoy
from cli.client import API_FLAGS, Api
from cli.envoy import registered
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag, duration, port, ratio, whole
from cli.proxyfile import MAX_WORKERS, ProxyService, choose, read_proxy_file
from cli.registered_sidecar import as_proxy_service, kept
from cli.upstreams import merge, parse_upstreams


def _names(args: Args) -> tuple[str, str, ProxyService | None]:
    """Return (service name, instance id, entry of the proxy file) as flags and file tell; a name may be empty."""
    instance = args.text("service-id") or args.text("id")
    if args.given("id") and args.given("service-id") and args.text("id") != args.text("service-id"):
        raise UsageError(
            f"lictor connect: -id {args.text('id')} and -service-id {args.text('service-id')} contradict each other:"
            " a sidecar stands for one instance"
        )
    name = args.text("name")
    entry = None
    if args.given("proxy"):
        path = args.text("proxy")
        entry = choose(read_proxy_file(path), name, instance if args.given("name") else "", path)
        if instance and entry.id and entry.id != instance:
            raise UsageError(f"{path} contradicts the flags: its id is {entry.id}, the command says {instance}")
        name, instance = entry.name, instance or entry.id
    instance = instance or name
    if not instance:
        raise UsageError(
            "lictor connect: which instance? Give -service-id ID, or -proxy FILE. See: lictor connect -help"
        )
    return name, instance, entry


def _service(api: Api, args: Args, name: str, instance: str, entry: ProxyService | None) -> tuple[str, int]:
    """Return the service's name and the app's port; registers it if ``-register`` asks for it and it is not there."""
    there = registered(api, instance)
    if there is not None:
        where = f"the agent has {instance} registered as {there['Service']} on port {there['Port']}"
        if there.get("Kind"):
            raise CliError(f"{where}, and it is a {there['Kind']}; -service-id must name the app's own instance")
        if name and there["Service"] != name:
            raise CliError(f"{where}, but the command says its name is {name}. Deregister it, or correct the name")
        if entry is not None and there["Port"] != entry.port:
            raise CliError(
                f"{where}, but {args.text('proxy')} says port {entry.port}. Correct one of them, or: lictor services"
                f" deregister -id {instance}"
            )
        return str(there["Service"]), int(there["Port"])
    if not args.on("register"):
        raise CliError(
            f"the agent has no service {instance}. Register it first (lictor services register -name NAME -port PORT"
            f" -id {instance}), or add -register"
        )
    if not name:
        raise UsageError("lictor connect: -register needs -name NAME or a -proxy file that says it")
    app_port = entry.port if entry is not None else 0
    api.put("/v1/agent/service/register", {"Name": name, "ID": instance, "Port": app_port})
    print(f"Registered service: {name} ({instance})", flush=True)
    return name, app_port


def _registered_sidecar(args: Args) -> dict[str, Any]:
    """Return what the agent has registered as an instance's sidecar."""
    instance = args.text("sidecar-for")
    clash = [flag for flag in ("proxy", "register", "name", "id", "service-id", "upstreams") if args.given(flag)]
    if clash:
        raise UsageError(
            f"lictor connect: -sidecar-for runs the sidecar as it is registered, and -{clash[0]} says it anew"
        )
    row = registered(Api.of(args), f"{instance}-sidecar-proxy")
    if row is None:
        raise CliError(
            f"no sidecar of {instance} is registered with this agent. Register the service with"
            f" Connect.SidecarService, or let this command do it: lictor connect -service-id {instance} -upstreams …"
        )
    if row.get("Kind") != "connect-proxy":
        raise CliError(f"{row['ID']} is no sidecar: it is registered as {row['Service']}, without Kind connect-proxy")
    return row


def _workers(args: Args, entry: ProxyService | None) -> int:
    workers = args.number("workers", entry.workers if entry else 1)
    if not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"lictor connect: -workers must be from 1 to {MAX_WORKERS}, not {workers}")
    return workers


def _tracing(args: Args) -> tuple[str, float]:
    """Return the collector's address, and the part of the untraced requests to begin a trace for."""
    endpoint, share = args.text("otlp-endpoint"), args.share("otlp-sample")
    if share and not endpoint:
        raise UsageError("lictor connect: -otlp-sample needs -otlp-endpoint, the collector that takes the spans")
    if endpoint and not _is_address(endpoint):
        raise UsageError(
            "lictor connect: -otlp-endpoint must be http:// or https:// with a host, such as http://127.0.0.1:4318,"
            " and neither user, query nor fragment"
        )
    return endpoint, share


def _otlp_headers(endpoint: str) -> tuple[tuple[str, str], ...]:
    """Return what the collector is shown: a secret, as a rule, so that no command line has it."""
    if not endpoint:
        return ()
    from proxy.otlp_headers import headers_of

    try:
        return headers_of(os.environ)
    except ValueError as error:
        raise UsageError(f"lictor connect: {error}") from None


def _is_address(url: str) -> bool:
    """Whether a URL says where to send something, and nothing else."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, brackets do not match
        return False
    return known and not (parts.username or parts.password or parts.query or parts.fragment)


def connect(args: Args) -> int:
    """Run a sidecar until it is told to end, or the child command ends."""
    row = _registered_sidecar(args) if args.given("sidecar-for") else None
    if row is None:
        name, instance, entry = _names(args)
    else:
        entry = as_proxy_service(row)
        name, instance = entry.name, args.text("sidecar-for")
    upstreams = merge(entry.upstreams if entry else (), parse_upstreams(args.text("upstreams")))
    workers = _workers(args, entry)
    otlp_endpoint, otlp_sample = _tracing(args)
    otlp_headers = _otlp_headers(otlp_endpoint)
    api = Api.of(args)
    if row is None:
        name, app_port = _service(api, args, name, instance, entry)
    else:
        app_port = entry.port if entry else 0

    from cli.sidecar_run import SidecarPlan, run_sidecar
    from proxy.sidecar import OFF

    plan = SidecarPlan(
        service=name,
        service_id=instance,
        app_port=app_port,
        protocol=entry.protocol if entry else "",
        config=entry.config if entry else {},
        registered=None if row is None else kept(row),
        public_host=args.text("public-addr") or (entry.public_host if entry else "") or "127.0.0.1",
        public_port=args.number("public-port") or (entry.public_port if entry else 0),
        upstreams=upstreams,
        admin_port=args.number("admin-port", OFF),
        drain_s=args.seconds("drain", 5.0),
        workers=workers,
        access_log=args.text("access-log"),
        otlp_endpoint=otlp_endpoint,
        otlp_headers=otlp_headers,
        otlp_sample=otlp_sample,
        command=tuple(args.rest),
    )
    return run_sidecar(plan, api, verbose=args.on("verbose"))


def env(args: Args) -> int:
    """Print the upstream variables of a running sidecar, for a shell to evaluate."""
    instance = args.text("service-id")
    there = registered(Api.of(args), f"{instance}-sidecar-proxy")
    if there is None:
        raise CliError(
            f"no sidecar of {instance} is registered with this agent. Start it: lictor connect -service-id …"
        )

    from cli.sidecar_run import environment, shell_exports

    upstreams = (there.get("Proxy") or {}).get("Upstreams") or ()
    ports = {str(one.get("UpstreamName") or one["DestinationName"]): int(one["LocalBindPort"]) for one in upstreams}
    print("\n".join(shell_exports(environment(ports))))
    return 0


_DETAILS = """
-upstreams takes NAME[=SERVICE][:PORT], several separated by commas. NAME is the service of that name; if there is
none, PORT finds the one service registered on that port which this one may call. The app reaches it at
localhost:21000 (the first free port from there) and learns that from NAME_ADDR and NAME_PORT. When PORT is the
service's own port and no service is called NAME, the upstream is the app itself.

With -- CMD ARGS the app is started once the sidecar is ready, with those variables set; signals go to it, and its
exit status is ours. Without it:  eval "$(lictor connect env -service-id ID)"
"""
FAMILIES = {
    "connect": Family(
        "Run a sidecar",
        {
            "env": Command(
                "Print the variables that tell an app its upstreams",
                env,
                (Flag("service-id", "the instance the sidecar stands for", "ID", required=True), *API_FLAGS),
            ),
            "envoy": envoy.COMMAND,
        },
        alone=Command(
            "Run the sidecar of one service instance",
            connect,
            (
                Flag("sidecar", "run a sidecar (the only way; accepted as in the walkthrough)", switch=True),
                Flag("proxy", "the file that describes the service, such as ./proxy.json", "FILE"),
                Flag("register", "register the service if it is not", switch=True),
                Flag("name", "the service's name", "NAME"),
                Flag("id", "the instance's id, for -register", "ID"),
                Flag("auto-register", "register the sidecar itself (always done)", switch=True),
                Flag("service-id", "the instance the sidecar stands for", "ID"),
                Flag("sidecar-for", "the same, with all else as it is registered (Connect.SidecarService)", "ID"),
                Flag("upstreams", "what the app calls: NAME[=SERVICE][:PORT],…", "LIST"),
                Flag("public-addr", "where other sidecars reach this one (default 127.0.0.1)", "ADDRESS"),
                Flag("public-port", "its port (default: the first free one from 20000)", "PORT", parse=port),
                Flag("admin-port", "serve figures on this loopback port; 0: the first free one from 19000", "PORT",
                     parse=port),
                Flag("drain", "how long live calls may take to end (default 5s)", "TIME", parse=duration),
                Flag("workers", "processes that serve, sharing the ports (default 1)", "N", parse=whole),
                Flag("access-log", "a line of JSON for each call, appended to it (-: printed); SIGHUP opens it anew",
                     "FILE"),
                Flag("otlp-endpoint", "send spans of traced requests to this collector, such as http://127.0.0.1:4318",
                     "URL"),
                Flag("otlp-sample", "trace this part, 0 to 1, of the requests that come without a traceparent (0)",
                     "RATIO", parse=ratio),
                Flag("verbose", "log more", switch=True),
                *API_FLAGS,
            ),
            rest=True,
            details=_DETAILS,
        ),
    )
}  # fmt: skip
