"""`growformer train`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from growformer.cli import show
from growformer.errors import RequestError


def train(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", help="What to train, and how.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run: a new or an empty one. Left out: as in the recipe.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one; otherwise start.")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a recipe with comments.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipes' JSON schema, for editors.")] = False,
) -> None:
    """Train a language model that grows along the way, as a recipe says; a run that was cut short resumes.

    Under torchrun, all processes train together: torchrun --nproc-per-node 8 -m growformer train RECIPE.yaml
    """
    if example:
        show.say(resources.files("growformer.training").joinpath("example.yaml").read_text(encoding="utf-8").rstrip())
        return
    if schema:
        from growformer.training.recipe import Recipe

        show.say(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    if recipe is None:
        raise RequestError("train takes a recipe: growformer train RECIPE.yaml; --example prints one")
    # Read when torch is first imported: threads that wait for each other spinning cost small models dearly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from growformer import api
    from growformer.report.train import write_report
    from growformer.training.recipe import read_recipe

    with _watcher() as watcher:
        place = api.train(recipe, out, resume=resume, watcher=watcher)
    if read_recipe(recipe).recipe.report and int(os.environ.get("RANK", 0)) == 0:
        write_report(place.log, place.recipe, place.report)
        show.say(f"Report: {place.report}")


class _Lines:
    """Says lines; shows nothing else."""

    def say(self, text: str) -> None:
        show.say(text)

    def tick(self, share: float, text: str) -> None:
        pass


class _Bar:
    """Says lines above a bar on the terminal."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.task = bar, bar.add_task("", total=1.0)

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def tick(self, share: float, text: str) -> None:
        self.bar.update(self.task, completed=min(1.0, share), description=text)


@contextmanager
def _watcher() -> Iterator[_Lines | _Bar]:
    """A progress bar where standard output is a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        yield _Bar(bar)


__all__ = ["train"]
