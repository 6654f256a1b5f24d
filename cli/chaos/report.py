"""What a person reads after a chaos run. Pure: a report in, lines of text out."""

from __future__ import annotations

from collections import Counter

from cli.chaos.gaps import told, write_gaps
from cli.chaos.history import READ
from cli.chaos.runner import Report

GAPS_SHOWN = 5
GAP_SHOWN_S = 1.0
"""Elections alone make gaps that are shorter."""


def lines(report: Report) -> list[str]:
    """Return the report: what was done, what was answered, and what is wrong if anything is."""
    history = report.history
    kinds = Counter(fault.kind for fault in history.faults)
    reads = Counter(op.mode for op in history.operations if op.kind == READ)
    writes = [op for op in history.operations if op.kind != READ]
    unknown = sum(1 for op in writes if not op.known)
    gaps = write_gaps(history)
    terms = {span.term for span in history.leaders if span.leader}
    out = [
        f"Seed {history.seed}, {history.duration_s:.0f} s, {len(history.operations)} operations on "
        f"{len(report.verdicts)} keys, {report.acknowledged} acknowledged registrations",
        "  faults     " + (", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"),
        f"  leaders    {len(terms)} terms seen with a leader",
        "  reads      " + ", ".join(f"{count} {mode}" for mode, count in sorted(reads.items())),
        f"  writes     {len(writes) - unknown} answered, {unknown} of unknown outcome,"
        f" longest gap {gaps[0].length_s:.2f} s",
    ]
    out += [f"  gap        {told(gap)}" for gap in gaps[:GAPS_SHOWN] if gap.length_s >= GAP_SHOWN_S]
    out += [f"  answer     {count}x {text}" for text, count in sorted(report.errors.items())]
    for verdict in report.verdicts:
        if verdict.undecided:
            out.append(f"UNDECIDED  {verdict.key}: the search was too large ({verdict.operations} operations)")
        elif not verdict.linearizable:
            out.append(f"VIOLATION  {verdict.key} is not linearizable; none of these can come next:")
            out += [
                f"             {op.invoked_s:.3f}-{op.returned_s:.3f} s {op.client} at {op.node}: "
                f"{op.mode} {op.kind} {op.expected or ''} -> {op.value} {'' if op.succeeded else '(failed)'}"
                for op in verdict.stuck
            ]
    out += [f"VIOLATION  {text}" for text in report.sessions]
    out += [f"LOST       {text}" for text in report.lost]
    out.append(
        "Passed: every key is linearizable, nothing acknowledged was lost."
        if report.passed
        else "FAILED: see the lines above; the same seed repeats the same faults."
    )
    return out
