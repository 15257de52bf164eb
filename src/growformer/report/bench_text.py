"""The results of a benchmark as Markdown, for docs and chats: all arms, and what growths save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from growformer.bench.analysis import Interval
from growformer.bench.summary import Line, Summary, by_loss

ARMS = ("arm", "parameters", "rate", "seeds", "bits per byte", "against scratch")
"""Columns of the table of all arms."""

GROWTHS = (
    "growth", "at growth", "bits per byte", "FLOPs saved against scratch", "beyond step 0", "against not growing",
    "FLOPs saved against it", "kappa", "verdict",
)  # fmt: skip
"""Columns of the table of those that grow in mid-run."""


def markdown(summary: Summary) -> str:
    """Two tables: of all arms that have results, in the suite's order; and of growths, the least loss first."""
    lines = [line for line in summary.lines if line.runs]
    grown = by_loss([line for line in lines if line.kind == "grown"])
    return _table(ARMS, map(_arm, lines)) + "\n" + _table(GROWTHS, map(_growth, grown))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (columns, ("---",) * len(columns), *rows))


def _arm(line: Line) -> tuple[str, ...]:
    edge = " (end of the grid)" if line.edge else ""
    alike = control(line)
    name = f"{line.name} (as {line.arm['same_as']}, {alike})" if alike else line.name
    return (
        name, sizes(line), "-" if line.rate is None else f"{line.rate:g}{edge}", str(len(line.runs)),
        said(line.loss, ".4f"), said(line.difference, "+.4f"),
    )  # fmt: skip


def _growth(line: Line) -> tuple[str, ...]:
    pays = f", pays above {line.break_even:.2f}" if line.break_even is not None else ""
    return (
        line.name, at_growth(line), said(line.loss, ".4f"), said(line.saved, ".1%") + _star(line.saved, line.beyond),
        said(line.claimed, ".1%") if line.arm["step_zero"] else "-", said(line.over_small, "+.4f"),
        said(line.saved_over_small, ".1%") + _star(line.saved_over_small, line.beyond_small),
        said(line.credit, ".2f") + pays, line.verdict,
    )  # fmt: skip


def _star(saved: Interval | None, beyond: bool) -> str:
    """What marks a saving that was read from where the curve is a guess."""
    return " *" if beyond and saved is not None else ""


def sizes(line: Line) -> str:
    """Parameters of an arm's models, in order."""
    return " -> ".join(f"{size:,}" for size in line.result["parameters"]) if line.result else "-"


def at_growth(line: Line) -> str:
    """Held-out loss just before and after each growth of one of the runs."""
    found = [growth["bits_per_byte"] for growth in line.result["growths"]] if line.result else []
    return ", ".join(f"{before:.4f} -> {after:.4f}" for before, after in found) or "-"


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


__all__ = ["at_growth", "control", "markdown", "said", "sizes"]
