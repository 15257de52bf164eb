"""The folder of a run: claimed by one process at a time, and only by the recipe that it belongs to."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from growformer.checkpoint.folder import target_errors
from growformer.errors import RequestError, TargetError
from growformer.training.recipe import RecipeFile, differences, parse_recipe

_HIDDEN = ".recipe.yaml.new"


@dataclass(frozen=True)
class Place:
    """The folder of a run.

    Attributes:
        out: it.
        fresh: what was there before this process took it: nothing (None), an empty folder (True), a run (False).
    """

    out: Path
    fresh: bool | None = False

    @property
    def recipe(self) -> Path:
        """The recipe, as it was given."""
        return self.out / "recipe.yaml"

    @property
    def log(self) -> Path:
        """The log, one JSON object a line."""
        return self.out / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.out / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model; it is there once the run has ended."""
        return self.out / "model"

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.html"

    @property
    def tokens(self) -> Path:
        """Tokenised text."""
        return self.out / "tokens"

    def abandon(self) -> None:
        """Leave all as it was before, where nothing has been trained: a mistake in a recipe should cost no folder."""
        if self.fresh is not False:
            for made in self.out.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        if self.fresh is None:
            self.out.rmdir()


@contextmanager
def claimed(out: Path, file: RecipeFile, resume: bool) -> Iterator[Place]:
    """Take a folder for a run: a new or an empty one, or, with `resume`, that of the same recipe.

    Raises:
        TargetError: it is taken by something else, or by a run that should not be resumed, or is in use.
        RequestError: the recipe has changed in what decides the weights.
    """
    with target_errors(out):
        # A run that was killed at once may have left no more than its recipe's hidden name.
        held = [] if not out.is_dir() else [path for path in out.iterdir() if path.name != _HIDDEN]
        there = bool(held) or (os.path.lexists(out) and not out.is_dir())
    place = Place(out, False if there else True if out.is_dir() else None)
    if there and not place.recipe.is_file():
        raise TargetError(
            f"{out}: exists already, is no folder of a run, and is left as it is; name a new folder, by --out or by "
            "output in the recipe"
        )
    if there and not resume:
        done = "a run that has ended" if place.model.is_dir() else "a run that was begun"
        raise TargetError(f"{out}: holds {done}; --resume goes on with it, and --out names a new folder")
    if there:
        _require_same(place, file)
    with target_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TargetError(f"{out}: another process is training there at this moment") from None
        with target_errors(out):
            _write(place.recipe, file.text)
            place.checkpoints.mkdir(exist_ok=True)
            for left in (*out.glob(".*.partial"), *place.checkpoints.glob(".*"), *out.glob(".proof*")):
                shutil.rmtree(left)
        yield place
    finally:
        os.close(lock)


def _require_same(place: Place, file: RecipeFile) -> None:
    before = parse_recipe(place.recipe.read_text(encoding="utf-8"), place.recipe).recipe
    changed = differences(before, file.recipe)
    if changed:
        raise RequestError(
            f"{file.path}: says other things than {place.recipe}, by which the run was begun: {'; '.join(changed)}; "
            "resume with the old recipe, or start anew in another folder"
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(_HIDDEN)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
