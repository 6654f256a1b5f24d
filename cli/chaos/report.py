"""What a person reads after a chaos run. Pure: a report in, lines of text out."""

from __future__ import annotations

import itertools
from collections import Counter

from cli.chaos.history import READ
from cli.chaos.runner import Report


def longest_write_gap_s(report: Report) -> float:
    """Return the longest time between two acknowledged writes, the run's ends included."""
    moments = sorted(op.returned_s for op in report.history.operations if op.kind != READ and op.known)
    ends = [0.0, *moments, report.history.duration_s]
    return max(b - a for a, b in itertools.pairwise(ends))


def lines(report: Report) -> list[str]:
    """Return the report: what was done, what was answered, and what is wrong if anything is."""
    history = report.history
    kinds = Counter(fault.kind for fault in history.faults)
    reads = Counter(op.mode for op in history.operations if op.kind == READ)
    writes = [op for op in history.operations if op.kind != READ]
    unknown = sum(1 for op in writes if not op.known)
    terms = {span.term for span in history.leaders if span.leader}
    out = [
        f"Seed {history.seed}, {history.duration_s:.0f} s, {len(history.operations)} operations on "
        f"{len(report.verdicts)} keys, {report.acknowledged} acknowledged registrations",
        "  faults     " + (", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"),
        f"  leaders    {len(terms)} terms seen with a leader",
        "  reads      " + ", ".join(f"{count} {mode}" for mode, count in sorted(reads.items())),
        f"  writes     {len(writes) - unknown} answered, {unknown} of unknown outcome,"
        f" longest gap {longest_write_gap_s(report):.2f} s",
    ]
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
