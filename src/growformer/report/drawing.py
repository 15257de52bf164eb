"""Drawings of reports: loss and parameters over steps, as coordinates that a template turns into SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

Points = Sequence[Sequence[float]]
"""[(step, value), ...]"""

_LOSS_TICKS = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)


@dataclass(frozen=True)
class Story:
    """What the drawings of a run show.

    Attributes:
        steps: of the run.
        train, held_out: losses in bits per byte over steps.
        sizes: parameters from each step on, the first at step 0.
        titles: of the growths, one for each size but the first.
    """

    steps: int
    train: Points
    held_out: Points
    sizes: Sequence[tuple[int, int]]
    titles: Sequence[str]


def drawings(story: Story) -> list[dict[str, Any]]:
    """The drawings, twice: text in a drawing shrinks with the drawing, so a phone gets some of its own width."""
    return [
        {"class": "wide", "loss": _loss(story, 720, 320), "size": _size(story, 720, 170)},
        {"class": "narrow", "loss": _loss(story, 360, 300), "size": _size(story, 360, 150)},
    ]


def page(template: str, **values: Any) -> str:
    """A template of this package, filled in."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("growformer.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["sizes"] = lambda sizes: ", ".join(f"{name} {size}" for name, size in sizes.items())
    return made.get_template(template).render(**values)


def _loss(story: Story, width: int, height: int) -> dict[str, Any]:
    losses = [loss for curve in (story.train, story.held_out) for _, loss in curve]
    # Logarithmic: what is left to learn late in a run is small beside the first hundred steps.
    under = max((tick for tick in _LOSS_TICKS if tick <= min(losses)), default=min(losses))
    low, high = math.log(under), math.log(max(losses) * 1.02)
    ticks = [tick for tick in _LOSS_TICKS if low <= math.log(tick) <= high]
    frame = _Frame(width, height, story, lambda loss: (math.log(loss) - low) / (high - low))
    drawing = frame.drawing([(tick, f"{tick:g}") for tick in ticks])
    return drawing | {"train": frame.path(story.train), "held_out": frame.path(story.held_out)}


def _size(story: Story, width: int, height: int) -> dict[str, Any]:
    last = story.sizes[-1][1]
    top = last * 1.12
    frame = _Frame(width, height, story, lambda count: count / top)
    corners, count = [(0, story.sizes[0][1])], story.sizes[0][1]
    for step, size in story.sizes[1:]:
        corners += [(step, count), (step, size)]
        count = size
    corners.append((story.steps, count))
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step, step // 2, step // 5, step // 10) if s and top / s >= 2)
    ticks = [(n * step, _short(n * step)) for n in range(int(top // step) + 1)]
    return frame.drawing(ticks) | {
        "line": frame.path(corners),
        "area": frame.path([*corners, (story.steps, 0), (0, 0)]),
    }


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count / 1000:g}k" if count else "0"


class _Frame:
    """Turns (step, value) into places on a drawing, the origin at its top left."""

    left, right, top, bottom = 44, 10, 26, 24

    def __init__(self, width: int, height: int, story: Story, up: Callable[[float], float]) -> None:
        self.width, self.height, self.story, self.up = width, height, story, up

    def x(self, step: float) -> float:
        return round(self.left + step / self.story.steps * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        return round(self.height - self.bottom - self.up(value) * (self.height - self.top - self.bottom), 2)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(step)},{self.y(value)}" for step, value in points)

    def drawing(self, ticks: Sequence[tuple[float, str]]) -> dict[str, Any]:
        """Everything but the curves."""
        steps = self.story.steps
        return {
            "width": self.width,
            "height": self.height,
            "left": self.left,
            "right": self.width - self.right,
            "top": self.top,
            "bottom": self.height - self.bottom,
            "rows": [(self.y(value), text) for value, text in ticks],
            "columns": [(self.x(step), f"{step:,}") for step in _round_steps(steps, self.width // 110)],
            "marks": [self.x(step) for step, _ in self.story.sizes[1:]],
            "titles": list(self.story.titles),
        }


def _round_steps(steps: int, about: int) -> list[int]:
    """Round numbers of steps for an axis: at most about `about` of them, 0 included."""
    unit = 10 ** math.floor(math.log10(max(steps, 1)))
    choices = [max(1, unit // 10), max(1, unit // 5), max(1, unit // 4), max(1, unit // 2), unit, 2 * unit, 5 * unit]
    step = next((s for s in choices if steps / s <= about), choices[-1])
    return list(range(0, steps + 1, step))
