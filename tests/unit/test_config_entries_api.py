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


def sources(**said: object) -> dict[str, object]:
    return {"Kind": "service-intentions", "Name": "web", "Sources": [{"Name": "cli", **said}]}


async def test_an_intention_that_is_misspelt_opens_nothing(tmp_path: Path) -> None:
    """What is left of it when the unknown is left out would allow every request, or be no intention at all."""
    every = {"PathPrefix": "/"}
    async with serving(tmp_path) as node:
        allow = {"Action": "allow", "HTTP": {"PathExact": "/a"}}
        http = {"path_exact": "/a", "header": [{"name": "x", "exact": "Ab", "ignore_case": True}]}
        source = {"name": "cli", "permissions": [{"action": "allow", "http": http}]}
        spelt = {"kind": "service-intentions", "name": "web", "sources": [source]}
        await node.put("/v1/config", spelt)
        shown = await node.get("/v1/config/service-intentions/web")
        (permission,) = shown["Sources"][0]["Permissions"]
        assert permission["HTTP"]["PathExact"] == "/a"
        assert permission["HTTP"]["Header"][0]["IgnoreCase"] is True
        one_block = {**spelt, "sources": source}  # of HCL, where several would be a list
        await node.put("/v1/config", one_block)
        assert (await node.get("/v1/config/service-intentions/web"))["Sources"] == shown["Sources"]
        await node.put("/v1/config", shown)
        shown = await node.get("/v1/config/service-intentions/web")
        for entry, said in (
            ({**spelt, "souces": []}, "souces: there is no such field"),
            (
                sources(Permissions=[{"Action": "allow", "HTP": {"PathExact": "/a"}}]),
                "Permissions[0].HTP: there is no",
            ),
            (sources(Permissions=[{"Action": "allow", "HTTP": {"PathExat": "/a"}}]), "HTTP.PathExat: there is no"),
            (sources(Permissions=[{"Action": "allow"}]), "Sources[0].Permissions[0].HTTP: must say what is meant"),
            (
                sources(Permissions=[{**allow, "JWT": {"Providers": [{"Name": "okta"}]}}]),
                "Permissions[0].JWT: there are",
            ),
            (sources(Permissions=[{**allow, "HTTP": {"PathRegex": "("}}]), "Permissions[0]: regular expression '('"),
            (sources(Permissions=[{**allow, "HTTP": {"Methods": ["FROB"]}}]), "Methods[0]: 'FROB' is no HTTP method"),
            (sources(Permissions=[{"Action": "maybe", "HTTP": every}]), "action 'maybe' is neither allow nor deny"),
            (sources(Action="allow", Peer="east"), "Sources[0].Peer: there is no cluster peering"),
            (sources(Action=1), "Sources[0].Action: Expected `str`"),
        ):
            async with node.http.put(node.url + "/v1/config", json=entry) as answer:
                assert (answer.status, said in await answer.text()) == (400, True), await answer.text()
        for permission, said in (
            ({"Action": "allow"}, "Permissions[0].HTTP must say"),
            ({**allow, "JWT": {"Providers": [{"Name": "okta"}]}}, "Permissions[0].JWT"),
            ({"Action": "allow", "HTTP": {"Header": [{"Name": "x", "Regex": "a", "IgnoreCase": True}]}}, "case"),
            ({**allow, "HTP": {}}, "HTP"),
            ({"Action": "allow", "HTTP": {**every, "Methds": ["GET"]}}, "Methds"),
            ({"Action": "allow", "HTTP": {"Header": [{"Name": "x", "Exact": "y", "Invrt": True}]}}, "Invrt"),
        ):
            at = node.url + "/v1/connect/intentions/exact?source=cli&destination=api"
            async with node.http.put(at, json={"Permissions": [permission]}) as answer:
                assert (answer.status, said in await answer.text()) == (400, True), await answer.text()
        assert await node.get("/v1/config/service-intentions/web") == shown, "nothing of them was taken"


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
        assert await run("list", "-kind", "ingress-gateway") == (0, "", "")
        code, _, err = await run("list", "-kind", "service-reslover")
        assert (code, "invalid config entry kind: service-reslover (known: " in err) == (1, True), err


async def test_the_command_shows_what_the_entries_make_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as node:
        balancer = {"Policy": "maglev", "HashPolicies": [{"Field": "header", "FieldValue": "x-user"}]}
        more = {"request_timeout": "9s", "load_balancer": balancer}
        await node.put("/v1/config", {**RESOLVER, **more})
        await node.put("/v1/config", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"})
        splits = [{"Weight": 75}, {"Weight": 25, "ServiceSubset": "v2", "RequestHeaders": {"Set": {"x-new": "1"}}}]
        await node.put("/v1/config", {"Kind": "service-splitter", "Name": "web", "Splits": splits})
        http = {
            "PathPrefix": "/admin",
            "Methods": ["GET", "PUT"],
            "Header": [{"Name": "x", "Exact": "1", "Invert": True}],
        }
        to = {"ServiceSubset": "v2", "PrefixRewrite": "/", "NumRetries": 2, "RetryOnStatusCodes": [503]}
        routes = [{"Match": {"HTTP": http}, "Destination": to}]
        await node.put("/v1/config", {"Kind": "service-router", "Name": "web", "Routes": routes})
        assert await asyncio.to_thread(main, ["config", "chain", "web", "-http-addr", node.url]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "web (http)",
            "  path /admin…, method GET or PUT, header x not = 1",
            "                                        -> subset v2 of web; as /; 2 retries on 503",
            "  all else                              -> splitter of web",
            "splitter of web",
            "  75 %                                  -> subset v1 of web",
            "  25 %                                  -> subset v2 of web; request headers =x-new",
            "subset v1 of web                        Service.Meta.version == v1; connect within 2s; "
            "answer within 9s; maglev by header x-user; failing over to subset v2 of web",
            "subset v2 of web                        Service.Meta.version == v2; connect within 2s; "
            "answer within 9s; maglev by header x-user",
        ]
