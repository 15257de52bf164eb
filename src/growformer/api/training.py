"""train: a recipe from the first step to the last."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.api.live import grow
from growformer.api.planned import family_of, plan
from growformer.errors import RequestError
from growformer.training.recipe import read_recipe

if TYPE_CHECKING:
    from growformer.training.place import Place
    from growformer.training.run import Watcher


class _Growing:
    """What the loop is given of this layer."""

    plan = staticmethod(plan)
    grow = staticmethod(grow)
    family = staticmethod(family_of)


def growing() -> Any:
    """The same for others who plan runs."""
    return _Growing()


class Quiet:
    """A watcher that says nothing."""

    def say(self, text: str) -> None:
        pass

    def tick(self, share: float, text: str) -> None:
        pass


def train(
    recipe: str | Path, out: str | Path | None = None, *, resume: bool = False, watcher: Watcher | None = None
) -> Place:
    """Train a causal language model as a recipe says, growing it along the way (see docs/train.md).

    Args:
        recipe: a YAML file.
        out: the run's folder; None: the recipe's `output`.
        resume: go on with the run that is there, from its last checkpoint; without one, start.
        watcher: told of the run; None: nobody.

    Returns:
        The run's folder: `model`, `log.jsonl`, `checkpoints`.

    Raises:
        RequestError: the recipe says what cannot be; the message names its line.
        TargetError: the folder is taken.
        SourceError: data, model or checkpoint cannot be read.
        ChangedError: a growth changed the function.
    """
    from growformer.training.pretrain import pretrain

    file = read_recipe(Path(recipe))
    if out is None and file.recipe.output is None:
        raise RequestError(f"{recipe}: names no output, the folder of the run; add it, or say --out FOLDER")
    folder = Path(out) if out is not None else file.file(file.recipe.output or "")
    growing: Any = _Growing()
    return pretrain(file, folder, growing, watcher or Quiet(), resume=resume)
