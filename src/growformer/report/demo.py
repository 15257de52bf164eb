"""report.html of the demo, from its results.json alone: one file that needs nothing else, not even a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growformer.errors import SourceError, TargetError
from growformer.report.drawing import Story, drawings, page

FORMAT = 1
"""Version of results.json that is read."""


def write_report(results: Path, report: Path) -> None:
    """Write the report.

    Args:
        results: the demo's results.json.
        report: the HTML file to write.

    Raises:
        SourceError: `results` cannot be read, or is no results.json of this version.
        TargetError: `report` cannot be written.
    """
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{results}: no results can be read from it: {error}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise SourceError(f"{results}: has format {found!r}; this version reads format {FORMAT}")
    try:
        report.write_text(render(data), encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{report}: cannot be written: {error.strerror}") from error


def render(results: Mapping[str, Any]) -> str:
    """The report as HTML, from what results.json holds."""
    events = results["events"]
    story = Story(
        steps=results["steps"],
        train=results["curve"]["train"],
        held_out=results["curve"]["held_out"],
        sizes=[(0, results["start"]["parameters"]), *((e["step"], e["parameters"][1]) for e in events)],
        titles=[f"{event['name']}, step {event['step']:,}" for event in events],
    )
    return page(
        "demo.html.j2",
        results=results,
        drawings=drawings(story),
        worst=max((event["proof"]["measured"]["relative"] for event in events), default=0.0),
        dead=sum(event["proof"]["measured"]["dead"] for event in events),
        new=sum(event["proof"]["measured"]["new_entries"] for event in events),
        holds=all(event["proof"]["exit_code"] == 0 for event in events),
    )
