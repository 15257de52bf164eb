"""Figures of a benchmark as SVG, drawn here: each is a string that stands in a page or in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, without yellow, which white swallows; told apart by dashes as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#1b1f24", "#56b4e9", "#e69f00")
DARK = ("#56b4e9", "#ff9152", "#3fc79a", "#e3a3c6", "#e6edf3", "#0072b2", "#e69f00")
LEFT_OUT = 0.3
"""Share of the points of courses, those with the greatest losses, that lie above the picture."""

DASHES = ("", "7 3", "2 3", "9 3 2 3")


def style() -> str:
    """What all figures are drawn with, for light and for dark."""
    lines = [
        ".f text{font:12px system-ui,sans-serif;fill:#57606a}.f .grid{stroke:#d0d7de}.f .axis{stroke:#57606a}",
        ".f .line{fill:none;stroke-width:2;stroke-linejoin:round}.f .bar{stroke-width:2.5}.f .zero{stroke:#57606a;"
        "stroke-dasharray:3 3}.f .fit{fill:none;stroke:#57606a;stroke-width:1.5;stroke-dasharray:1 3}",
        *(f".f .c{i}{{stroke:{c};fill:{c}}}.f .line.c{i}{{fill:none}}" for i, c in enumerate(COLOURS)),
        "@media (prefers-color-scheme:dark){.f text{fill:#9da7b1}.f .grid{stroke:#363d46}.f .axis,.f .zero,.f .fit"
        "{stroke:#9da7b1}"
        + "".join(f".f .c{i}{{stroke:{c};fill:{c}}}.f .line.c{i}{{fill:none}}" for i, c in enumerate(DARK))
        + "}",
    ]
    return "\n".join(lines)


def look(index: int) -> tuple[str, str]:
    """Of the index-th arm: the class of its colour, and its dashes; 28 different ones."""
    return f"c{index % len(COLOURS)}", DASHES[index // len(COLOURS) % len(DASHES)]


@dataclass(frozen=True)
class Series:
    """A line or points.

    Attributes:
        name: of the arm.
        index: of its look.
        points: [(x, y), ...].
        marks: x where it grew.
    """

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Row:
    """A value with its interval.

    Attributes:
        name: of the arm.
        index: of its look.
        mean, low, high: the value; None: no interval.
    """

    name: str
    index: int
    mean: float
    low: float | None
    high: float | None


class Frame:
    """Axes: values to places, the origin at the top left.

    Args:
        width, height: of the figure, pixels.
        x, y: (least, greatest) of each.
        log: whether x is logarithmic.
        left: room for the labels of rows.
    """

    def __init__(
        self,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log: bool = False,
        left: int = 48,
    ) -> None:
        self.width, self.height, self.left, self.right, self.top, self.bottom = width, height, left, 12, 10, 40
        self._map: Callable[[float], float] = math.log10 if log else float
        self._x, self._y, self.log = tuple(map(self._map, x)), y, log

    def x(self, value: float) -> float:
        low, high = self._x
        return round(self.left + (self._map(value) - low) / (high - low) * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom), 2
        )

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x)},{self.y(y)}" for x, y in points)

    def axes(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], title: str) -> list[str]:
        out = []
        for value, text in ys:
            at = self.y(value)
            out.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{at}" y2="{at}"/>')
            out.append(f'<text x="{self.left - 6}" y="{at + 4}" text-anchor="end">{escape(text)}</text>')
        bottom = self.height - self.bottom
        for value, text in xs:
            at = self.x(value)
            anchor = "end" if at > self.width - self.right - 18 else "middle"
            out.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="{anchor}">{escape(text)}</text>')
        out.append(f'<line class="axis" x1="{self.left}" x2="{self.width - self.right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (self.left + self.width - self.right) / 2
        out.append(f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(title)}</text>')
        return out


def svg(body: Sequence[str], width: int, height: int, label: str, kind: str = "wide") -> str:
    """A figure for a page."""
    return (
        f'<svg class="f {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "\n".join(body)
        + "</svg>"
    )


def alone(figure: str) -> str:
    """A figure as a file of its own."""
    head, body = figure.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style()}</style>{body}\n'


def courses(series: Sequence[Series], title: str, label: str, width: int, height: int, kind: str) -> str:
    """Lines over FLOPs, growths marked by circles."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    # What is left to learn late is small beside the first steps, which are left out.
    top = sorted(ys)[int((1 - LEFT_OUT) * (len(ys) - 1))]
    low = min(ys)
    span = (top - low) or 1.0
    frame = Frame(width, height, (0.0, max(xs)), (low - 0.04 * span, top + 0.04 * span))
    body = frame.axes(_ticks(0, max(xs), width // 110), _ticks(low, top, 5), title)
    for s in series:
        colour, dash = look(s.index)
        inside = [(x, y) for x, y in s.points if y <= top + 0.04 * span]
        if not inside:
            continue
        line = f'<path class="line {colour}" stroke-dasharray="{dash}" d="{frame.path(inside)}"/>'
        body.append(f"<g><title>{escape(s.name)}</title>{line}")
        for mark in s.marks:
            near = min(inside, key=lambda point: abs(point[0] - mark))
            body.append(f'<circle class="{colour}" cx="{frame.x(mark)}" cy="{frame.y(near[1])}" r="5"/>')
        body.append("</g>")
    return svg(body, width, height, label, kind)


def costs(
    points: Sequence[Series],
    fit: Callable[[float], float] | None,
    title: str,
    label: str,
    width: int,
    height: int,
    kind: str,
) -> str:
    """Losses at the end over FLOPs (logarithmic), and the scratch curve."""
    xs = [x for s in points for x, _ in s.points]
    ys = [y for s in points for _, y in s.points]
    left, right = min(xs) / 1.5, max(xs) * 1.5
    span = (max(ys) - min(ys)) or 1.0
    frame = Frame(width, height, (left, right), (min(ys) - 0.08 * span, max(ys) + 0.08 * span), log=True)
    marks = sorted({min(xs), max(xs), math.sqrt(min(xs) * max(xs))})
    body = frame.axes([(x, f"{x:.2g}") for x in marks], _ticks(min(ys), max(ys), 5), title)
    if fit is not None:
        along = [left * (right / left) ** (i / 40) for i in range(41)]
        inside = [(x, y) for x in along if min(ys) - 0.08 * span <= (y := fit(x)) <= max(ys) + 0.08 * span]
        if len(inside) > 1:
            body.append(f'<path class="fit" d="{frame.path(inside)}"><title>scratch curve</title></path>')
    for s in points:
        colour, dash = look(s.index)
        fill = ' fill-opacity="0"' if dash else ""
        aside = _aside(s, points, min(6.0, width / 60))
        for x, y in s.points:
            place = f'cx="{frame.x(x) + aside:.2f}" cy="{frame.y(y)}" r="4.5"'
            title = f"<title>{escape(s.name)}: {y:.4f}</title>"
            body.append(f'<circle class="{colour}" stroke-width="1.6"{fill} {place}>{title}</circle>')
    return svg(body, width, height, label, kind)


def _aside(one: Series, all_of_them: Sequence[Series], step: float) -> float:
    """How far to the side an arm stands, so that arms of one cost do not hide each other: pixels."""
    near = [s for s in all_of_them if s.points and abs(s.points[0][0] / one.points[0][0] - 1) < 0.05]
    return (near.index(one) - (len(near) - 1) / 2) * step


def forest(rows: Sequence[Row], title: str, label: str, width: int, kind: str) -> str:
    """Values with their intervals, one a row, and the line of no effect."""
    ends = [v for r in rows for v in (r.mean, r.low, r.high, 0.0) if v is not None]
    # An interval may be far wider than the values; it is then cut at the frame.
    means = [r.mean for r in rows] + [0.0]
    reach = max(max(map(abs, means)) * 2.5, 0.05)
    low, high = max(min(ends), -reach), min(max(ends), reach)
    pad = 0.06 * ((high - low) or 1.0)
    height = 26 * len(rows) + 56
    left = min(width // 2, 16 + 7 * max(len(r.name) for r in rows))
    frame = Frame(width, height, (low - pad, high + pad), (0.0, float(len(rows))), left=left)
    body = frame.axes(_ticks(low, high, width // 130, percent=True), [], title)
    zero, foot = frame.x(0), height - frame.bottom
    body.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="{frame.top}" y2="{foot}"/>')
    for i, row in enumerate(rows):
        at, (colour, dash) = frame.y(len(rows) - i - 0.5), look(row.index)
        body.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{escape(row.name)}</text>')
        if row.low is not None and row.high is not None:
            a, b = (frame.x(min(max(v, low - pad), high + pad)) for v in (row.low, row.high))
            body.append(f'<line class="bar {colour}" stroke-dasharray="{dash}" x1="{a}" x2="{b}" y1="{at}" y2="{at}"/>')
        mean = min(max(row.mean, low - pad), high + pad)
        body.append(
            f'<circle class="{colour}" cx="{frame.x(mean)}" cy="{at}" r="5"><title>{escape(row.name)}: {row.mean:.1%}'
            "</title></circle>"
        )
    return svg(body, width, height, label, kind)


def _ticks(low: float, high: float, about: int, percent: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two: about so many."""
    span = (high - low) or 1.0
    raw = span / max(2, about)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    values = [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    if percent:
        return [(v, f"{v:.{max(0, digits - 2)}%}") for v in values]
    return [(v, f"{v:.{digits}f}" if high < 1e5 else f"{v:.2g}") for v in values]
