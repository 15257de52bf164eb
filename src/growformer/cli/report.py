"""`growformer report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growformer.cli import show


def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The folder that `growformer bench` has filled.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file to write; left out: report.html in RESULTS.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of arms and of growths as Markdown instead.")
    ] = False,
) -> None:
    """Write one HTML page on the results of a suite, and its figures as SVG files. Nothing is fetched to read it."""
    if markdown:
        from growformer.bench.results import read_results
        from growformer.bench.summary import summarize
        from growformer.report.bench_text import markdown as table

        show.say(table(summarize(read_results(results))).rstrip())
        return
    from growformer.report.bench import write_bench

    page, figures = write_bench(results, out or results / "report.html")
    show.say(f"Report: {page}")
    for figure in figures:
        show.say(f"Figure: {figure}")


__all__ = ["report"]
