"""The report of a benchmark: one HTML page and its figures, from result files and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growformer.bench.results import read_results
from growformer.bench.summary import Line, Summary, by_loss, summarize
from growformer.checkpoint.folder import target_errors
from growformer.report import bench_drawing as drawing
from growformer.report.bench_drawing import Row, Series
from growformer.report.bench_text import at_growth, control, said, sizes
from growformer.report.drawing import page

SIZES = (("wide", 760, 380), ("narrow", 360, 320))
"""Figures are drawn twice: text in a figure shrinks with it, so a phone gets some of its own width."""


def write_bench(results: Path, out: Path) -> tuple[Path, list[Path]]:
    """Write the page and, beside it, each figure as an SVG file.

    Args:
        results: the folder that `growformer bench` has filled.
        out: the HTML file.

    Returns:
        The page and the figures.

    Raises:
        SourceError: there are no results, or one is damaged.
        TargetError: it cannot be written.
    """
    found = read_results(results)
    inner = results / "results" if (results / "results").is_dir() else results
    links = Path(os.path.relpath(inner.resolve(), out.resolve().parent)).as_posix()
    html, figures = render(found, links)
    made = []
    with target_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
        for name, figure in figures.items():
            path = out.with_name(f"{out.stem}-{name}.svg")
            path.write_text(drawing.alone(figure), encoding="utf-8")
            made.append(path)
    return out, made


def render(results: Mapping[str, Mapping[str, Any]], links: str) -> tuple[str, dict[str, str]]:
    """The page, and its figures by name.

    Args:
        results: by name.
        links: the folder of the result files, from where the page is.
    """
    summary = summarize(results)
    figures = _figures(summary, results)
    first = next(iter(results.values()))
    html = page(
        "bench.html.j2",
        summary=summary,
        suite=summary.suite,
        figures=figures,
        style=drawing.style(),
        keys=_keys(summary.lines),
        names=[line.name for line in summary.lines if line.runs],
        columns=COLUMNS,
        rows=[_row(line, results, links) for line in summary.lines],
        trials=[_trial(line, results, links) for line in summary.lines],
        versions=first["versions"],
        sources=sorted({r["source"] for r in results.values()}),
        count=len(results),
        all_flops=sum(line.all_flops for line in summary.lines),
    )
    return html, {name: wide for name, (wide, _) in figures.items()}


COLUMNS = (
    "arm", "verdict", "parameters", "rate", "at growth", "loss", "against scratch", "against not growing",
    "FLOPs saved", "beyond step 0", "kappa", "bytes", "FLOPs", "seconds",
)  # fmt: skip
"""Of the table."""


def _row(line: Line, results: Mapping[str, Mapping[str, Any]], links: str) -> list[dict[str, Any]]:
    """The cells of an arm: text, what it is sorted by, and small print."""
    some = line.result
    runs = [
        (f"{links}/{name}.json", f"seed {seed}: {loss:.4f}")
        for (seed, name), loss in zip(line.runs.items(), _ends(line, results), strict=True)
    ]
    alike = control(line)
    credit_note = f"pays above {line.break_even:.2f}" if line.break_even is not None else ""
    return [
        _cell(line.name, line.name, line.about),
        _cell(line.verdict or (f"{line.arm['same_as']}: {alike}" if alike else "-"), line.verdict),
        _cell(sizes(line), some["parameters"][-1] if some else None),
        _cell("-" if line.rate is None else f"{line.rate:g}", line.rate, "at the end of the grid" if line.edge else ""),
        _cell(at_growth(line), _jump(line)),
        _cell(said(line.loss, ".4f"), line.loss.mean if line.loss else None, links=runs),
        _cell(said(line.difference, "+.4f"), line.difference.mean if line.difference else None),
        _cell(
            said(line.over_small, "+.4f"),
            line.over_small.mean if line.over_small else None,
            f"{said(line.saved_over_small, '.1%')} FLOPs saved{', beyond its curve' if line.beyond_small else ''}"
            if line.saved_over_small
            else "",
        ),
        _cell(
            said(line.saved, ".1%"),
            line.saved.mean if line.saved else None,
            "beyond the measured curve" if line.beyond and line.saved else "",
        ),
        _cell(said(line.claimed, ".1%"), line.claimed.mean if line.claimed else None),
        _cell(said(line.credit, ".2f"), line.credit.mean if line.credit else None, credit_note),
        _cell(f"{some['tokens']:,}" if some else "-", some["tokens"] if some else None),
        _cell(f"{some['flops']['total']:.3g}" if some else "-", some["flops"]["total"] if some else None,
              f"{line.all_flops:.3g} with all trials"),
        _cell("-" if line.seconds is None else f"{line.seconds:.0f}", line.seconds),
    ]  # fmt: skip


def _jump(line: Line) -> float | None:
    """How much all growths of one of the runs have added to the loss."""
    growths = line.result["growths"] if line.result else []
    return sum(after - before for before, after in (g["bits_per_byte"] for g in growths)) if growths else None


def _cell(text: str, sort: object, small: str = "", links: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    return {"text": text, "sort": "" if sort is None else sort, "small": small, "links": links}


def _trial(line: Line, results: Mapping[str, Mapping[str, Any]], links: str) -> dict[str, Any]:
    """What each learning rate gave on the tuning seed, each linked to its file."""
    cells = []
    for rate, name in sorted(line.trials.items()):
        losses = results[name]["bits_per_byte"]
        said = "diverged" if losses is None else f"{losses['valid']:.4f}"
        cells.append({"rate": f"{rate:g}", "text": said, "link": f"{links}/{name}.json", "chosen": rate == line.rate})
    return {"name": line.name, "cells": cells}


def _keys(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Kinds of arms, in words and as the figures draw them."""
    there = {line.kind for line in lines if line.runs}
    return [
        {"said": look.about, "line": f'<path {drawing.stroke(kind)} d="M0,6H30"/>{drawing.mark(kind, 15, 6, 4)}'}
        for kind, look in drawing.LOOKS.items()
        if kind in there
    ]


def _figures(summary: Summary, results: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Each figure, wide and narrow."""
    lines = [line for line in summary.lines if line.runs]
    out: dict[str, tuple[str, str]] = {}
    if not lines:
        return out
    series, ends = [], []
    for line in lines:
        run = results[next(iter(line.runs.values()))]
        curve = [(float(flops), float(loss)) for _, _, flops, loss in run["evaluations"]]
        series.append(Series(line.name, line.kind, curve, [float(g["flops"]) for g in run["growths"]]))
        costs = [float(results[name]["flops"]["total"]) for name in line.runs.values()]
        ends.append(Series(line.name, line.kind, list(zip(costs, _ends(line, results), strict=True))))
    out["courses"] = _twice(
        lambda kind, width, height: drawing.courses(
            series, "FLOPs", "Held-out loss of each arm over FLOPs, growths marked", width, height, kind
        )
    )
    curve_fit = next(iter(summary.curves.values()), None)
    fit = curve_fit.loss if curve_fit else None
    out["costs"] = _twice(
        lambda kind, width, height: drawing.costs(
            ends, fit, "FLOPs (logarithmic)", "Loss at the end of each run over its FLOPs", width, height, kind
        )
    )
    rows, scratch = _losses(lines, results)
    if rows:
        out["losses"] = _twice(
            lambda kind, width, height: drawing.forest(
                rows, "bits per byte", "Losses of arms of one cost", width, kind, line=scratch, form=".4f", room=0.4
            )
        )
    saved = [Row(x.name, x.kind, y.mean, y.low, y.high) for x in lines if x.claimed and (y := x.least)]
    saved.sort(key=lambda row: -row.mean)
    if saved:
        out["savings"] = _twice(
            lambda kind, width, height: drawing.forest(
                saved, "FLOPs saved, the lesser of both", "Savings with intervals", width, kind
            )
        )
    return out


def _losses(lines: Sequence[Line], results: Mapping[str, Mapping[str, Any]]) -> tuple[list[Row], float]:
    """Losses of the arms that cost what the suite's budget is, the least first; and the least from scratch."""
    rows = [
        Row(line.name, line.kind, line.loss.mean, line.loss.low, line.loss.high, _ends(line, results))
        for line in by_loss([line for line in lines if line.arm["budget"] == 1])
        if line.loss
    ]
    scratch = [row.mean for row in rows if row.kind == "scratch"]
    return (rows, scratch[0]) if scratch else ([], 0.0)


def _ends(line: Line, results: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """The loss of each of its runs."""
    return [float(results[name]["bits_per_byte"]["test"]) for name in line.runs.values()]


def _twice(draw: Any) -> tuple[str, str]:
    wide, narrow = (draw(kind, width, height) for kind, width, height in SIZES)
    return wide, narrow


__all__ = ["render", "write_bench"]
