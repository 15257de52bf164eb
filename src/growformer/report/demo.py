"""report.html of the demo, from its results.json alone: one file that needs nothing else, not even a network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from growformer.errors import SourceError, TargetError

FORMAT = 1
"""Version of results.json that is read."""

_LOSS_TICKS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)


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
    from jinja2 import Environment, StrictUndefined

    template = resources.files("growformer.report").joinpath("demo.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["sizes"] = lambda sizes: ", ".join(f"{name} {size}" for name, size in sizes.items())
    # Text in a drawing shrinks with the drawing, so a phone gets a drawing of its own width.
    drawings = [
        {"class": "wide", "loss": _loss(results, 720, 320), "size": _size(results, 720, 170)},
        {"class": "narrow", "loss": _loss(results, 360, 300), "size": _size(results, 360, 150)},
    ]
    events = results["events"]
    return page.from_string(template).render(
        results=results,
        drawings=drawings,
        worst=max((event["proof"]["measured"]["relative"] for event in events), default=0.0),
        dead=sum(event["proof"]["measured"]["dead"] for event in events),
        new=sum(event["proof"]["measured"]["new_entries"] for event in events),
        holds=all(event["proof"]["exit_code"] == 0 for event in events),
    )


def _loss(results: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    curves = {name: results["curve"][name] for name in ("train", "held_out")}
    losses = [loss for curve in curves.values() for _, loss in curve]
    # Logarithmic: what is left to learn late in a run is small beside the first hundred steps.
    under = max((tick for tick in _LOSS_TICKS if tick <= min(losses)), default=min(losses))
    low, high = math.log(under), math.log(max(losses) * 1.02)
    ticks = [tick for tick in _LOSS_TICKS if low <= math.log(tick) <= high]
    frame = _frame(results, width, height, lambda loss: (math.log(loss) - low) / (high - low))
    drawing = frame.drawing([(tick, f"{tick:g}") for tick in ticks])
    return drawing | {name: frame.path(curve) for name, curve in curves.items()}


def _size(results: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    top = results["final"]["parameters"] * 1.12
    frame = _frame(results, width, height, lambda count: count / top)
    corners, count = [(0, results["start"]["parameters"])], results["start"]["parameters"]
    for event in results["events"]:
        corners += [(event["step"], count), (event["step"], event["parameters"][1])]
        count = event["parameters"][1]
    corners.append((results["steps"], count))
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step, step // 2, step // 5, step // 10) if s and top / s >= 2)
    ticks = [(n * step, f"{n * step / 1000:g}k" if n else "0") for n in range(int(top // step) + 1)]
    return frame.drawing(ticks) | {
        "line": frame.path(corners),
        "area": frame.path([*corners, (results["steps"], 0), (0, 0)]),
    }


class _Frame:
    """Turns (step, value) into places on a drawing, the origin at its top left."""

    left, right, top, bottom = 44, 10, 26, 24

    def __init__(self, width: int, height: int, steps: int, marks: Sequence[int], up: Callable[[float], float]) -> None:
        self.width, self.height, self.steps, self.marks, self.up = width, height, steps, marks, up

    def x(self, step: float) -> float:
        return round(self.left + step / self.steps * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        return round(self.height - self.bottom - self.up(value) * (self.height - self.top - self.bottom), 2)

    def path(self, points: Sequence[Sequence[float]]) -> str:
        return "M" + "L".join(f"{self.x(step)},{self.y(value)}" for step, value in points)

    def drawing(self, ticks: Sequence[tuple[float, str]]) -> dict[str, Any]:
        """Everything but the curves."""
        return {
            "width": self.width,
            "height": self.height,
            "left": self.left,
            "right": self.width - self.right,
            "top": self.top,
            "bottom": self.height - self.bottom,
            "rows": [(self.y(value), text) for value, text in ticks],
            "columns": [(self.x(step), f"{step:,}") for step in _round_steps(self.steps, self.width // 110)],
            "marks": [self.x(step) for step in self.marks],
        }


def _frame(results: Mapping[str, Any], width: int, height: int, up: Callable[[float], float]) -> _Frame:
    return _Frame(width, height, results["steps"], [event["step"] for event in results["events"]], up)


def _round_steps(steps: int, about: int) -> list[int]:
    """Round numbers of steps for an axis: at most about `about` of them, 0 included."""
    unit = 10 ** math.floor(math.log10(max(steps, 1)))
    choices = [max(1, unit // 10), max(1, unit // 5), max(1, unit // 4), max(1, unit // 2), unit, 2 * unit, 5 * unit]
    step = next((s for s in choices if steps / s <= about), choices[-1])
    return list(range(0, steps + 1, step))
