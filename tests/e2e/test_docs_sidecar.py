"""What docs/sidecar.md shows can be done: every entry on it is written, and every name on it exists."""

from __future__ import annotations

import re
from pathlib import Path

from proxy import upstream_settings
from proxy.metric_names import HELP
from tests.e2e.support_e2e import ROOT, Mesh

PAGE = (ROOT / "docs" / "sidecar.md").read_text()
ENTRIES = re.findall(r"^```hcl\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def _named(entry: str) -> tuple[str, str]:
    kind, name = (re.search(rf'^{key} += "(.+)"$', entry, re.MULTILINE) for key in ("Kind", "Name"))
    assert kind is not None
    assert name is not None
    return kind[1], name[1]


def test_every_entry_can_be_written_and_makes_a_way(lictor: Mesh, tmp_path: Path) -> None:
    assert len(ENTRIES) >= 9
    written = []
    for entry in ENTRIES:  # in the order of the page
        file = tmp_path / "entry.hcl"
        file.write_text(entry)
        kind, name = _named(entry)
        assert f"Config entry written: {kind}/{name}" in lictor.lictor("config", "write", str(file), host=0).stdout
        written.append((kind, name))
    chain = lictor.api(0).get("/v1/discovery-chain/orders").json()["Chain"]
    kinds = {node["Type"] for node in chain["Nodes"].values()}
    assert kinds == {"router", "splitter", "resolver"}
    assert {target["Service"] for target in chain["Targets"].values()} == {"orders", "orders-backup"}
    for kind, name in reversed(written):
        lictor.lictor("config", "delete", "-kind", kind, "-name", name, host=0)
    assert lictor.lictor("config", "list", "-kind", "service-router", host=0).stdout == ""


def test_every_name_exists() -> None:
    said = set(re.findall(r"^\| `([a-z_]+)`", PAGE, re.MULTILINE)) | {"limits", "passive_health_check"}
    missing = upstream_settings._KNOWN - {"protocol"} - said
    assert missing == set(), "an upstream's settings that the page does not tell"
    metrics = set(re.findall(r"\blictor_[a-z_]+", PAGE)) - {"lictor_"}
    assert metrics - HELP.keys() == set()
