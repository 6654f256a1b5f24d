"""``/v1/config`` and ``/v1/discovery-chain`` and ``lictor config``: written, checked, shown, compared and deleted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cli.main import main
from tests.support.http_api import serving

RESOLVER = {
    "kind": "service-resolver", "name": "web", "default_subset": "v1", "connect_timeout": "2s",
    "subsets": {"v1": {"filter": "Service.Meta.version == v1"}, "v2": {"filter": "Service.Meta.version == v2"}},
    "failover": {"v1": {"service_subset": "v2"}},
}  # fmt: skip


async def test_entries_are_checked_and_make_a_chain(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await node.put("/v1/config", RESOLVER)
        shown = await node.get("/v1/config/service-resolver/web")
        assert shown["Subsets"]["v2"] == {"Filter": "Service.Meta.version == v2"}
        await node.put("/v1/config", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"})
        splits = [{"Weight": 75}, {"Weight": 25, "ServiceSubset": "v2"}]
        await node.put("/v1/config", {"Kind": "service-splitter", "Name": "web", "Splits": splits})
        route = {"Match": {"HTTP": {"PathPrefix": "/x"}}, "Destination": {"PrefixRewrite": "/", "NumRetries": 2}}
        await node.put("/v1/config", {"Kind": "service-router", "Name": "web", "Routes": [route]})
        chain = (await node.get("/v1/discovery-chain/web"))["Chain"]
        assert (chain["Protocol"], chain["Default"]) == ("http", False)
        router = chain["Nodes"][chain["StartNode"]]
        assert (router["Type"], router["Routes"][0]["Definition"]["Destination"]["NumRetries"]) == ("router", 2)
        splitter = chain["Nodes"][router["Routes"][0]["NextNode"]]
        assert [split["Weight"] for split in splitter["Splits"]] == [75, 25]
        resolver = chain["Nodes"][splitter["Splits"][0]["NextNode"]]
        assert resolver["Resolver"] == {
            "Default": False, "ConnectTimeout": "2s", "Target": "v1.web.default.default.dc1",
            "Failover": {"Targets": ["v2.web.default.default.dc1"]},
        }  # fmt: skip
        target = chain["Targets"]["v2.web.default.default.dc1"]
        assert (target["Service"], target["Subset"]) == ("web", {"Filter": "Service.Meta.version == v2"})
        for entry, said in (
            (
                {"Kind": "service-router", "Name": "web", "Routes": [{"Match": {"HTTP": {"PathRegex": "["}}}]},
                "PathRegex",
            ),
            ({"Kind": "service-resolver", "Name": "web", "Subsets": {"v1": {}}}, "Splits[1].ServiceSubset"),
            ({"Kind": "service-defaults", "Name": "web", "Protocol": "tcp"}, "Routes: requests can only be routed"),
            ({"Kind": "service-defaults", "Name": "web", "MutualTLSMode": "permissive"}, "MutualTLSMode: c"),
        ):
            async with node.http.put(node.url + "/v1/config", json=entry) as answer:
                assert (answer.status, said in await answer.text()) == (400, True), await answer.text()
        async with node.http.delete(node.url + "/v1/config/service-resolver/web") as answer:
            assert answer.status == 400


async def test_the_command_writes_reads_lists_and_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(tmp_path) as node:

        async def run(*words: str) -> tuple[int, str, str]:
            code = await asyncio.to_thread(main, ["config", *words, "-http-addr", node.url])
            out = capsys.readouterr()
            return code, out.out, out.err

        file = tmp_path / "entry.json"
        file.write_text(json.dumps(RESOLVER))
        assert await run("write", str(file)) == (0, "Config entry written: service-resolver/web\n", "")
        code, shown, _ = await run("read", "-kind", "service-resolver", "-name", "web")
        entry = json.loads(shown)
        assert (code, entry["DefaultSubset"]) == (0, "v1")
        assert (await run("list", "-kind", "service-resolver"))[:2] == (0, "web\n")
        code, _, err = await run("write", "-cas", "-modify-index", "0", str(file))
        assert (code, "was not written" in err) == (1, True)
        index = str(entry["ModifyIndex"])
        assert (await run("write", "-cas", "-modify-index", index, str(file)))[0] == 0
        file.write_text(json.dumps({**RESOLVER, "subsets": {"v1": {"fliter": ""}}}))
        code, _, err = await run("write", str(file))
        assert (code, "subsets['v1'].fliter" in err.lower()) == (1, True), err
        file.write_text('Kind = "service-resolver"\nName = "web"\nDefaultSubset = "v2"\nSubsets { v2 {} }\n')
        assert (await run("write", str(file)))[0] == 0
        shown = (await run("read", "-kind", "service-resolver", "-name", "web"))[1]
        assert json.loads(shown)["DefaultSubset"] == "v2"
        file.write_text('Kind = "service-resolver')
        code, _, err = await run("write", str(file))
        assert (code, "no HCL that can be read" in err) == (2, True), err
        assert (await run("delete", "-kind", "service-resolver", "-name", "web"))[0] == 0
        assert (await run("read", "-kind", "service-resolver", "-name", "web"))[0] == 1
        assert (await run("delete", "-name", "web"))[0] == 2
