"""What a command and a query cost in CPU, without raft, disk or network.

python -m benchmarks.state_apply
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from time import thread_time as cpu

import psutil

from raftstate.model.catalog import Check, Node, ServiceInstance, ServiceProxy
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from raftstate.state.queries import run_query

AT = "2026-01-01T00:00:00Z"
NODES, INSTANCES = 5_000, 50_000


class Run:
    """A machine and its log index."""

    def __init__(self) -> None:
        self.machine, self.index = StateMachine(), 0

    def apply(self, name: str, commands: Iterable[c.Command]) -> None:
        data = [c.encode_envelope(c.Envelope(f"{name}-{number}", AT, one)) for number, one in enumerate(commands)]
        began = cpu()
        for one in data:
            self.index += 1
            applied = self.machine.apply(self.index, one)
            assert applied.refusal is None, applied.refusal
        print(f"{name:<46} {(cpu() - began) / len(data) * 1e6:8.2f} us")


def timed(name: str, call: Callable[[], object], times: int = 20_000) -> None:
    call()
    began = cpu()
    for _ in range(times):
        call()
    print(f"{name:<46} {(cpu() - began) / times * 1e6:8.2f} us")


def instance(number: int) -> ServiceInstance:
    return ServiceInstance(f"n{number % NODES}", f"i{number}", f"s{number // 10}", port=8080, tags=("v1",))


def registration(number: int) -> c.CatalogRegister:
    node = f"n{number % NODES}"
    return c.CatalogRegister(Node(node, "10.0.0.1"), ServiceInstance(node, f"c{number}", f"s{number // 10}", port=80))


def sidecar(number: int) -> ServiceInstance:
    service = f"s{number // 10}"
    proxy = ServiceProxy(service, f"i{number}", local_service_port=8080)
    node = f"n{number % NODES}"
    return ServiceInstance(
        node, f"i{number}-proxy", f"{service}-sidecar-proxy", "connect-proxy", port=20000, proxy=proxy
    )


def check(number: int, status: str = "passing", output: str = "") -> Check:
    service = f"i{number}"
    return Check(f"n{number % NODES}", f"service:{service}", "alive", status, output=output, service_id=service)


def rss_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    run = Run()
    run.apply("register a node", (c.RegisterNode(Node(f"n{number}", "10.0.0.1")) for number in range(NODES)))
    run.apply(
        "register a node check",
        (c.RegisterCheck(Check(f"n{number}", "serfHealth", status="passing")) for number in range(NODES)),
    )
    before = rss_mib()
    run.apply("register an instance", (c.RegisterService(instance(number)) for number in range(INSTANCES)))
    run.apply("register its check", (c.RegisterCheck(check(number)) for number in range(INSTANCES)))
    run.apply("register its sidecar", (c.RegisterService(sidecar(number)) for number in range(INSTANCES)))
    gc.collect()
    print(f"{'memory an instance, check and sidecar':<46} {(rss_mib() - before) / INSTANCES * 1024:8.2f} KiB")
    run.apply("register a node with an instance, past agents", (registration(number) for number in range(INSTANCES)))
    run.apply("register an instance again, equal", (c.RegisterService(instance(number)) for number in range(20_000)))
    run.apply("a check turns critical", (c.RegisterCheck(check(number, "critical")) for number in range(20_000)))
    run.apply("a check turns passing", (c.RegisterCheck(check(number)) for number in range(20_000)))
    run.apply(
        "a node with 20 instances turns critical",
        (c.RegisterCheck(Check(f"n{number}", "serfHealth", status="critical")) for number in range(NODES)),
    )
    run.apply("set a key", (c.KVSet(f"app/{number % 10_000}", b"%d" % number) for number in range(50_000)))
    store = run.machine.store
    for name, params in (
        ("health.service", {"service": "s2000"}),
        ("health.connect", {"service": "s2000"}),
        ("catalog.service", {"service": "s2000"}),
        ("kv.get", {"key": "app/77"}),
    ):
        timed(f"{name}, 10 instances" if "kv" not in name else name, lambda: run_query(store, name, params))  # noqa: B023
    timed("catalog.services, 10,000 names", lambda: run_query(store, "catalog.services"), 20)
    gc.collect()


if __name__ == "__main__":
    main()
