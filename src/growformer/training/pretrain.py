"""Pretraining as a recipe says: the processes join, one takes the folder, and the run goes to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growformer.errors import GrowformerError
from growformer.training.machines import Machines, started
from growformer.training.place import Place, claimed
from growformer.training.recipe import RecipeFile
from growformer.training.run import Run, Watcher
from growformer.training.stages import Growing


def pretrain(file: RecipeFile, out: Path, growing: Growing, watcher: Watcher, *, resume: bool = False) -> Place:
    """Train as a recipe says, growing along the way.

    Args:
        file: the recipe.
        out: the run's folder.
        growing: how to grow.
        watcher: told of the run (on the first process).
        resume: go on with the run in `out`, from its last checkpoint, if there is one.

    Returns:
        The folder, with `model` in it, a stock Hugging Face folder.

    Raises:
        RequestError: the recipe asks for what cannot be.
        TargetError: `out` is taken, or cannot be written.
        SourceError: data, model or a checkpoint cannot be read.
        ChangedError: a growth changed the function; the run stands at its last checkpoint.
    """
    with _no_bars(), started(file.recipe.device) as machines, _claimed(machines, out, file, resume) as place:
        if place.model.is_dir():
            if machines.first:
                watcher.say(f"{place.out}: this run has ended; its model is {place.model}")
            return place
        try:
            run = Run(file, place, growing, machines, watcher)
        except GrowformerError:
            if machines.first:
                place.abandon()
            raise
        try:
            run.go()
        finally:
            run.learner.close()
    return place


@contextmanager
def _claimed(machines: Machines, out: Path, file: RecipeFile, resume: bool) -> Iterator[Place]:
    """The first process holds the folder for all."""
    if machines.count == 1:
        with claimed(out, file, resume) as place:
            yield place
        return
    holding = claimed(out, file, resume)
    machines.on_first(lambda: holding.__enter__() and None)
    try:
        yield Place(out)
    finally:
        if machines.first:
            holding.__exit__(None, None, None)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars that transformers shows for every folder it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
