"""The results of a benchmark as Markdown, for docs and chats: one line an arm."""

from __future__ import annotations

from growformer.bench.analysis import Interval
from growformer.bench.summary import Line, Summary

COLUMNS = (
    "arm", "parameters", "rate", "seeds", "bits per byte", "against scratch", "against not growing",
    "FLOPs saved against it", "FLOPs saved against scratch", "beyond step 0", "verdict",
)  # fmt: skip


def markdown(summary: Summary) -> str:
    """The table of all arms that have results."""
    rows = [_row(line) for line in summary.lines if line.runs]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _row(line: Line) -> tuple[str, ...]:
    edge = " (end of the grid)" if line.edge else ""
    return (
        line.name, sizes(line), "-" if line.rate is None else f"{line.rate:g}{edge}", str(len(line.runs)),
        said(line.loss, ".4f"), said(line.difference, "+.4f"), said(line.over_small, "+.4f"),
        said(line.saved_over_small, ".1%") + (" *" if line.beyond_small and line.saved_over_small else ""),
        said(line.saved, ".1%") + (" *" if line.beyond and line.saved else ""),
        said(line.claimed, ".1%"), line.verdict or control(line) or "-",
    )  # fmt: skip


def sizes(line: Line) -> str:
    """Parameters of an arm's models, in order."""
    return " -> ".join(f"{size:,}" for size in line.result["parameters"]) if line.result else "-"


def control(line: Line) -> str:
    """Whether an arm equals the one that it must; empty where there is nothing to compare."""
    return {True: "bit for bit", False: "NOT bit for bit", None: ""}[line.control]


def said(found: Interval | None, form: str) -> str:
    """A value and its interval."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:{form}} (one seed)"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


__all__ = ["control", "markdown", "said", "sizes"]
