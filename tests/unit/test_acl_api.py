"""``/v1/acl`` in Consul's shapes, and what becomes of a request whose token changes while it is under way."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from dnslib import RCODE, DNSRecord

from node.dns import DnsServer
from node.errors import NoLeader
from node.tokens import AccessControl, AgentTokens, Tokens, hash_of
from raftstate.model.acl import ANONYMOUS_ID, MANAGEMENT_ID
from raftstate.state import commands as c
from tests.support.acl import ROOT, ask, guarded, token_with
from tests.support.http_api import Node, serving
from tests.support.promises import PATIENCE_S

N1 = {"NodeName": "n1", "Datacenter": "dc1"}
READ_ALL = 'node_prefix "" { policy = "read" } service_prefix "" { policy = "read" }'


async def put(node: Node, path: str, body: Any = None, token: str = ROOT) -> Any:
    status, text, _ = await ask(node, "PUT", path, token, json=body)
    assert status == 200, (path, status, text)
    return json.loads(text) if text else None


async def get(node: Node, path: str, token: str = ROOT) -> Any:
    status, text, _ = await ask(node, "GET", path, token)
    assert status == 200, (path, status, text)
    return json.loads(text)


async def test_off_it_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        off = (("GET", "acl/tokens"), ("PUT", "acl/bootstrap"), ("PUT", "acl/login"), ("PUT", "agent/token/dns"))
        for method, path in off:
            assert (await ask(node, method, f"/v1/{path}", json={}))[:2] == (401, "ACL support disabled"), path


async def test_the_first_token_is_made_once_and_may_do_everything(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        status, text, _ = await ask(node, "PUT", "/v1/acl/bootstrap")
        made = json.loads(text)
        assert status == 200
        assert made["Policies"] == [{"ID": MANAGEMENT_ID, "Name": "global-management"}]
        assert (await ask(node, "GET", "/v1/acl/tokens", made["SecretID"]))[0] == 200
        status, text, _ = await ask(node, "PUT", "/v1/acl/bootstrap")
        assert status == 403
        assert text.startswith("Permission denied: ACL bootstrap no longer allowed (reset index: ")
        listed = await get(node, "/v1/acl/tokens")
        assert [one["AccessorID"][-4:] for one in listed if one["AccessorID"] == ANONYMOUS_ID] == ["0002"]
        assert len(listed) == 2
        assert made["SecretID"] not in json.dumps(listed), "a secret is shown once"


async def test_policies_and_roles_are_made_shown_changed_and_deleted(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        rules = 'key_prefix "app/" { policy = "read" }'
        policy = await put(node, "/v1/acl/policy", {"Name": "app", "Description": "d", "Rules": rules})
        assert (policy["Name"], policy["Rules"], policy["CreateIndex"] > 0) == ("app", rules, True)
        assert await get(node, f"/v1/acl/policy/{policy['ID']}") == policy
        assert await get(node, "/v1/acl/policy/name/app") == policy
        listed = await get(node, "/v1/acl/policies")
        assert [one["Name"] for one in listed] == ["app", "builtin/global-read-only", "global-management"]
        assert "Rules" not in listed[0]
        changed = await put(node, f"/v1/acl/policy/{policy['ID']}", {"Name": "app", "Rules": ""})
        assert changed["Hash"] != policy["Hash"]
        assert changed["ModifyIndex"] > policy["ModifyIndex"]
        body = {"Name": "r", "Policies": [{"Name": "app"}], "NodeIdentities": [N1]}
        role = await put(node, "/v1/acl/role", body)
        assert role["Policies"] == [{"ID": policy["ID"], "Name": "app"}]
        assert role["NodeIdentities"] == [N1]
        assert (await get(node, "/v1/acl/role/name/r"))["ID"] == role["ID"]
        assert [one["Name"] for one in await get(node, f"/v1/acl/roles?policy={policy['ID']}")] == ["r"]
        assert await get(node, f"/v1/acl/roles?policy={MANAGEMENT_ID}") == []
        for kind, row in (("policy", policy), ("role", role)):
            assert (await ask(node, "DELETE", f"/v1/acl/{kind}/{row['ID']}", ROOT))[:2] == (200, "true")
            assert (await ask(node, "GET", f"/v1/acl/{kind}/{row['ID']}", ROOT))[0] == 404
            assert (await ask(node, "GET", f"/v1/acl/{kind}/name/{row['Name']}", ROOT))[0] == 404


async def test_tokens_are_made_shown_cloned_changed_and_deleted(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        await put(node, "/v1/acl/policy", {"Name": "kv", "Rules": 'key_prefix "" { policy = "write" }'})
        body = {"Description": "ci", "Policies": [{"Name": "kv"}], "ServiceIdentities": [{"ServiceName": "web"}]}
        token = await put(node, "/v1/acl/token", body)
        secret = token["SecretID"]
        assert str(uuid.UUID(secret)) == secret
        assert (await put(node, "/v1/kv/a", "x", secret)) is True
        own = await get(node, "/v1/acl/token/self", secret)
        assert own == token
        shown = await get(node, f"/v1/acl/token/{token['AccessorID']}?expanded=true")
        assert shown["SecretID"] == "<hidden>"
        assert [one["Name"] for one in shown["ExpandedPolicies"]] == ["kv"]
        clone = await put(node, f"/v1/acl/token/{token['AccessorID']}/clone", {"Description": "copy"})
        assert (clone["Policies"], clone["Description"]) == (token["Policies"], "copy")
        assert clone["SecretID"] != secret
        await put(node, f"/v1/acl/token/{token['AccessorID']}", {"Description": "less"})
        assert (await ask(node, "PUT", "/v1/kv/a", secret, data=b"x"))[0] == 403
        assert (await put(node, "/v1/kv/a", "x", clone["SecretID"])) is True
        assert (await ask(node, "DELETE", f"/v1/acl/token/{clone['AccessorID']}", ROOT))[:2] == (200, "true")
        assert (await ask(node, "PUT", "/v1/kv/a", clone["SecretID"], data=b"x"))[:2] == (403, "ACL not found")
        assert (await ask(node, "GET", f"/v1/acl/token/{clone['AccessorID']}", ROOT))[:2] == (403, "ACL not found")
        given = {"AccessorID": str(uuid.uuid4()), "SecretID": str(uuid.uuid4()), "Local": True}
        made = await put(node, "/v1/acl/token", given)
        assert {name: made[name] for name in given} == given
        assert (await ask(node, "PUT", "/v1/acl/token", ROOT, json=given))[0] == 400, "it is in use"


async def test_bodies_as_go_writes_them(tmp_path: Path) -> None:
    """HashiCorp's client sends all fields of its structs: null for no links, zero times, durations in nanoseconds."""
    nothing = {"CreateIndex": 0, "ModifyIndex": 0, "Hash": None}
    async with guarded(tmp_path) as node:
        policy = await put(
            node,
            "/v1/acl/policy",
            {"ID": "", "Name": "go", "Description": "", "Rules": "", "Datacenters": None, **nothing},
        )
        token = await put(
            node,
            "/v1/acl/token",
            {
                **nothing, "AccessorID": "", "SecretID": "", "Description": "d", "Local": False,
                "Policies": [{"ID": "", "Name": "go"}], "Roles": None, "ServiceIdentities": None,
                "NodeIdentities": None, "ExpirationTTL": 3_600_000_000_000, "CreateTime": "0001-01-01T00:00:00Z",
            },
        )  # fmt: skip
        assert datetime.datetime.fromisoformat(token["ExpirationTime"]) > datetime.datetime.now(datetime.UTC)
        changed = await put(
            node, f"/v1/acl/token/{token['AccessorID']}", {**token, "Description": "e", "Policies": None}
        )
        assert (changed["Description"], "Policies" in changed) == ("e", False)
        assert changed["ExpirationTime"] == token["ExpirationTime"]
        assert (await get(node, "/v1/acl/token/self", token["SecretID"]))["Description"] == "e"
        again = await put(node, f"/v1/acl/policy/{policy['ID']}", {**policy, "Description": "f"})
        assert (again["Description"], again["ID"]) == ("f", policy["ID"])
        for row in (token, policy):
            assert len(base64.b64decode(row["Hash"])) == 32
        datetime.datetime.fromisoformat(token["CreateTime"])


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("policy", {"Name": "p", "Rules": 'key "a" { policy = "lots" }'}, "Rules: key \"a\": 'lots' is no access"),
        ("policy", {"Name": "p", "Rules": "foo = 1"}, "Rules: 'foo' is not a resource"),
        ("policy", {"Rules": ""}, "no Name is set"),
        ("policy", {"Name": "a b"}, "Name 'a b' is invalid"),
        ("policy", {"Name": "p", "ID": str(uuid.uuid4())}, "Cannot specify the ID"),
        ("policy", {"Name": "global-management"}, "already exists"),
        ("policy", {"Name": 7}, "Name"),
        ("role", {"Name": "r"}, "at least one of Policies"),
        ("role", {"Name": "r", "Policies": [{"Name": "missing"}]}, 'Policy: No such ACL policy with name "missing"'),
        ("token", {"Roles": [{"ID": str(uuid.uuid4())}]}, "Role: No such ACL role with ID"),
        (
            "token",
            {"TemplatedPolicies": [{"TemplateName": "builtin/service"}]},
            "TemplatedPolicies are not supported",
        ),
        ("token", {"SecretID": "weak"}, "SecretID must be a UUID"),
        ("token", {"AccessorID": "x"}, "AccessorID must be a UUID"),
        ("token", {"ExpirationTTL": "10s"}, "between 1m and 24h"),
        ("token", {"ExpirationTTL": "soon"}, "ExpirationTTL"),
        ("token", {"ExpirationTime": "2020-01-01T00:00:00Z"}, "between 1m and 24h"),
        ("token", {"ExpirationTime": "2030-01-01T00:00:00"}, "RFC 3339"),
        ("token", {"ServiceIdentities": [{"ServiceName": "a/b"}]}, "ServiceIdentities.ServiceName"),
        ("token/nonsense", {}, "Invalid token ID"),
    ],
)
async def test_a_fault_is_named(tmp_path: Path, path: str, body: Any, told: str) -> None:
    async with guarded(tmp_path) as node:
        status, text, _ = await ask(node, "PUT", f"/v1/acl/{path}", ROOT, json=body)
        assert 400 <= status < 500, (status, text)
        assert told in text


async def test_what_is_left_out_says_so(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        for method, path in (("POST", "login"), ("POST", "logout"), ("PUT", "auth-method"), ("PUT", "binding-rule")):
            status, text, _ = await ask(node, method, f"/v1/acl/{path}", ROOT, json={})
            assert (status, f"/v1/acl/{path} is not supported" in text) == (501, True)
        assert await get(node, "/v1/acl/auth-methods") == []


async def test_refusals_are_in_consuls_words(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        secret = await token_with(node.backend, 'key "a" { policy = "read" }')
        accessor = (await get(node, "/v1/acl/token/self", secret))["AccessorID"]
        assert (await ask(node, "PUT", "/v1/kv/a", secret, data=b"x"))[:2] == (
            403,
            f"Permission denied: token with AccessorID '{accessor}' lacks permission 'key:write' on \"a\"",
        )
        assert (await ask(node, "GET", "/v1/kv/a"))[:2] == (
            403,
            "Permission denied: anonymous token lacks permission 'key:read' on \"a\"."
            " The anonymous token is used implicitly when a request does not specify a token.",
        )
        assert (await ask(node, "GET", "/v1/acl/tokens", secret))[1].endswith("lacks permission 'acl:read'")
        assert (await ask(node, "GET", "/v1/kv/a", "no-such-secret"))[:2] == (403, "ACL not found")
        assert (await ask(node, "GET", "/v1/kv/a", "s" * 4000))[:2] == (403, "ACL not found")


async def test_identities_grant_what_a_service_and_a_node_need(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        body = {"ServiceIdentities": [{"ServiceName": "web"}], "NodeIdentities": [N1]}
        secret = (await put(node, "/v1/acl/token", body))["SecretID"]
        web = {"Name": "web", "Port": 80, "Connect": {"SidecarService": {}}}
        await put(node, "/v1/agent/service/register", web, secret)
        assert set(await get(node, "/v1/agent/services", secret)) == {"web", "web-sidecar-proxy"}
        await put(node, "/v1/agent/maintenance?enable=false", None, secret)
        status, text, _ = await ask(node, "PUT", "/v1/agent/service/register", secret, json={"Name": "db"})
        assert (status, "'service:write' on \"db\"" in text) == (403, True)
        other = {"Name": "db", "ID": "web"}
        root_status, *_ = await ask(node, "PUT", "/v1/agent/service/register", ROOT, json=other)
        assert root_status == 200
        status, text, _ = await ask(node, "PUT", "/v1/agent/service/register", secret, json=web)
        assert (status, "'service:write' on \"db\"" in text) == (403, True), "what stands there is another's"


async def test_whoever_may_write_a_node_may_clean_it_up(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        row = {
            "Node": "ext",
            "Address": "10.0.0.9",
            "Service": {"Service": "db"},
            "Check": {"Name": "c", "ServiceID": "db"},
        }
        secret = await token_with(node.backend, 'node "ext" { policy = "write" }')
        for gone in ({"CheckID": "c"}, {"ServiceID": "db"}, {}):
            await put(node, "/v1/catalog/register", row)
            status, text, _ = await ask(node, "PUT", "/v1/catalog/register", secret, json=row)
            assert (status, "'service:write' on \"db\"" in text) == (403, True)
            await put(node, "/v1/catalog/deregister", {"Node": "ext", **gone}, secret)
            other = await token_with(node.backend, 'node "other" { policy = "write" }')
            assert (await ask(node, "PUT", "/v1/catalog/deregister", other, json={"Node": "ext", **gone}))[0] == 403


async def test_a_policy_counts_where_it_is_for(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        for datacenter, status in (("dc1", 200), ("dc2", 403)):
            policy = {"Name": datacenter, "Rules": 'operator = "read"', "Datacenters": [datacenter]}
            await put(node, "/v1/acl/policy", policy)
            secret = (await put(node, "/v1/acl/token", {"Policies": [{"Name": datacenter}]}))["SecretID"]
            assert (await ask(node, "GET", "/v1/operator/usage", secret))[0] == status


async def test_a_transaction_names_the_operations_that_are_denied(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        secret = await token_with(node.backend, 'key_prefix "mine/" { policy = "write" }')
        value = base64.b64encode(b"v").decode()

        def kv(verb: str, key: str) -> dict[str, Any]:
            return {"KV": {"Verb": verb, "Key": key, "Value": value}}

        mixed = [kv("set", "mine/a"), kv("set", "theirs/a"), kv("get", "theirs/a")]
        status, text, _ = await ask(node, "PUT", "/v1/txn", secret, json=mixed)
        answer = json.loads(text)
        assert (status, answer["Results"], [one["OpIndex"] for one in answer["Errors"]]) == (409, None, [1, 2])
        assert "lacks permission 'key:write' on \"theirs/a\"" in answer["Errors"][0]["What"]
        assert (await ask(node, "GET", "/v1/kv/mine/a", ROOT))[0] == 404, "all or none"
        status, *_ = await ask(node, "PUT", "/v1/txn", secret, json=[kv("set", "mine/a"), kv("get", "mine/a")])
        assert status == 200
        for op in (kv("delete-tree", "m"), kv("get-tree", "")):
            assert (await ask(node, "PUT", "/v1/txn", secret, json=[op]))[0] == 409


async def test_a_tree_is_deleted_only_by_who_may_delete_all_of_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        rules = 'key_prefix "a/" { policy = "write" } key "a/kept" { policy = "read" }'
        secret = await token_with(node.backend, rules)
        await put(node, "/v1/kv/a/kept", "x")
        assert (await ask(node, "DELETE", "/v1/kv/a/?recurse", secret))[0] == 403
        assert (await ask(node, "DELETE", "/v1/kv/?recurse", secret))[0] == 403
        assert (await ask(node, "DELETE", "/v1/kv/a/b/?recurse", secret))[0] == 200


async def test_a_blocking_query_is_judged_again_when_it_wakes(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        secret = await token_with(node.backend, 'key "a" { policy = "read" }')
        await put(node, "/v1/kv/a", "1")
        *_, headers = await ask(node, "GET", "/v1/kv/a", secret)
        path = f"/v1/kv/a?index={headers['X-Consul-Index']}&wait=10s"
        waiting = asyncio.ensure_future(ask(node, "GET", path, secret))
        row = node.backend.machine.store.tokens.by_secret_hash[hash_of(secret)]
        await node.backend.apply(c.DeleteToken(row.accessor_id))
        await put(node, "/v1/kv/a", "2")
        assert (await waiting)[:2] == (403, "ACL not found")


async def _until_cut(answer: aiohttp.ClientResponse) -> None:
    """Read until the answer is cut off, which must come soon and not be its proper end."""

    async def read_on() -> None:
        while await answer.content.readline():
            pass

    with pytest.raises(aiohttp.ClientError):
        await asyncio.wait_for(read_on(), PATIENCE_S)


async def test_a_stream_ends_with_its_token(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        await put(node, "/v1/agent/service/register", {"Name": "web", "Port": 80})
        secret = (await put(node, "/v1/acl/token", {"ServiceIdentities": [{"ServiceName": "web"}]}))["SecretID"]
        body = {
            "Name": "web-sidecar-proxy", "Kind": "connect-proxy", "Port": 21000,
            "Proxy": {"DestinationServiceName": "web", "DestinationServiceID": "web"},
        }  # fmt: skip
        path = "/v1/agent/connect/proxy/web-sidecar-proxy/stream"
        status, text, _ = await ask(node, "POST", path, await token_with(node.backend, READ_ALL), json=body)
        assert (status, "service:write" in text) == (403, True)
        headers = {"X-Consul-Token": secret}
        async with node.http.post(node.url + path, json=body, headers=headers) as stream:
            assert stream.status == 200
            assert json.loads(await stream.content.readline())["Leaf"]
            row = node.backend.machine.store.tokens.by_secret_hash[hash_of(secret)]
            await node.backend.apply(c.DeleteToken(row.accessor_id))
            await _until_cut(stream)
        assert (await ask(node, "POST", path, secret, json=body))[:2] == (403, "ACL not found")


async def test_the_log_is_followed_only_while_the_token_may(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        assert (await ask(node, "GET", "/v1/agent/monitor"))[0] == 403
        policy = await put(node, "/v1/acl/policy", {"Name": "log", "Rules": 'agent "n1" { policy = "read" }'})
        secret = (await put(node, "/v1/acl/token", {"Policies": [{"Name": "log"}]}))["SecretID"]
        async with node.http.get(f"{node.url}/v1/agent/monitor", headers={"X-Consul-Token": secret}) as log:
            assert log.status == 200
            await put(node, f"/v1/acl/policy/{policy['ID']}", {"Name": "log", "Rules": ""})
            await _until_cut(log)


async def test_a_token_ends_when_its_time_has_passed(tmp_path: Path) -> None:
    now = [1_000_000_000.0]
    async with guarded(tmp_path, clock=lambda: now[0]) as node:
        ends = "2001-09-09T01:47:40Z"  # a minute after
        secret = await token_with(node.backend, 'operator = "read"', expiration_time=ends)
        assert (await ask(node, "GET", "/v1/operator/usage", secret))[0] == 200
        now[0] += 61
        assert (await ask(node, "GET", "/v1/operator/usage", secret))[:2] == (403, "ACL not found")


async def test_what_no_rule_speaks_of_is_as_the_default_says(tmp_path: Path) -> None:
    async with guarded(tmp_path, default_allow=True) as node:
        await put(node, "/v1/kv/a", "x")
        status, _, headers = await ask(node, "GET", "/v1/kv/a")
        assert (status, headers["X-Consul-Default-ACL-Policy"]) == (200, "allow")
        secret = await token_with(node.backend, 'key "a" { policy = "deny" }')
        assert (await ask(node, "GET", "/v1/kv/a", secret))[0] == 403


async def test_the_anonymous_token_has_what_it_is_given(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        assert await get(node, "/v1/catalog/nodes", "") == []
        await put(node, "/v1/acl/policy", {"Name": "nodes", "Rules": 'node_prefix "" { policy = "read" }'})
        changed = await put(node, f"/v1/acl/token/{ANONYMOUS_ID}", {"Policies": [{"Name": "nodes"}]})
        assert (changed["AccessorID"], changed["SecretID"]) == (ANONYMOUS_ID, "anonymous")
        assert [row["Node"] for row in await get(node, "/v1/catalog/nodes", "")] == ["n1"]
        again = await put(node, f"/v1/acl/token/{ANONYMOUS_ID}", {"Description": "nothing"})
        assert "Policies" not in again
        assert await get(node, "/v1/catalog/nodes", "") == []
        status, text, _ = await ask(node, "DELETE", f"/v1/acl/token/{ANONYMOUS_ID}", ROOT)
        assert (status, "not permitted" in text) == (400, True)


async def test_the_agents_default_token_stands_in_for_none(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        secret = await token_with(node.backend, READ_ALL)
        await put(node, "/v1/agent/token/default", {"Token": secret})
        assert [row["Node"] for row in await get(node, "/v1/catalog/nodes", "")] == ["n1"]
        held = (tmp_path / "acl-tokens.json").read_text()
        assert secret not in held, "on disk as its hash"
        assert (tmp_path / "acl-tokens.json").stat().st_mode & 0o077 == 0
        assert AgentTokens(tmp_path / "acl-tokens.json").hash_for("dns") == hash_of(secret)
        status, text, _ = await ask(node, "PUT", "/v1/agent/token/nonsense", ROOT, json={"Token": secret})
        assert (status, "default, dns" in text) == (404, True)
        await put(node, "/v1/agent/token/default", {"Token": ""})
        assert await get(node, "/v1/catalog/nodes", "") == []


async def test_a_web_page_gets_nothing_without_a_token(tmp_path: Path) -> None:
    """Even what needs none: a name that was bound to loopback, and a write from another origin."""
    async with guarded(tmp_path, default_allow=True) as node:
        for method, headers in (("GET", {"Host": "evil.example"}), ("PUT", {"Origin": "http://evil.example"})):
            async with node.http.request(method, f"{node.url}/v1/kv/a", headers=headers, data=b"x") as answer:
                assert answer.status == 403
        headers = {"Host": "lictor.example", "X-Consul-Token": ROOT}
        async with node.http.get(f"{node.url}/v1/catalog/nodes", headers=headers) as answer:
            assert answer.status == 200


async def test_dns_tells_what_the_agents_token_may_see(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        await put(node, "/v1/agent/service/register", {"Name": "web", "Port": 80, "Address": "10.1.1.1"})
        tokens = AgentTokens()
        server = DnsServer(node.backend, node.agent, access=AccessControl(Tokens(node.backend), tokens))
        await server.start("127.0.0.1", 0)
        try:

            async def asked(name: str) -> tuple[int, int]:
                data = await server.respond(bytes(DNSRecord.question(name, "A").pack()), udp=False)
                answer = DNSRecord.parse(data or b"")
                return answer.header.rcode, len(answer.rr)

            for name in ("web.service.consul.", "n1.node.consul."):
                assert await asked(name) == (RCODE.NXDOMAIN, 0)
            tokens.set("dns", await token_with(node.backend, READ_ALL))
            for name in ("web.service.consul.", "n1.node.consul."):
                assert await asked(name) == (RCODE.NOERROR, 1)
            tokens.set("dns", await token_with(node.backend, 'service "web" { policy = "read" }'))
            assert (await asked("web.service.consul."))[1] == 0, "its node may not be seen"
        finally:
            await server.stop()


async def test_without_servers_the_known_keep_what_they_had_and_others_get_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as node:
        secret = await token_with(node.backend, READ_ALL)
        tokens = Tokens(node.backend, default_allow=True)
        known = await tokens.resolve(secret)

        async def away(*_: Any, **__: Any) -> Any:
            raise NoLeader

        node.backend.query_now = lambda name, params: None  # type: ignore[method-assign]
        node.backend.query = away  # type: ignore[method-assign]
        assert await tokens.resolve(secret) == known
        for other in ("another", ""):
            with pytest.raises(Exception, match="cannot be checked now"):
                await tokens.resolve(other)
