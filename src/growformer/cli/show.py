"""What commands print: rich on a terminal, plain text elsewhere, JSON for machines. Tables are Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a Markdown table, in colours on a terminal."""
    if title:
        say(f"\n{title}")
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        shown = Table(box=box.MARKDOWN, header_style="bold")
        for header in headers:
            shown.add_column(header, overflow="fold")
        for row in rows:
            shown.add_row(*(_coloured(cell) for cell in row))
        Console().print(shown)
        return
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    print("| " + " | ".join(h.ljust(w) for h, w in zip(headers, widths, strict=True)) + " |")
    print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    for row in rows:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")


def _coloured(cell: str) -> str:
    from rich.markup import escape

    colour = {"holds": "green", "FAILS": "bold red", "not checked": "yellow"}.get(cell)
    return f"[{colour}]{cell}[/]" if colour else escape(cell)


def say(text: str) -> None:
    """Print a line."""
    print(text)


def error(text: str) -> None:
    """Print an error, to the error stream."""
    print(f"growformer: {text}", file=sys.stderr)


def as_json(data: Any) -> None:
    """Print plain data for a machine."""
    print(json.dumps(data, indent=2))


def number(count: int) -> str:
    """A count for people: 260,032 or 1.08M."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:,}"


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the error stream, where that is a terminal: (what, done, total)."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("plan", total=None)

        def tell(what: str, done: int, total: int) -> None:
            if total:
                bar.update(task, description=what, completed=done, total=total)
            else:
                bar.update(task, description=f"prove: {what}")

        yield tell
