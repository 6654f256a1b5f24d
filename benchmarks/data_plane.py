"""Compare pairs of Lictor sidecars, of HAProxy and of Envoy, and no proxy at all, in one run on one machine.

    python -m benchmarks.data_plane [--seconds 3] [--rounds 3] [--only direct,haproxy,envoy,lictor,lictor-to-envoy]
    python -m benchmarks.data_plane --loads requests --only haproxy-http,envoy-http,lictor-http

The ``-http`` pairs speak HTTP on both sides and decide each request by method and path. In ``lictor-to-envoy`` the
calling side is a Lictor sidecar and the called one an Envoy: one TLS connection for each of the app's. The pairs
``lictor-uvloop`` and ``lictor-http-uvloop`` run on uvloop in place of a sidecar's own event loop.
``lictor-2-workers`` has two workers a side; ``lictor-logged`` and ``lictor-http-logged`` write an access log.

Needs nginx, haproxy, wrk and curl on the PATH, and the extra ``lictor[envoy]``. Client, both proxies and server share
the machine's cores, so rates say little by themselves; compare within a run, and look at CPU seconds. Rounds are
interleaved; medians are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import data_plane_envoy as envoy_config
from benchmarks import data_plane_report
from cli.compiled import is_compiled
from tests.support.certs import TestCA

if TYPE_CHECKING:
    from raftstate.model.intention import Intention
    from raftstate.model.sidecar import SidecarUpdate, SidecarUpstream

CONNECTIONS = 32
BULK_MB = 1024


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


class Target:
    """Something between wrk and nginx: the port to load, the processes whose CPU counts."""

    def __init__(self, name: str, port: int, processes: list[subprocess.Popen[bytes]]) -> None:
        self.name = name
        self.port = port
        self.processes = processes

    def cpu_s(self) -> float:
        total = 0.0
        for process in self.processes:
            top = psutil.Process(process.pid)
            for each in (top, *top.children(recursive=True)):
                times = each.cpu_times()
                total += times.user + times.system
        return total

    def rss_kib(self) -> list[int]:
        found = []
        for process in self.processes:
            top = psutil.Process(process.pid)
            found.append(sum(each.memory_info().rss for each in (top, *top.children(recursive=True))) // 1024)
        return found


# Lictor


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    from proxy.event_loop import SidecarLoop

    return SidecarLoop()


async def run_sidecar(path: str) -> None:
    """Run one sidecar on a fixed configuration."""
    import msgspec

    from proxy.sidecar import Sidecar, SidecarOptions
    from proxy.workers import WorkerGroup
    from raftstate.model.sidecar import SidecarUpdate

    spec = json.loads(Path(path).read_text())  # noqa: ASYNC240 - nothing runs yet
    options = SidecarOptions(
        public_port=spec["public_port"],
        upstreams=tuple(tuple(upstream) for upstream in spec["upstreams"]),
        access_log=spec["access_log"],
    )
    workers = spec["workers"]
    sidecar = Sidecar(options) if workers == 1 else WorkerGroup(options, workers)
    await sidecar.bind()
    update = msgspec.convert(spec["update"], SidecarUpdate)

    async def updates() -> AsyncIterator[SidecarUpdate]:
        yield update
        await asyncio.Event().wait()

    await sidecar.run(updates())


def first_update(
    ca: TestCA, intention: Intention, protocol: str, service: str, port: int, local: int,
    upstreams: tuple[SidecarUpstream, ...],
) -> SidecarUpdate:  # fmt: skip
    """Return all that a sidecar needs to know: it stands for a ``service`` whose app is at ``local``."""
    from raftstate.model.sidecar import SidecarSelf, SidecarUpdate

    me = SidecarSelf(
        proxy_id=f"{service}-1-sidecar-proxy", service=service, service_id=f"{service}-1", node="n",
        datacenter="dc1", trust_domain=ca.trust_domain, public_address="127.0.0.1", public_port=port,
        local_address="127.0.0.1", local_port=local, protocol=protocol,
    )  # fmt: skip
    return SidecarUpdate(
        version=1, self=me, leaf=ca.leaf(service, f"{service}-1"), roots=(ca.root_pem,), default_allow=False,
        intentions=(intention,), revocations=(), upstreams=upstreams,
    )  # fmt: skip


def lictor(
    directory: Path,
    ca: TestCA,
    app_port: int,
    *,
    name: str = "lictor",
    http: bool = False,
    envoy_peer: bool = False,
    loop: str = "sidecar",
    workers: int = 1,
    access_log: bool = False,
) -> Target:
    """A pair on that event loop; with ``envoy_peer`` an Envoy takes the place of the called one. Each side has so
    many ``workers``, and writes an ``access_log``."""
    import msgspec

    from raftstate.model.intention import HTTPMatch, Intention, Permission
    from raftstate.model.sidecar import Endpoint, SidecarUpstream

    public, own_public, upstream = free_port(), free_port(), free_port()
    protocol = "http" if http else "tcp"
    intention = Intention(source_name="web", destination_name="backend", action="allow")
    if http:
        get = Permission("allow", HTTPMatch(path_prefix="/", methods=("GET",)))
        intention = msgspec.structs.replace(intention, action="", permissions=(get,))

    update = partial(first_update, ca, intention, protocol)

    endpoint = Endpoint("n", "127.0.0.1", public, "backend", "backend-1")
    to_backend = SidecarUpstream("backend", "backend", "127.0.0.1", upstream, protocol, endpoints=(endpoint,))
    specs = {
        "server": (public, [], update("backend", public, app_port, ())),
        "client": (own_public, [["backend", "127.0.0.1", upstream]], update("web", own_public, 0, (to_backend,))),
    }
    processes = []
    if envoy_peer:
        del specs["server"]
        config = envoy_config.inbound(ca, public, app_port, http=http)
        processes.append(envoy_config.start(directory, f"{name}-server", config))
    for side, (port, upstreams, first) in specs.items():
        path = directory / f"{name}-{side}.json"
        spec = {
            "public_port": port,
            "upstreams": upstreams,
            "update": msgspec.to_builtins(first),
            "workers": workers,
            "access_log": f"{directory}/{name}-{side}.log" if access_log else "",
        }
        path.write_text(json.dumps(spec))
        command = [sys.executable, __file__, "--sidecar", str(path), "--loop", loop]
        processes.append(subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1]))
    wait_for(upstream)
    wait_for(public)
    time.sleep(1)
    return Target(name, upstream, processes)


# Envoy


def envoy(directory: Path, ca: TestCA, app_port: int, *, name: str = "envoy", http: bool = False) -> Target:
    public, upstream = free_port(), free_port()
    processes = [
        envoy_config.start(directory, f"{name}-server", envoy_config.inbound(ca, public, app_port, http=http)),
        envoy_config.start(directory, f"{name}-client", envoy_config.outbound(ca, upstream, public, http=http)),
    ]
    wait_for(upstream)
    wait_for(public)
    return Target(name, upstream, processes)


# HAProxy


def haproxy(directory: Path, ca: TestCA, app_port: int, *, name: str = "haproxy", http: bool = False) -> Target:
    public, upstream = free_port(), free_port()
    (directory / "ca.pem").write_text(ca.root_pem)
    for service in ("web", "backend"):
        leaf = ca.leaf(service, f"{service}-1")
        (directory / f"{service}.pem").write_text(leaf.cert_pem + leaf.private_key_pem)
    mode = "http\n    http-reuse always" if http else "tcp"
    rule = "http-request deny unless { ssl_c_s_dn(cn) web } METH_GET { path_beg / }" if http else ""
    common = f"""
global
    nbthread 1
    maxconn 9000
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
    mode {mode}
    timeout connect 5s
    timeout client 60s
    timeout server 60s
"""
    server = f"""{common}
listen in
    bind 127.0.0.1:{public} ssl crt {directory}/backend.pem ca-file {directory}/ca.pem verify required
    {rule}
    server app 127.0.0.1:{app_port}
"""
    client = f"""{common}
listen out
    bind 127.0.0.1:{upstream}
    server peer 127.0.0.1:{public} ssl crt {directory}/web.pem ca-file {directory}/ca.pem verify required no-ssl-reuse
"""
    processes = []
    for side, text in (("server", server), ("client", client)):
        path = directory / f"{name}-{side}.cfg"
        path.write_text(text)
        processes.append(subprocess.Popen(["haproxy", "-f", str(path), "-db"]))
    wait_for(upstream)
    wait_for(public)
    return Target(name, upstream, processes)


# The server behind


def nginx(directory: Path) -> tuple[int, subprocess.Popen[bytes]]:
    port = free_port()
    with (directory / "bulk").open("wb") as file:
        file.truncate(BULK_MB << 20)
    config = directory / "nginx.conf"
    config.write_text(
        f"""
worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log /dev/null;
events {{ worker_connections 20000; }}
http {{
    access_log off; keepalive_requests 100000000; sendfile on; client_body_temp_path {directory}/t1;
    proxy_temp_path {directory}/t2; fastcgi_temp_path {directory}/t3; uwsgi_temp_path {directory}/t4;
    scgi_temp_path {directory}/t5;
    server {{ listen 127.0.0.1:{port} backlog=4096; root {directory}; location = / {{ return 200 "ok\\n"; }} }}
}}
"""
    )
    os.chmod(directory, 0o755)
    process = subprocess.Popen(["nginx", "-c", str(config), "-e", "/dev/null"])
    wait_for(port)
    return port, process


# Loads


def wrk(port: int, seconds: float, *headers: str, connections: int = CONNECTIONS) -> tuple[float, float]:
    """Return requests per second and requests."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency"]
    for header in headers:
        command += ["-H", header]
    output = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/"], capture_output=True, text=True, check=True
    ).stdout
    rate, total = re.search(r"Requests/sec:\s+([\d.]+)", output), re.search(r"(\d+) requests in", output)
    if rate is None or total is None:
        raise SystemExit(f"wrk said: {output}")
    if errors := re.search(r"Socket errors:.*", output):
        print("   ", errors[0], file=sys.stderr)
    return float(rate[1]), float(total[1])


def measure(target: Target, seconds: float, loads: set[str]) -> dict[str, float]:
    result = {}
    if "requests" in loads:
        before = target.cpu_s()
        rate, total = wrk(target.port, seconds)
        result["requests/s"] = rate
        result["CPU-s per 10k requests"] = (target.cpu_s() - before) / total * 10_000
    if "connections" in loads:
        before = target.cpu_s()
        rate, total = wrk(target.port, seconds, "Connection: close")
        result["connections/s"] = rate
        result["CPU-s per 10k connections"] = (target.cpu_s() - before) / total * 10_000
    if "latency" in loads:
        result["p50 µs, one at a time"] = latency_us(target.port, seconds)
    if "bulk" in loads:
        result |= measure_bulk(target)
    return result


def latency_us(port: int, seconds: float) -> float:
    command = ["wrk", "-t1", "-c1", f"-d{seconds:g}s", "--latency", f"http://127.0.0.1:{port}/"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"50%\s+([\d.]+)(us|ms)", output)
    if found is None:
        raise SystemExit(f"wrk said: {output}")
    return float(found[1]) * (1000 if found[2] == "ms" else 1)


def measure_bulk(target: Target) -> dict[str, float]:
    before = target.cpu_s()
    output = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{speed_download} %{size_download}",
         f"http://127.0.0.1:{target.port}/bulk"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    if int(output[1]) != BULK_MB << 20:
        raise SystemExit(f"{target.name}: bulk transfer was cut at {output[1]} bytes")
    cpu_s = target.cpu_s() - before
    return {"bulk MB/s": float(output[0]) / 1e6, "CPU-s per GB": cpu_s / (BULK_MB * 1.048576 / 1000)}


def idle_cost(target: Target, count: int) -> list[float]:
    """Return KiB per idle connection for each process."""
    before = target.rss_kib()
    held = []
    for _ in range(count):
        held.append(socket.create_connection(("127.0.0.1", target.port)))
    time.sleep(2 + count / 150)  # handshakes take their time
    after = target.rss_kib()
    for sock in held:
        sock.close()
    return [(now - then) / count for then, now in zip(before, after, strict=True)]


@contextlib.contextmanager
def running(directory: Path, names: list[str]) -> Iterator[list[Target]]:
    ca = TestCA()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        port, server = nginx(directory)
        processes.append(server)
        targets = []
        for name in names:
            target = Target("direct", port, []) if name == "direct" else MAKERS[name](directory, ca, port)
            processes += target.processes
            targets.append(target)
        yield targets
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


MAKERS: dict[str, Callable[..., Target]] = {
    "lictor": lictor,
    "haproxy": haproxy,
    "envoy": envoy,
    "lictor-to-envoy": partial(lictor, name="lictor-to-envoy", envoy_peer=True),
    "lictor-uvloop": partial(lictor, name="lictor-uvloop", loop="uvloop"),
    "lictor-2-workers": partial(lictor, name="lictor-2-workers", workers=2),
    "lictor-logged": partial(lictor, name="lictor-logged", access_log=True),
    "lictor-http": partial(lictor, name="lictor-http", http=True),
    "lictor-http-logged": partial(lictor, name="lictor-http-logged", http=True, access_log=True),
    "lictor-http-uvloop": partial(lictor, name="lictor-http-uvloop", http=True, loop="uvloop"),
    "haproxy-http": partial(haproxy, name="haproxy-http", http=True),
    "envoy-http": partial(envoy, name="envoy-http", http=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="direct,haproxy,envoy,lictor")
    parser.add_argument("--loads", default="requests,connections,bulk", help="also: latency")
    parser.add_argument("--idle", type=int, default=1000, help="idle connections to hold, 0: none")
    parser.add_argument("--report", type=Path, help="a Markdown file to put table and picture into")
    parser.add_argument("--section", default="data-plane", help="their place in it, and the picture's name")
    parser.add_argument("--sidecar", help=argparse.SUPPRESS)
    parser.add_argument("--loop", default="sidecar", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sidecar:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        if profile := os.environ.get("LICTOR_PROFILE"):
            import cProfile

            profiler = cProfile.Profile()

            def stop(*_: object) -> None:
                profiler.disable()
                profiler.dump_stats(f"{profile}-{Path(options.sidecar).stem}")
                os._exit(0)

            signal.signal(signal.SIGTERM, stop)
            profiler.enable()
        with asyncio.Runner(loop_factory=partial(new_loop, options.loop)) as runner:
            runner.run(run_sidecar(options.sidecar))
        return
    load = os.getloadavg()[0]
    rounds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as name, running(Path(name), options.only.split(",")) as targets:
        for _ in range(options.rounds):
            for target in targets:
                for what, value in measure(target, options.seconds, set(options.loads.split(","))).items():
                    if target.processes or not what.startswith("CPU"):
                        rounds[target.name][what].append(value)
        for target in targets:
            if target.processes and options.idle:
                costs = idle_cost(target, options.idle)
                rounds[target.name]["KiB per idle connection"] = [max(costs)]
    print(data_plane_report.table(rounds), end="")
    if options.report:
        data_plane_report.write(options.report, options.section, rounds, caption(options, load))


def caption(options: argparse.Namespace, load: float) -> str:
    """Say what the figures are and of what machine, for whoever reads them later."""
    code = "compiled" if is_compiled() else "plain Python"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: {options.rounds} rounds of {options.seconds:g} s, interleaved; medians, and "
        f"the rounds' spread as a line. {os.cpu_count()} cores, {python}, {code}, load average before {load:.1f}."
    )


if __name__ == "__main__":
    main()
