"""Access control on a real cluster: begun by the command line, used by py-consul and npm's consul, unmodified, and
withdrawn at every node at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import consul
import pytest
from consul.exceptions import ACLPermissionDenied

from cli.client import Api
from cli.demo_stage import wait_until
from node import pki
from node.config import parse_config
from tests.e2e.support_e2e import ROOT, need, running
from tests.e2e.support_foreign import npm_home
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S, Since

SERVERS, CLIENTS = 3, 2
WITHDRAWN_S = 2.0
"""How soon a deleted token is good for nothing at any node."""


class Guarded:
    """Three servers and two agents that ask for tokens, as processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = [f"server-{n + 1}" for n in range(SERVERS)] + [f"client-{n + 1}" for n in range(CLIENTS)]
        ports = iter(free_ports(len(names) + SERVERS))
        text = "[cluster]\nacl_enabled = true\nfault_injection = true\n"
        self.hosts: dict[str, str] = {}
        for name in names:
            role, http = name.partition("-")[0], next(ports)
            self.hosts[name] = f"127.0.0.1:{http}"
            text += f'[nodes.{name}]\nrole = "{role}"\nhttp_port = {http}\ndns_port = 0\ngrpc_port = 0\n'
            if role == "server":
                text += f"rpc_port = {next(ports)}\n"
        self.file = directory / "cluster.toml"
        self.file.write_text(text)
        pki.ensure_local_pki(parse_config(text, self.file))
        self.root = ""

    def lictor(self, *words: str, host: str = "client-1", token: str | None = None, fails: bool = False) -> str:
        """Run the command on a host; return what it printed, or what it said when it must fail."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("LICTOR", "CONSUL"))}
        environment |= {"CONSUL_HTTP_ADDR": self.hosts[host]}
        environment |= {"CONSUL_HTTP_TOKEN": self.root if token is None else token}
        command = [sys.executable, "-m", "cli", *words]
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode != 0) == fails, (words, done.stdout, done.stderr)
        return done.stderr if fails else done.stdout

    def python(self, host: str, token: str = "") -> Any:
        """Return py-consul's client of a host."""
        name, _, port = self.hosts[host].partition(":")
        return consul.Consul(host=name, port=int(port), token=token or None)

    def leads(self) -> bool:
        """Whether there is a leader."""
        return bool(Api(self.hosts["client-1"], wait_s=1.0).get("/v1/status/leader").json())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("acl"))
    with ExitStack() as stack:
        for name in made.hosts:
            command = [sys.executable, "-m", "cli", "agent", "-config", str(made.file), "-node", name]
            log = stack.enter_context((made.directory / f"{name}.log").open("w"))
            stack.enter_context(running(command, cwd=ROOT, stdout=log, stderr=log))

        def up() -> bool:
            try:
                return made.leads()
            except Exception:  # noqa: BLE001 - not there yet, in one of many ways
                return False

        assert wait_until(up, 60.0), made.directory
        told = made.lictor("acl", "bootstrap", "-json", token="")
        made.root = json.loads(told)["SecretID"]
        yield made


def test_it_begins_closed_and_once(cluster: Guarded) -> None:
    assert cluster.lictor("catalog", "services", token="").strip() == ""
    assert "Permission denied: anonymous token lacks permission" in cluster.lictor(
        "kv", "put", "a", "1", token="", fails=True
    )
    assert "ACL bootstrap no longer allowed" in cluster.lictor("acl", "bootstrap", host="server-2", fails=True)

    # The node's own part goes on without a token: its registration and its heartbeats come with its certificate.
    def nodes() -> set[str]:
        return {row["Node"] for row in json.loads(cluster.lictor("catalog", "nodes", "-json"))}

    assert wait_until(lambda: nodes() == set(cluster.hosts), PATIENCE_S), nodes()


def test_the_command_line_manages_policies_roles_and_tokens(cluster: Guarded) -> None:
    rules = cluster.directory / "rules.hcl"
    rules.write_text('key_prefix "team/" { policy = "write" }\n')
    cluster.lictor(
        "acl", "policy", "create", "-name", "team", "-rules", f"@{rules}", "-description", "keys of a team"
    )
    assert "keys of a team" in cluster.lictor("acl", "policy", "list")
    assert 'key_prefix "team/"' in cluster.lictor("acl", "policy", "read", "-name", "team")
    assert "'lots' is no access" in cluster.lictor(
        "acl", "policy", "create", "-name", "bad", "-rules", 'key "a" { policy = "lots" }', fails=True
    )
    cluster.lictor("acl", "role", "create", "-name", "devs", "-policy-name", "team", "-node-identity", "client-1:dc1")
    assert "client-1:dc1" in cluster.lictor("acl", "role", "list")
    token = json.loads(cluster.lictor("acl", "token", "create", "-role-name", "devs", "-description", "d", "-json"))
    secret, accessor = token["SecretID"], token["AccessorID"]
    cluster.lictor("kv", "put", "team/a", "1", token=secret)
    assert "lacks permission 'key:write'" in cluster.lictor("kv", "put", "a", "1", token=secret, fails=True)
    assert accessor in cluster.lictor("acl", "token", "read", "-self", token=secret)
    assert "acl:read" in cluster.lictor("acl", "token", "list", token=secret, fails=True)
    file = cluster.directory / "secret"
    file.write_text(secret + "\n")
    assert cluster.lictor("kv", "get", "team/a", "-token-file", str(file), token="").strip() == "1"
    shown = cluster.lictor("acl", "token", "read", "-accessor-id", accessor[:13])
    assert "devs" in shown
    assert secret not in shown
    updated = cluster.lictor("acl", "token", "update", "-accessor-id", accessor, "-append-service-identity", "web")
    assert "web" in updated
    assert "devs" in updated
    cluster.lictor("acl", "token", "delete", "-accessor-id", accessor)
    assert "ACL not found" in cluster.lictor("kv", "get", "team/a", token=secret, fails=True)
    cluster.lictor("acl", "role", "delete", "-name", "devs")
    cluster.lictor("acl", "policy", "delete", "-name", "team")
    assert "no policy 'team'" in cluster.lictor("acl", "policy", "read", "-name", "team", fails=True)


def test_py_consul_manages_and_uses_tokens(cluster: Guarded) -> None:
    admin = cluster.python("client-1", cluster.root)
    policy = admin.acl.policy.create("py", rules={"key_prefix": {"py/": {"policy": "write"}}})
    assert admin.acl.policy.read(policy["ID"])["Name"] == "py"
    token = admin.acl.token.create(policies_name=["py"], description="from py-consul")
    assert admin.acl.token.read(token["AccessorID"])["Description"] == "from py-consul"
    assert token["AccessorID"] in {one["AccessorID"] for one in admin.acl.token.list()}
    role = admin.acl.role.create("py-role", policies_name=["py"])
    assert admin.acl.role.read_by_name("py-role")["ID"] == role["ID"]
    user = cluster.python("server-2", token["SecretID"])
    assert user.acl.token.read_self()["AccessorID"] == token["AccessorID"]
    assert user.kv.put("py/a", "1")
    with pytest.raises(ACLPermissionDenied):
        user.kv.put("other", "1")
    with pytest.raises(ACLPermissionDenied):
        user.acl.token.list()
    assert user.catalog.nodes()[1] == []
    clone = admin.acl.token.clone(token["AccessorID"], description="copy")
    narrowed = cluster.python("client-2", clone["SecretID"])

    def refused() -> bool:
        try:
            narrowed.kv.put("py/a", "1")
        except ACLPermissionDenied:
            return True
        return False

    since = Since()
    admin.acl.token.update(clone["AccessorID"], description="less")
    assert wait_until(refused, PATIENCE_S)
    since.took(WITHDRAWN_S, "narrowing a token")
    for made in (token, clone):
        assert admin.acl.token.delete(made["AccessorID"])
    assert admin.acl.role.delete(role["ID"])
    assert admin.acl.policy.delete(policy["ID"])
    assert policy["ID"] not in {one["ID"] for one in admin.acl.policy.list()}


def test_npm_consul_uses_a_token(cluster: Guarded, tmp_path: Path) -> None:
    need("node", "npm")
    home = npm_home(tmp_path / "npm")
    shutil.copy(Path(__file__).with_name("npm_consul_acl.cjs"), home)
    rules = (
        'key_prefix "npm/" { policy = "write" }\nservice "npm-web" { policy = "write" }\n'
        'node_prefix "" { policy = "read" }'
    )
    cluster.lictor("acl", "policy", "create", "-name", "npm", "-rules", rules)
    token = json.loads(cluster.lictor("acl", "token", "create", "-policy-name", "npm", "-json"))
    command = ["node", "npm_consul_acl.cjs", cluster.hosts["client-1"], token["SecretID"]]
    done = subprocess.run(command, check=False, cwd=home, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_deleted_token_is_refused_at_every_node_at_once(cluster: Guarded) -> None:
    cluster.lictor("acl", "policy", "create", "-name", "live", "-rules", 'key_prefix "live" { policy = "write" }')
    token = json.loads(cluster.lictor("acl", "token", "create", "-policy-name", "live", "-json"))
    clients = {name: cluster.python(name, token["SecretID"]) for name in cluster.hosts}
    refused: dict[str, float] = {}
    ready = {name: threading.Event() for name in clients}

    def use(name: str) -> None:
        good = 0
        while True:
            try:
                clients[name].kv.get("live", consistency="stale")
                good += 1
                if good >= 20:
                    ready[name].set()
            except ACLPermissionDenied:
                refused[name] = time.monotonic()
                return

    threads = [threading.Thread(target=use, args=(name,), daemon=True) for name in clients]
    for thread in threads:
        thread.start()
    assert all(event.wait(PATIENCE_S) for event in ready.values())
    cluster.lictor("acl", "token", "delete", "-accessor-id", token["AccessorID"], host="client-2")
    gone = Since()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(refused) == set(cluster.hosts)
    gone.took(WITHDRAWN_S, f"refusing a deleted token, {refused},", at=max(refused.values()))


def test_a_policy_that_is_narrowed_counts_at_every_node_at_once(cluster: Guarded) -> None:
    cluster.lictor("acl", "policy", "create", "-name", "shrink", "-rules", 'key_prefix "s" { policy = "write" }')
    token = json.loads(cluster.lictor("acl", "token", "create", "-policy-name", "shrink", "-json"))
    clients = [cluster.python(name, token["SecretID"]) for name in cluster.hosts]
    for client in clients:
        assert client.kv.put("s/a", "1")

    def closed() -> bool:
        for client in clients:
            try:
                client.kv.put("s/a", "2")
            except ACLPermissionDenied:
                continue
            return False
        return True

    cluster.lictor("acl", "policy", "update", "-name", "shrink", "-rules", 'key_prefix "s" { policy = "read" }')
    since = Since()
    assert wait_until(closed, PATIENCE_S)
    since.took(WITHDRAWN_S, "narrowing a policy")
    assert clients[0].kv.get("s/a")[1] is not None


def test_an_agent_without_servers_keeps_what_it_knew_of_tokens(cluster: Guarded) -> None:
    """Partitioned from every server: a known token goes on, an unknown one does not begin."""
    rules = 'agent_prefix "" { policy = "read" } operator = "write"'
    cluster.lictor("acl", "policy", "create", "-name", "isolated", "-rules", rules)
    token = json.loads(cluster.lictor("acl", "token", "create", "-policy-name", "isolated", "-json"))["SecretID"]
    agent = Api(cluster.hosts["client-2"], token=token, wait_s=1.0)
    for _ in range(3):
        agent.get("/v1/agent/self")
    servers = [name for name in cluster.hosts if name.startswith("server")]
    agent.put("/v1/operator/debug/partition", {"Peers": servers})
    try:
        assert agent.get("/v1/agent/self").json()["Config"]["NodeName"] == "client-2"
        other = Api(cluster.hosts["client-2"], token="00000000-1111-2222-3333-444444444444", wait_s=1.0)
        with pytest.raises(Exception, match=r"cannot be checked now|ACL not found"):
            other.get("/v1/agent/self")
    finally:
        agent.put("/v1/operator/debug/partition", {"Peers": []})


def test_sidecars_stand_on_the_tokens_of_their_services(cluster: Guarded, tmp_path: Path) -> None:
    """A service identity is all that an app's sidecar needs; another service's is no use to it."""
    secrets = {
        name: json.loads(cluster.lictor("acl", "token", "create", "-service-identity", name, "-json"))["SecretID"]
        for name in ("shop", "stock")
    }
    port, public, admin = free_ports(3)
    with ExitStack() as stack:

        def sidecar(name: str, host: str, token: str, *more: str) -> Path:
            log = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.log"
            output = stack.enter_context(log.open("w"))
            command = [sys.executable, "-m", "cli", "connect", "-sidecar", "-register", "-name", name, "-id", name]
            command += ["-service-id", name, "-http-addr", cluster.hosts[host], "-token", token, *more]
            stack.enter_context(running(command, cwd=ROOT, stdout=output, stderr=output))
            return log

        stack.enter_context(
            running([sys.executable, "-m", "http.server", "-b", "127.0.0.1", str(port)], cwd=tmp_path)
        )
        home = tmp_path / "proxy.json"
        home.write_text(json.dumps({"services": [{"name": "stock", "port": port}]}))
        wrong = sidecar("stock", "client-2", secrets["shop"], "-proxy", str(home))
        assert wait_until(lambda: "lacks permission 'service:write'" in wrong.read_text(), PATIENCE_S), (
            wrong.read_text()
        )
        right = sidecar("stock", "client-2", secrets["stock"], "-proxy", str(home), "-public-port", str(public))
        assert wait_until(lambda: "is ready" in right.read_text(), PATIENCE_S), right.read_text()
        caller = sidecar("shop", "client-1", secrets["shop"], "-upstreams", "stock", "-admin-port", str(admin))
        assert wait_until(lambda: "is ready" in caller.read_text(), PATIENCE_S), caller.read_text()
        refused = cluster.lictor("intentions", "create", "shop", "stock", token=secrets["shop"], fails=True)
        assert "lacks permission 'intention:write'" in refused
        cluster.lictor("intentions", "create", "shop", "stock")
        printed = cluster.lictor("connect", "env", "-service-id", "shop", token=secrets["shop"])
        address = next(line.partition("=")[2] for line in printed.splitlines() if "STOCK_ADDR" in line).strip("'\"")

        def served() -> bool:
            try:
                with urllib.request.urlopen(f"http://{address}/", timeout=5) as answer:
                    return b"proxy.json" in answer.read()
            except OSError:
                return False

        assert wait_until(served, PATIENCE_S), (address, right.read_text(), caller.read_text())


def test_an_agents_own_token_stands_in_for_none(cluster: Guarded) -> None:
    rules = 'node_prefix "" { policy = "read" }'
    cluster.lictor("acl", "policy", "create", "-name", "nodes", "-rules", rules)
    token = json.loads(cluster.lictor("acl", "token", "create", "-policy-name", "nodes", "-json"))["SecretID"]
    assert "server-1" not in cluster.lictor("catalog", "nodes", token="")
    cluster.lictor("acl", "set-agent-token", "default", token)
    assert "server-1" in cluster.lictor("catalog", "nodes", token="")
    assert "server-1" not in cluster.lictor("catalog", "nodes", token="", host="client-2")
    cluster.lictor("acl", "set-agent-token", "default", "")
    assert "server-1" not in cluster.lictor("catalog", "nodes", token="")
