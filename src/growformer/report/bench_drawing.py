"""Figures of a benchmark as SVG, drawn here: each is a string that stands in a page or in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Look:
    """How arms of one kind are drawn. Colours are Okabe and Ito's; dashes and marks tell them apart as well.

    Attributes:
        about: what they are, in words.
        light, dark: the colour on a light ground and on a dark one.
        dashes: of a line, as SVG has them.
        width: of a line, pixels.
        corners: of what stands for a run, in its radius; none: a circle.
    """

    about: str
    light: str
    dark: str
    dashes: str = ""
    width: float = 1.6
    corners: tuple[tuple[float, float], ...] = ()


LOOKS = {
    "scratch": Look(
        "the final size from scratch", "#1b1f24", "#e6edf3", width=3.0, corners=((-1, -1), (1, -1), (1, 1), (-1, 1))
    ),
    "still": Look(
        "another model that never grows",
        "#d55e00",
        "#ff9152",
        "7 3",
        corners=((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ),
    "grown": Look("grows in mid-run", "#0072b2", "#56b4e9"),
    "start": Look(
        "grown before the first step", "#009e73", "#3fc79a", "2 3", 1.4, corners=((0, -1.2), (1.2, 0.9), (-1.2, 0.9))
    ),
    "control": Look("grows by nothing", "#cc79a7", "#e3a3c6", "9 3 2 3", corners=((0, 1.2), (1.2, -0.9), (-1.2, -0.9))),
}
"""By kind. Arms are told apart by what they are, and by name in words: of so many colours nobody could."""

LEFT_OUT = 0.3
"""Share of the points of courses, those with the greatest losses, that lie above the picture."""


def style() -> str:
    """What all figures are drawn with, for light and for dark."""

    def colours(of: Callable[[Look], str]) -> str:
        return "".join(f".f .{k}{{stroke:{of(v)};fill:{of(v)}}}.f .line.{k}{{fill:none}}" for k, v in LOOKS.items())

    lines = [
        ".f text{font:12px system-ui,sans-serif;fill:#57606a}.f .grid{stroke:#d0d7de}.f .axis{stroke:#57606a}",
        ".f .line{fill:none;stroke-linejoin:round}.f .bar{stroke-width:2.5;stroke-opacity:.45}.f .zero{stroke:#57606a;"
        "stroke-dasharray:3 3}.f .fit{fill:none;stroke:#57606a;stroke-width:1.5;stroke-dasharray:1 3}",
        colours(lambda look: look.light),
        f"@media (prefers-color-scheme:dark){{.f text{{fill:#9da7b1}}.f .grid{{stroke:#363d46}}.f .axis,.f .zero,.f "
        f".fit{{stroke:#9da7b1}}{colours(lambda look: look.dark)}}}",
    ]
    return "\n".join(lines)


def stroke(kind: str) -> str:
    """Of a line."""
    look = LOOKS[kind]
    return f'class="line {kind}" stroke-width="{look.width:g}" stroke-dasharray="{look.dashes}"'


def mark(kind: str, x: float, y: float, radius: float, title: str = "") -> str:
    """What stands for a run."""
    said = f"<title>{escape(title)}</title>" if title else ""
    if not (corners := LOOKS[kind].corners):
        return f'<circle class="{kind}" cx="{x:.2f}" cy="{y:.2f}" r="{radius:g}">{said}</circle>'
    path = "L".join(f"{x + dx * radius * 0.9:.2f},{y + dy * radius * 0.9:.2f}" for dx, dy in corners)
    return f'<path class="{kind}" d="M{path}Z">{said}</path>'


@dataclass(frozen=True)
class Series:
    """A line or points.

    Attributes:
        name: of the arm.
        kind: one of LOOKS.
        points: [(x, y), ...].
        grows: x where it grew.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    grows: Sequence[float] = ()


@dataclass(frozen=True)
class Row:
    """A value with its interval.

    Attributes:
        name: of the arm.
        kind: one of LOOKS.
        mean, low, high: the value; None: no interval.
        runs: the values of which it is the mean, where they are shown.
    """

    name: str
    kind: str
    mean: float
    low: float | None
    high: float | None
    runs: Sequence[float] = ()


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
        half = 3.4 * len(title)  # about: a long title does not stand in the middle of a narrow figure
        middle = min((self.left + self.width - self.right) / 2, max(self.width - half, half))
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
    """Lines over FLOPs, growths marked."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    # What is left to learn late is small beside the first steps, which are left out.
    top = sorted(ys)[int((1 - LEFT_OUT) * (len(ys) - 1))]
    low = min(ys)
    span = (top - low) or 1.0
    frame = Frame(width, height, (0.0, max(xs)), (low - 0.04 * span, top + 0.04 * span))
    body = frame.axes(_ticks(0, max(xs), width // 110), _ticks(low, top, 5), title)
    for s in sorted(series, key=lambda s: s.kind == "scratch"):  # on top of the others
        inside = [(x, y) for x, y in s.points if y <= top + 0.04 * span]
        if not inside:
            continue
        body.append(f'{_group(s.name)}<title>{escape(s.name)}</title><path {stroke(s.kind)} d="{frame.path(inside)}"/>')
        for grew in s.grows:
            near = min(inside, key=lambda point: abs(point[0] - grew))
            body.append(mark(s.kind, frame.x(grew), frame.y(near[1]), 4))
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
        aside = _aside(s, points, width / 40)
        shown = [mark(s.kind, frame.x(x) + aside, frame.y(y), 4, f"{s.name}: {y:.4f}") for x, y in s.points]
        body.append(f"{_group(s.name)}{''.join(shown)}</g>")
    return svg(body, width, height, label, kind)


def _aside(one: Series, all_of_them: Sequence[Series], step: float) -> float:
    """How far to the side an arm stands, so that kinds of one cost do not hide each other: pixels."""
    near = [s.kind for s in all_of_them if s.points and abs(s.points[0][0] / one.points[0][0] - 1) < 0.05]
    there = [kind for kind in LOOKS if kind in near]
    return (there.index(one.kind) - (len(there) - 1) / 2) * step


def forest(
    rows: Sequence[Row],
    title: str,
    label: str,
    width: int,
    kind: str,
    *,
    line: float = 0.0,
    form: str = ".1%",
    room: float = 1.5,
) -> str:
    """Values with their intervals, one a row.

    Args:
        rows: from the top.
        title: of the axis.
        label: for those who do not see it.
        width: pixels.
        kind: of the figure, wide or narrow.
        line: the value at which a line stands: no effect.
        form: of a value in words.
        room: beyond the values, in their own spread: an interval may be far wider, and is cut at the frame.
    """
    values = [v for r in rows for v in (r.mean, *r.runs)] + [line]
    ends = values + [v for r in rows for v in (r.low, r.high) if v is not None]
    spread = (max(values) - min(values)) or 0.02 * max(map(abs, ends)) or 1.0
    low, high = max(min(ends), min(values) - room * spread), min(max(ends), max(values) + room * spread)
    pad = 0.06 * ((high - low) or 1.0)
    height = 22 * len(rows) + 56
    left = min(width // 2, 16 + 7 * max(len(r.name) for r in rows))
    frame = Frame(width, height, (low - pad, high + pad), (0.0, float(len(rows))), left=left)
    body = frame.axes(_ticks(low, high, width // 130, percent=form.endswith("%")), [], title)
    zero, foot = frame.x(line), height - frame.bottom
    body.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="{frame.top}" y2="{foot}"/>')
    for i, row in enumerate(rows):
        at = frame.y(len(rows) - i - 0.5)
        body.append(f'{_group(row.name)}<text x="{left - 8}" y="{at + 4}" text-anchor="end">{escape(row.name)}</text>')
        if row.low is not None and row.high is not None:
            a, b = (frame.x(min(max(v, low - pad), high + pad)) for v in (row.low, row.high))
            body.append(f'<line class="bar {row.kind}" x1="{a}" x2="{b}" y1="{at}" y2="{at}"/>')
        body += [mark(row.kind, frame.x(value), at, 2.2, f"{row.name}: {value:{form}}") for value in row.runs]
        body.append(mark(row.kind, frame.x(row.mean), at, 4.5, f"{row.name}: {row.mean:{form}}"))
        body.append("</g>")
    return svg(body, width, height, label, kind)


def _group(name: str) -> str:
    """What belongs to an arm, by which the page finds it."""
    return f'<g data-arm="{escape(name)}">'


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
