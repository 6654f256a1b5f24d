"""Traffic management as its user has it: the command, real agents and sidecars, plain HTTP clients."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from cli.demo_stage import wait_until
from cli.hclfile import entry_of
from tests.e2e.support_e2e import Mesh
from tests.support.apps import QuietHandler, serving_http
from tests.support.promises import PATIENCE_S, Since

TIMEOUT_S = PATIENCE_S


def shop(name: str) -> AbstractContextManager[int]:
    """An HTTP app that answers with its name and what it was asked."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if self.path == "/hang":
                time.sleep(3)
            body = json.dumps({"name": name, "path": self.path, "by": self.headers.get("X-Way", "")}).encode()
            self.answer(503 if self.path == "/busy" and name == "v1" else 200, body)

    return serving_http(Handler)


def get(address: str, path: str = "/", **headers: str) -> tuple[int, dict[str, str]]:
    host, _, port = address.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def names(address: str, count: int, path: str = "/", **headers: str) -> Counter[str]:
    return Counter(get(address, path, **headers)[1].get("name", "nobody") for _ in range(count))


RESOLVER = """
Kind = "service-resolver"
Name = "shop"
DefaultSubset = "v1"
Subsets = {
  v1 = { Filter = "Service.Meta.version == v1" }
  v2 = { Filter = "Service.Meta.version == v2" }
}
Failover = { v1 = { ServiceSubset = "v2" } }
"""
SPLITTER = """
Kind = "service-splitter"
Name = "shop"
Splits = [
  { Weight = %s, ServiceSubset = "v1", RequestHeaders { Set { x-way = "stable" } } },
  { Weight = %s, ServiceSubset = "v2", RequestHeaders { Set { x-way = "canary" } } },
]
"""
ROUTER = {
    "Kind": "service-router",
    "Name": "shop",
    "Routes": [
        {
            "Match": {"HTTP": {"PathPrefix": "/v2/", "Header": [{"Name": "X-Tester", "Exact": "1"}]}},
            "Destination": {"ServiceSubset": "v2", "PrefixRewrite": "/"},
        },
        {
            "Match": {"HTTP": {"PathExact": "/hang"}},
            "Destination": {"ServiceSubset": "v1", "RequestTimeout": "300ms"},
        },
    ],
}


def test_a_canary_from_its_first_entry_to_its_end(lictor: Mesh) -> None:
    def config(*words: str, may_fail: bool = False) -> Any:
        return lictor.lictor("config", *words, host=0, quiet=True, may_fail=may_fail)

    def write(entry: str | dict[str, Any], *, refused: str = "") -> None:
        if not refused:
            lictor.api().put("/v1/config", entry if isinstance(entry, dict) else entry_of(entry))
            return
        (lictor.directory / "entry").write_text(entry if isinstance(entry, str) else json.dumps(entry))
        done = config("write", "entry", may_fail=True)
        assert (done.returncode, refused in done.stderr) == (1, True), done.stderr

    with ExitStack() as stack:
        write('Kind = "service-defaults"\nName = "shop"\nProtocol = "http"\n')
        for host, version in enumerate(("v1", "v2")):
            row = {
                "Name": "shop",
                "ID": version,
                "Port": stack.enter_context(shop(version)),
                "Meta": {"version": version},
            }
            lictor.api(host).put("/v1/agent/service/register", row)
            lictor.home(version)
            lictor.sidecar(version, host, ["-service-id", version], {})
        lictor.lictor("intentions", "create", "guest", "shop", host=0)
        lictor.stand("guest", "guest-1", upstreams="backend=shop")
        address = lictor.upstream("guest-1").replace("localhost", "127.0.0.1")
        assert wait_until(lambda: set(names(address, 8)) == {"v1", "v2"}, TIMEOUT_S)

        # Order matters: what refers to a subset that is not there is refused, by its field.
        write(SPLITTER % (90, 10), refused="Splits[0].ServiceSubset")
        write(RESOLVER)
        assert wait_until(lambda: set(names(address, 8)) == {"v1"}, TIMEOUT_S)
        write(SPLITTER % (90, 11), refused="add up to 101")
        write(SPLITTER % (70, 30))
        assert wait_until(lambda: set(names(address, 8)) == {"v1", "v2"}, TIMEOUT_S)
        assert 30 < names(address, 200)["v2"] < 95
        assert {get(address)[1]["by"] for _ in range(20)} == {"stable", "canary"}
        write(ROUTER)
        assert wait_until(lambda: names(address, 8, "/v2/x", X_Tester="1") == {"v2": 8}, TIMEOUT_S)
        assert get(address, "/v2/x?y=1", X_Tester="1")[1]["path"] == "/x?y=1"
        assert len(names(address, 40, "/v2/x", X_Tester="2")) == 2
        since = Since()
        assert get(address, "/hang")[0] == 504
        since.took(1.5, "the bounded request")
        write('Kind = "service-defaults"\nName = "shop"\nProtocol = "tcp"\n', refused="requests can only be routed")
        deleted = config("delete", "-kind", "service-resolver", "-name", "shop", may_fail=True)
        assert (deleted.returncode, "without a way" in deleted.stderr) == (1, True)

        # What the instance says of itself anew moves it, without a word to its sidecar.
        lictor.api(1).put("/v1/agent/service/register", {**row, "Meta": {"version": "v1"}})

        def ways() -> set[tuple[str, str]]:
            answers = [get(address)[1] for _ in range(20)]
            return {(answer["name"], answer["by"]) for answer in answers if "name" in answer}

        assert wait_until(lambda: ("v2", "stable") in ways(), TIMEOUT_S)
        lictor.api(1).put("/v1/agent/service/register", row)
        assert wait_until(lambda: ways() == {("v1", "stable"), ("v2", "canary")}, TIMEOUT_S)

        # The stable ones go: the canary takes over, and gives back.
        lictor.end_background("v1")
        assert wait_until(lambda: names(address, 10) == {"v2": 10}, TIMEOUT_S)
        lictor.sidecar("v1", 0, ["-service-id", "v1"], {})
        assert wait_until(lambda: len(names(address, 10)) == 2, TIMEOUT_S)

        write(SPLITTER % (0, 100))
        assert wait_until(lambda: names(address, 8) == {"v2": 8}, TIMEOUT_S)
        assert config("list", "-kind", "service-splitter").stdout == "shop\n"
        assert (
            json.loads(config("read", "-kind", "service-splitter", "-name", "shop").stdout)["Splits"][0]["Weight"]
            == 0
        )
        for kind in ("service-router", "service-splitter", "service-resolver", "service-defaults"):
            config("delete", "-kind", kind, "-name", "shop")
        assert wait_until(lambda: set(names(address, 8)) == {"v1", "v2"}, TIMEOUT_S)
