"""The data plane's figures as a table and a picture, and their place in a document.

Pure but for :func:`write`: figures in, text out.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Figures = Mapping[str, Mapping[str, Sequence[float]]]
"""For each pair and each measure what the rounds gave."""

SHOWN = {
    "direct": "direct",
    "haproxy": "HAProxy pair",
    "envoy": "Envoy pair",
    "lictor": "Lictor pair",
    "lictor-to-envoy": "Lictor calling Envoy",
    "haproxy-http": "HAProxy pair, `mode http`",
    "envoy-http": "Envoy pair, HTTP with RBAC",
    "lictor-http": "Lictor pair, HTTP",
}
RATIOS = (
    ("lictor", "haproxy"),
    ("lictor", "envoy"),
    ("lictor-to-envoy", "haproxy"),
    ("lictor-http", "haproxy-http"),
    ("lictor-http", "envoy-http"),
)
MORE_IS_BETTER = ("requests/s", "connections/s", "bulk MB/s")

WIDTH, COLUMNS, CAPTION_CHARS = 900, 2, 125
MARGIN, LABEL_W, VALUE_W = 16, 140, 62
TITLE_H, ROW_H, BAR_H, GAP_H = 26, 22, 14, 18
OURS, OURS_TO_OTHERS, OTHERS, NONE = "#1f618d", "#5dade2", "#85929e", "#d5d8dc"
SPREAD = "#17202a"


def shown(name: str) -> str:
    """Return the name by which a pair is called in print."""
    return SHOWN.get(name, name)


def number(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    if value >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def measures(figures: Figures) -> list[str]:
    """Return what was measured of any pair, in the order of measuring."""
    return list(dict.fromkeys(what for values in figures.values() for what in values))


def table(figures: Figures) -> str:
    """Return a Markdown table of medians, and below them what Lictor's are of the others'."""
    columns = measures(figures)
    medians = {
        name: {what: statistics.median(rounds) for what, rounds in values.items()} for name, values in figures.items()
    }
    rows = [
        [shown(name), *(number(values[what]) if what in values else "" for what in columns)]
        for name, values in medians.items()
    ]
    for ours, other in RATIOS:
        if ours in medians and other in medians:
            pairs = [(medians[ours].get(what), medians[other].get(what)) for what in columns]
            cells = [_ratio(mine / theirs) if mine is not None and theirs else "" for mine, theirs in pairs]
            rows.append([f"{shown(ours)} / {shown(other).removesuffix(' pair')}", *cells])
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _colour(name: str) -> str:
    if name == "direct":
        return NONE
    if not name.startswith("lictor"):
        return OTHERS
    return OURS_TO_OTHERS if name.startswith("lictor-to-") else OURS


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _panel(figures: Figures, what: str, left: float, top: float, width: float) -> list[str]:
    """Draw one measure: a bar as long as the median, and a line from the lowest to the highest round."""
    better = "more" if what in MORE_IS_BETTER else "less"
    parts = [_text(left, top + 14, f"{what} ({better} is better)", size=13, bold=True)]
    rows = {name: values[what] for name, values in figures.items() if what in values}
    scale = (width - LABEL_W - VALUE_W) / max(*(max(rounds) for rounds in rows.values()), 1e-9)
    begin = left + LABEL_W
    for row, (name, rounds) in enumerate(rows.items()):
        y = top + TITLE_H + row * ROW_H
        median, middle = statistics.median(rounds), y + BAR_H / 2
        bar = f'x="{begin:.1f}" y="{y:.1f}" width="{median * scale:.1f}" height="{BAR_H}"'
        parts += [
            _text(begin - 6, y + 11, shown(name).replace("`", ""), anchor="end", size=11),
            f'<rect {bar} fill="{_colour(name)}"/>',
            f'<line x1="{begin + min(rounds) * scale:.1f}" x2="{begin + max(rounds) * scale:.1f}" y1="{middle:.1f}" '
            f'y2="{middle:.1f}" stroke="{SPREAD}"/>',
            _text(begin + max(rounds) * scale + 5, y + 11, number(median), size=11),
        ]
    return parts


def picture(figures: Figures, caption: str) -> str:
    """Return an SVG document with a panel for each measure."""
    whats = measures(figures)
    width = (WIDTH - MARGIN * (COLUMNS + 1)) / COLUMNS
    height = TITLE_H + len(figures) * ROW_H + GAP_H
    lines = textwrap.wrap(caption, CAPTION_CHARS)
    parts = [_text(MARGIN, 20 + 16 * row, line) for row, line in enumerate(lines)]
    top = 28 + 16 * len(lines)
    for place, what in enumerate(whats):
        row, column = divmod(place, COLUMNS)
        parts += _panel(figures, what, MARGIN + column * (width + MARGIN), top + row * height, width)
    total = top + -(-len(whats) // COLUMNS) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def placed(document: str, section: str, content: str) -> str:
    """Return the document with the content between ``<!-- SECTION begins -->`` and ``<!-- SECTION ends -->``.

    Raises ValueError where the document has not each of these lines once, in that order.
    """
    begins, ends = f"<!-- {section} begins -->\n", f"<!-- {section} ends -->\n"
    before, found, rest = document.partition(begins)
    old, closed, after = rest.partition(ends)
    if not found or not closed or begins in rest or ends in after:
        raise ValueError(
            f"the document needs the lines {begins.strip()} and {ends.strip()}, once each, in this order"
        )
    del old
    return f"{before}{begins}{content}{ends}{after}"


def write(path: Path, section: str, figures: Figures, caption: str) -> None:
    """Put table and picture into a Markdown file; the picture is a file beside it, named by the section."""
    image = path.with_name(f"{section}.svg")
    content = f"\n{table(figures)}\n![{caption}]({image.name})\n\n{caption}\n\n"
    text = placed(path.read_text(), section, content)
    image.write_text(picture(figures, caption))
    path.write_text(text)
