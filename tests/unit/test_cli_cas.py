"""``-cas`` and ``-modify-index`` of ``lictor kv`` and ``lictor config``: the same words, the same deeds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cli import config, kv
from cli.main import main
from tests.support.http_api import Node, serving


def test_the_flags_say_the_same_everywhere() -> None:
    said = {
        tuple(
            (flag.name, flag.help.replace("entry", "thing").replace("key", "thing"))
            for flag in command.flags
            if flag.name in ("cas", "modify-index")
        )
        for family, names in (
            (kv.FAMILIES["kv"], ("put", "delete")),
            (config.FAMILIES["config"], ("write", "delete")),
        )
        for command in (family.commands[name] for name in names)
    }
    assert len(said) == 1
    assert len(next(iter(said))) == 2


async def test_both_write_and_delete_by_index_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "entry.json"
    file.write_text(json.dumps({"Kind": "service-defaults", "Name": "web", "Protocol": "http"}))
    async with serving(tmp_path) as node:

        async def run(*words: str) -> tuple[int, str]:
            code = await asyncio.to_thread(main, [*words, "-http-addr", node.url])
            return code, capsys.readouterr().err

        for write, delete, read, name in (
            (("kv", "put", "a", "b"), ("kv", "delete", "a"), "/v1/kv/a", "a"),
            (
                ("config", "write", str(file)),
                ("config", "delete", "-kind", "service-defaults", "-name", "web"),
                "/v1/config/service-defaults/web",
                "service-defaults/web",
            ),
        ):
            assert await run(*write, "-cas") == (0, ""), "0 by default: there is none"
            code, said = await run(*write, "-cas")
            assert (code, f"{name} was not written: its ModifyIndex is not 0" in said) == (1, True), said
            code, said = await run(*write, "-modify-index", "7")
            assert (code, "means nothing without -cas" in said) == (2, True), said
            code, said = await run(*delete, "-modify-index", "7")
            assert (code, "means nothing without -cas" in said) == (2, True), said
            code, said = await run(*delete, "-cas", "-modify-index", "1")
            assert (code, f"{name} was not deleted: its ModifyIndex is not 1" in said) == (1, True), said
            index = await index_of(node, read)
            assert await run(*write, "-cas", "-modify-index", index) == (0, "")
            assert await run(*delete, "-cas", "-modify-index", await index_of(node, read)) == (0, "")
            async with node.http.get(node.url + read) as answer:
                assert answer.status == 404


async def index_of(node: Node, path: str) -> str:
    found = await node.get(path)
    return str((found[0] if isinstance(found, list) else found)["ModifyIndex"])
