"""cluster.toml: the sample loads, faults come all at once, and nothing unsafe is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.config import ClusterConfig, Limits, Liveness, RaftTimings, load_config, parse_config
from node.errors import ConfigErrors

ROOT = Path(__file__).resolve().parents[2]
SERVER = '[nodes.s1]\nrole = "server"\n'


def parse(text: str) -> ClusterConfig:
    return parse_config(text, Path("/etc/lictor/cluster.toml"))


def problems(text: str) -> str:
    with pytest.raises(ConfigErrors) as caught:
        parse(text)
    return "\n".join(caught.value.problems)


def test_the_sample_describes_the_local_cluster_of_the_documentation() -> None:
    config = load_config(ROOT / "cluster.toml")
    assert [node.rpc_port for node in config.servers()] == [8300, 8301, 8302]
    assert [(n.http_port, n.dns_port) for n in config.nodes.values()] == [
        (8520, 8620), (8530, 8630), (8540, 8640), (8500, 8600), (8510, 8610),
    ]  # fmt: skip
    assert config.fault_injection
    assert config.default_intention_policy == "deny"


def test_the_sample_shows_the_defaults_it_claims_to_show() -> None:
    config = load_config(ROOT / "cluster.toml")
    assert (config.raft, config.limits, config.liveness) == (RaftTimings(), Limits(), Liveness())
    bare = parse(SERVER)
    assert (bare.leaf_ttl_s, bare.log_level, bare.dns_domain) == (
        config.leaf_ttl_s,
        config.log_level,
        config.dns_domain,
    )


def test_every_key_of_the_sample_has_a_comment() -> None:
    sections = (ROOT / "cluster.toml").read_text().split("[nodes.server-2]")[0].splitlines()
    assert [line for line in sections if "=" in line and not line.startswith("#") and "#" not in line] == []


def test_paths_count_from_the_file() -> None:
    config = parse(SERVER)
    assert config.node("s1").data_dir == Path("/etc/lictor/lictor-data/s1")
    assert config.tls_dir == Path("/etc/lictor/lictor-data/tls")


def test_all_faults_are_told_at_once_with_their_keys() -> None:
    text = problems(
        '[cluster]\ndatacentre = "x"\nlog_level = "loud"\n[raft]\nheartbeat = 60\n'
        '[nodes.s1]\nrole = "boss"\nhttp_port = 99999\nmeta = { a = 1 }\n'
    )
    for part in (
        "cluster.datacentre: unknown key; did you mean 'datacenter'?",
        "cluster.log_level: must be one of debug, info, warning, error",
        "raft.heartbeat: must be a duration in quotes",
        "nodes.s1.role: must be one of server, client",
        "nodes.s1.http_port: must be between 0 and 65535",
        "nodes.s1.meta.a: must be a string in quotes",
        "nodes: none has role",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[cluster\n", "not valid TOML"),
        ("", "nodes: there is none"),
        ("nodes = 3\n", "nodes: must hold tables"),
        ("[nodes.s1]\n", "nodes.s1.role: is missing"),
        ('[nodes."a/b"]\nrole = "server"\n', "a node's name is letters"),
        (SERVER + "rpc_port = true\n", "nodes.s1.rpc_port: must be a whole number"),
        (
            SERVER + 'bind_address = "0.0.0.0"\n',
            "nodes.s1.advertise_address: must be an address that others can dial",
        ),
        (SERVER + "https_port = 8501\n", "needs https_cert_file"),
        (
            SERVER + '[nodes.c1]\nrole = "client"\nrpc_port = 1\nhttp_port = 1\ndns_port = 2\n',
            "does not listen for RPC",
        ),
        (SERVER + '[nodes.s2]\nrole = "server"\n', "nodes.s2.rpc_port: 127.0.0.1:8300 is taken by nodes.s1.rpc_port"),
        ('[raft]\nheartbeat = "300ms"\n' + SERVER, "2 x heartbeat < election_timeout_min"),
        ('[liveness]\nnode_ttl = "1500ms"\n' + SERVER, "at least twice the heartbeat"),
        ('[cluster]\nacl_token_file = "t"\n' + SERVER, "cluster.acl_token_file: has no effect without acl_enabled"),
        ('[cluster]\nacl_default_policy = "maybe"\n' + SERVER, "cluster.acl_default_policy"),
        (
            "[cluster]\nfault_injection = true\n" + SERVER + 'advertise_address = "10.0.0.1"\n',
            "fault_injection: is for local clusters only",
        ),
    ],
)
def test_a_fault_names_its_key_and_the_fix(text: str, expected: str) -> None:
    assert expected in problems(text)


def test_http_beyond_loopback_needs_tls_and_tokens() -> None:
    text = problems(SERVER + 'http_address = "10.0.0.1"\n')
    assert "plain HTTP on 10.0.0.1" in text
    assert "needs tokens" in text
    assert "plain HTTP" in problems(SERVER + 'http_address = "some.host"\n')
    safe = (
        '[cluster]\nacl_enabled = true\nacl_token_file = "t"\n'
        + SERVER
        + 'http_address = "10.0.0.1"\nhttp_port = 0\nhttps_port = 8501\n'
        'https_cert_file = "c.pem"\nhttps_key_file = "k.pem"\n'
    )
    assert parse(safe).node("s1").https_cert_file == "/etc/lictor/c.pem"


def test_two_hosts_may_use_the_same_ports() -> None:
    config = parse(SERVER + 'bind_address = "10.0.0.1"\n[nodes.s2]\nrole = "server"\nbind_address = "10.0.0.2"\n')
    assert config.node("s2").rpc_endpoint == "10.0.0.2:8300"


def test_an_unknown_node_lists_the_known_ones() -> None:
    with pytest.raises(ConfigErrors, match=r"nodes\.s9: not in this file; it has s1"):
        parse(SERVER).node("s9")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"copy the sample cluster\.toml"):
        load_config(tmp_path / "none.toml")
