"""``lictor acl``: where a token comes from, and what flags become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.acl import _changed_links, _links, _only, _text_of
from cli.client import Api
from cli.errors import CliError, UsageError
from cli.flags import Args


def args(**values: Any) -> Args:
    return Args({name.replace("_", "-"): value for name, value in values.items()}, [], [])


@pytest.mark.parametrize(
    ("typed", "environment", "expected"),
    [
        ({}, {}, ""),
        ({}, {"CONSUL_HTTP_TOKEN": "env"}, "env"),
        ({}, {"CONSUL_HTTP_TOKEN": "consul", "LICTOR_HTTP_TOKEN": "lictor"}, "lictor"),
        ({"token": "typed"}, {"CONSUL_HTTP_TOKEN": "env", "CONSUL_HTTP_TOKEN_FILE": "FILE"}, "typed"),
        ({"token_file": "FILE"}, {"CONSUL_HTTP_TOKEN": "env"}, "filed"),
        ({}, {"CONSUL_HTTP_TOKEN_FILE": "FILE"}, "filed"),
        ({}, {"CONSUL_HTTP_TOKEN": "env", "CONSUL_HTTP_TOKEN_FILE": "FILE"}, "env"),
    ],
)
def test_what_was_typed_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: dict[str, str], environment: dict[str, str], expected: str
) -> None:
    file = tmp_path / "token"
    file.write_text("filed\n")
    for name in ("TOKEN", "TOKEN_FILE"):
        for product in ("LICTOR", "CONSUL"):
            monkeypatch.delenv(f"{product}_HTTP_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(file) if value == "FILE" else value)
    given = {name: str(file) if value == "FILE" else value for name, value in typed.items()}
    assert Api.of(args(**given)).token == expected


def test_a_token_and_a_file_contradict_each_other_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        Api.of(args(token="a", token_file="b"))
    with pytest.raises(CliError, match="nowhere cannot be read"):
        Api.of(args(token_file=str(tmp_path / "nowhere")))


def test_flags_become_links() -> None:
    given = args(
        policy_name=["a"],
        policy_id=["1"],
        role_name=["r"],
        service_identity=["web", "db:dc1,dc2"],
        node_identity=["n:dc1"],
    )
    assert _links(given) == {
        "Policies": [{"Name": "a"}, {"ID": "1"}],
        "Roles": [{"Name": "r"}],
        "ServiceIdentities": [{"ServiceName": "web"}, {"ServiceName": "db", "Datacenters": ["dc1", "dc2"]}],
        "NodeIdentities": [{"NodeName": "n", "Datacenter": "dc1"}],
    }
    with pytest.raises(UsageError, match="NODE:DATACENTER"):
        _links(args(node_identity=["n"]))


def test_an_update_replaces_what_is_given_adds_what_is_appended_and_keeps_the_rest() -> None:
    old = {"Policies": [{"ID": "1", "Name": "a"}], "Roles": [{"ID": "2", "Name": "r"}]}
    changed = _changed_links(args(policy_name=["b"], append_role_name=["s"], append_service_identity=["web"]), old)
    assert changed == {
        "Policies": [{"Name": "b"}],
        "Roles": [{"ID": "2", "Name": "r"}, {"Name": "s"}],
        "ServiceIdentities": [{"ServiceName": "web"}],
        "NodeIdentities": [],
    }


def test_rules_come_as_text_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rules.hcl"
    file.write_text('operator = "read"')
    assert _text_of('acl = "read"') == 'acl = "read"'
    assert _text_of(f"@{file}") == 'operator = "read"'
    with pytest.raises(CliError, match="cannot be read"):
        _text_of(f"@{tmp_path}/nowhere")


def test_a_beginning_of_an_id_must_be_one_tokens_alone() -> None:
    assert _only(["abc"], "token", "a") == "abc"
    with pytest.raises(CliError, match="2 ids begin with 'a': give more of it"):
        _only(["ab", "ac"], "token", "a")
    with pytest.raises(CliError, match="no token has an id"):
        _only([], "token", "a")
