"""The picture of a chaos run: operations, faults, and the leader of each term, on one time axis (SVG).

Pure: a history in, a text out.
"""

from __future__ import annotations

from collections import Counter
from html import escape

from cli.chaos.history import History

WIDTH, LEFT, RIGHT = 1180, 110, 20
LANE_H, CHART_H = 28, 130
FAULT_Y, FAULT_H = 3, 12
LEAD_Y, LEAD_H = 17, 8
"""Within a lane: faults above, the node's terms as leader below, so that neither hides the other."""
BUCKET_S_MIN = 0.1
FAULT_COLOURS = {
    "kill": "#c0392b",
    "kill-all": "#641e16",
    "pause": "#e67e22",
    "partition": "#7d3c98",
    "one-way": "#d98ad9",
    "disk-full": "#7e5109",
    "skew": "#f1c40f",
}
FAULT_MEANINGS = {
    "kill": "killed",
    "kill-all": "all killed",
    "pause": "paused",
    "partition": "cut off both ways",
    "one-way": "deaf, but heard",
    "disk-full": "disk full",
    "skew": "clock wrong",
}
UNKNOWN_FAULT = "#566573"
TERM_COLOURS = ("#1f618d", "#1e8449", "#5dade2", "#58d68d", "#154360", "#117864")
"""Blue and green; a fault is neither."""


class _Canvas:
    """Collects SVG elements; x is seconds, y is pixels."""

    def __init__(self, duration_s: float) -> None:
        self.parts: list[str] = []
        self.scale = (WIDTH - LEFT - RIGHT) / max(duration_s, 0.001)

    def x(self, at_s: float) -> float:
        return LEFT + at_s * self.scale

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def box(self, begin_s: float, end_s: float, y: float, height: float, colour: str, tip: str) -> None:
        width = max((end_s - begin_s) * self.scale, 1.5)
        self.parts.append(
            f'<rect x="{self.x(begin_s):.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"><title>{escape(tip)}</title></rect>'
        )

    def line(self, at_s: float, top: float, bottom: float, colour: str) -> None:
        x = self.x(at_s)
        self.parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')


def draw(history: History, nodes: list[str]) -> str:
    """Return an SVG document: one lane per node with its faults and, below them, its terms as leader; then the
    operations answered per interval and those of unknown outcome, and the slowest answer of each interval."""
    canvas = _Canvas(history.duration_s)
    top = 46.0
    canvas.text(LEFT, 20, f"Chaos run, seed {history.seed}: {len(history.operations)} operations", size=15)
    _draw_legend(canvas, history)
    for row, node in enumerate(nodes):
        y = top + row * LANE_H
        canvas.text(LEFT - 8, y + 18, node, anchor="end")
        canvas.parts.append(
            f'<rect x="{LEFT}" y="{y + 2:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{LANE_H - 4}" fill="#eef1f3"/>'
        )
    for fault in history.faults:
        for node in fault.nodes:
            if node in nodes:
                y = top + nodes.index(node) * LANE_H + FAULT_Y
                tip = f"{fault.kind} {node} {fault.begin_s:.2f}-{fault.end_s:.2f} s"
                colour = FAULT_COLOURS.get(fault.kind, UNKNOWN_FAULT)
                canvas.box(fault.begin_s, fault.end_s, y, FAULT_H, colour, tip)
    ends = [span.since_s for span in history.leaders[1:]] + [history.duration_s]
    for span, end_s in zip(history.leaders, ends, strict=True):
        if span.leader in nodes:
            y = top + nodes.index(span.leader) * LANE_H + LEAD_Y
            colour = TERM_COLOURS[span.term % len(TERM_COLOURS)]
            canvas.box(span.since_s, end_s, y, LEAD_H, colour, f"{span.leader} leads term {span.term}")
    bottom = _draw_operations(canvas, history, top + len(nodes) * LANE_H + 20)
    _draw_axis(canvas, history.duration_s, top, bottom)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 30:.0f}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>{"".join(canvas.parts)}</svg>\n'
    )


def _draw_legend(canvas: _Canvas, history: History) -> None:
    """Name the colours of the faults that came, and of leadership."""
    met = [kind for kind in FAULT_COLOURS if any(fault.kind == kind for fault in history.faults)]
    entries = [(FAULT_COLOURS[kind], FAULT_MEANINGS[kind]) for kind in met]
    entries.append((TERM_COLOURS[0], "leads (a colour per term)"))
    if any(fault.kind not in FAULT_COLOURS for fault in history.faults):
        entries.append((UNKNOWN_FAULT, "other fault"))
    x = float(LEFT)
    for colour, meaning in entries:
        canvas.parts.append(f'<rect x="{x:.1f}" y="28" width="10" height="10" fill="{colour}"/>')
        canvas.text(x + 14, 37, meaning, size=11)
        x += 30 + 6.2 * len(meaning)


def _draw_operations(canvas: _Canvas, history: History, top: float) -> float:
    """Draw answered and unknown operations per interval, then the slowest answers; return the lowest y used."""
    bucket_s = max(BUCKET_S_MIN, history.duration_s / 200)
    answered: Counter[int] = Counter()
    unknown: Counter[int] = Counter()
    slowest: dict[int, float] = {}
    for op in history.operations:
        if op.known:
            bucket = int(op.returned_s / bucket_s)
            answered[bucket] += 1
            slowest[bucket] = max(slowest.get(bucket, 0.0), op.returned_s - op.invoked_s)
        else:
            unknown[int(op.invoked_s / bucket_s)] += 1
    most = max([*answered.values(), *unknown.values(), 1])
    base = top + CHART_H
    canvas.text(LEFT - 8, top + 12, f"{most / bucket_s:.0f}/s", anchor="end", size=11)
    canvas.text(LEFT - 8, base, "operations", anchor="end", size=11)
    for counts, colour, what in ((answered, "#5d9c59", "answered"), (unknown, "#c0392b", "outcome unknown")):
        for bucket, count in sorted(counts.items()):
            height = count / most * CHART_H
            begin = bucket * bucket_s
            canvas.box(begin, begin + bucket_s * 0.9, base - height, height, colour, f"{count} {what}, {begin:.1f} s")
    base2 = base + 20 + CHART_H / 2
    worst = max([*slowest.values(), 0.001])
    canvas.text(LEFT - 8, base + 32, f"{worst * 1000:.0f} ms", anchor="end", size=11)
    canvas.text(LEFT - 8, base2, "slowest", anchor="end", size=11)
    for bucket, latency_s in sorted(slowest.items()):
        height = latency_s / worst * CHART_H / 2
        begin = bucket * bucket_s
        tip = f"slowest {latency_s * 1000:.1f} ms, {begin:.1f} s"
        canvas.box(begin, begin + bucket_s * 0.9, base2 - height, height, "#2874a6", tip)
    return base2


def _draw_axis(canvas: _Canvas, duration_s: float, top: float, bottom: float) -> None:
    step = next((s for s in (1, 2, 5, 10, 30, 60, 300) if duration_s / s <= 20), 600)
    at = 0
    while at <= duration_s:
        canvas.line(at, top, bottom, "#d5d8dc")
        canvas.text(canvas.x(at), bottom + 16, f"{at} s", anchor="middle", size=11)
        at += step
