"""What the data plane's benchmark puts into documents."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.data_plane_report import picture, placed, table, write

FIGURES = {
    "direct": {"requests/s": [100_000.0, 110_000.0, 90_000.0]},
    "haproxy": {"requests/s": [20_000.0, 10_000.0, 30_000.0], "CPU-s per 10k requests": [0.4, 0.5, 0.3]},
    "lictor": {"requests/s": [30_000.0, 29_000.0, 90_000.0], "CPU-s per 10k requests": [0.2, 0.1, 0.3]},
}
DOCUMENT = "# Figures\n\n<!-- l4 begins -->\nold\n<!-- l4 ends -->\n\nmore\n"


def test_the_table_has_medians_and_what_ours_are_of_others() -> None:
    assert table(FIGURES) == (
        "|  | requests/s | CPU-s per 10k requests |\n| --- | --- | --- |\n"
        "| direct | 100,000 |  |\n| HAProxy pair | 20,000 | 0.4 |\n| Lictor pair | 30,000 | 0.2 |\n"
        "| Lictor pair / HAProxy | 1.50 | 0.50 |\n"
    )


def test_bars_are_as_long_as_their_medians() -> None:
    root = ElementTree.fromstring(picture(FIGURES, "a <caption>"))
    bars = [
        (float(bar.attrib["width"]), bar.attrib["x"])
        for bar in root.iter("{http://www.w3.org/2000/svg}rect")
        if "x" in bar.attrib
    ]
    direct, haproxy, lictor, haproxy_cpu, lictor_cpu = (width for width, _ in bars)
    assert direct / haproxy == pytest.approx(5, rel=0.01)
    assert lictor / haproxy == pytest.approx(1.5, rel=0.01)
    assert haproxy_cpu / lictor_cpu == pytest.approx(2, rel=0.01)
    spreads = [
        float(line.attrib["x2"]) - float(line.attrib["x1"]) for line in root.iter("{http://www.w3.org/2000/svg}line")
    ]
    assert spreads[2] / lictor == pytest.approx(61 / 30, rel=0.01)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <caption>"
    assert "requests/s (more is better)" in texts
    assert "CPU-s per 10k requests (less is better)" in texts


def test_what_stood_there_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text(DOCUMENT)
    for _ in range(2):
        write(file, "l4", FIGURES, "of today")
    text = file.read_text()
    assert "old" not in text
    assert text.startswith("# Figures\n\n<!-- l4 begins -->\n")
    assert text.endswith("<!-- l4 ends -->\n\nmore\n")
    assert text.count("| Lictor pair | 30,000 | 0.2 |") == 1
    assert "![of today](l4.svg)" in text
    assert ElementTree.fromstring((tmp_path / "l4.svg").read_text()).tag.endswith("svg")


@pytest.mark.parametrize("document", ["", "<!-- l4 ends -->\n<!-- l4 begins -->\n", DOCUMENT + DOCUMENT])
def test_a_document_without_the_place_stays_as_it_is(tmp_path: Path, document: str) -> None:
    with pytest.raises(ValueError, match="l4 begins"):
        placed(document, "l4", "new")
    file = tmp_path / "performance.md"
    file.write_text(document)
    with pytest.raises(ValueError, match="once each"):
        write(file, "l4", FIGURES, "of today")
    assert file.read_text() == document
    assert not (tmp_path / "l4.svg").exists()
