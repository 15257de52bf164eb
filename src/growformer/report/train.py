"""report.html of a training run, from its log and its recipe alone: one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growformer.checkpoint.folder import target_errors
from growformer.errors import SourceError
from growformer.report.drawing import Story, drawings, page
from growformer.training.log import read_log

POINTS = 150
"""Points of the training curve, each the mean of the steps around it."""


def write_report(log: Path, recipe: Path, report: Path) -> None:
    """Write the report.

    Args:
        log: the run's log.jsonl.
        recipe: its recipe.yaml, shown as it is.
        report: the HTML file to write.

    Raises:
        SourceError: the log cannot be read, or holds no training.
        TargetError: `report` cannot be written.
    """
    html = render(read_log(log), recipe.read_text(encoding="utf-8"))
    with target_errors(report):
        report.write_text(html, encoding="utf-8")


def render(lines: Sequence[Mapping[str, Any]], recipe: str) -> str:
    """The report as HTML.

    Raises:
        SourceError: there is no training in the log.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {"start": [], "step": [], "evaluation": [], "growth": []}
    for line in lines:
        kinds.setdefault(str(line.get("kind")), []).append(line)
    steps, looks, growths = kinds["step"], kinds["evaluation"], kinds["growth"]
    if not (kinds["start"] and steps and looks):
        raise SourceError("the log holds no training yet: no step, or no evaluation")
    start, last = kinds["start"][0], steps[-1]
    per_token = start["text"]["bytes"] / start["text"]["tokens"]
    held_out = [[line["step"], line["bits_per_byte"]] for line in looks]
    held_out += [[line["step"], line["bits_per_byte"][1]] for line in growths]
    sizes = [(0, start["stages"][0]["parameters"]), *((g["step"], g["parameters"][1]) for g in growths)]
    story = Story(
        steps=last["step"],
        train=_means([(line["step"], line["loss"] / math.log(2) / per_token) for line in steps]),
        held_out=sorted(held_out),
        sizes=sizes,
        titles=[f"{_sizes(growth['to'])}, step {growth['step']:,}" for growth in growths],
    )
    proved = [growth["proof"] for growth in growths if growth["proof"] is not None]
    return page(
        "train.html.j2",
        start=start,
        growths=growths,
        drawings=drawings(story),
        first=sizes[0][1],
        last=sizes[-1][1],
        untrained=looks[0]["bits_per_byte"],
        final=looks[-1]["bits_per_byte"],
        step=last["step"],
        tokens=last["tokens"],
        flops=last["flops"],
        worst=max((proof["measured"]["algebra"]["relative"] for proof in proved), default=None),
        proved=sum(proof["exit_code"] == 0 for proof in proved),
        recipe=recipe,
    )


def _means(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    size = max(1, math.ceil(len(points) / POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 5)] for part in parts]


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
