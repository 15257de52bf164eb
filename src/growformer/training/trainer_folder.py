"""A checkpoint that the Hugging Face Trainer has saved, grown as a whole: what lies beside its model comes along."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from growformer.checkpoint.folder import inside, read_json
from growformer.checkpoint.layout import layout_of
from growformer.checkpoint.stock import bare_stock
from growformer.errors import RequestError, SourceError
from growformer.optim.carry import Carry
from growformer.optim.dual import approximate
from growformer.optim.rules import StateRule
from growformer.optim.saved import grown_optimizer, require_matching, rule_of_saved
from growformer.optim.tables import Pace
from growformer.planning import Plan
from growformer.training.stages import sizes_of

OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"
COPIED = (STATE, "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state*.pth")
"""What a growth does not change; the pickles among them are not read."""

SHARDED = {
    "global_step*": "DeepSpeed",
    "zero_*.py": "DeepSpeed",
    "pytorch_model_fsdp*": "FSDP",
    "optimizer_*": "FSDP",
    "optimizer.bin": "FSDP",
    "rank*-of-*-optimizer.pt": "XLA's FSDP",
    "optimizer.pt_*": "SageMaker",
}
"""What shows that an optimizer's state is in the form of something else, by file name."""

MODEL_ONLY = "--model-only (model_only=True) grows the model, and leaves the training state behind"


@dataclass(frozen=True)
class TrainingState:
    """The training state of a folder, and the growth that it is to follow.

    Attributes:
        folder: the source.
        files: of the state.
        optimizer: its `state_dict`, on disk until it is read; None: there is none.
        rule: of the optimizer.
        kind: its class.
        carry: the growth.
        olds, news: names of the parameters before and after, by group.
        first: sizes of the source.
        step: of the run.
    """

    folder: Path
    files: tuple[Path, ...]
    optimizer: Mapping[str, Any] | None = None
    rule: StateRule | None = None
    kind: str = ""
    carry: Carry | None = None
    olds: tuple[tuple[str, ...], ...] = ()
    news: tuple[tuple[str, ...], ...] = ()
    first: Mapping[str, int | None] | None = None
    step: int = 0

    @property
    def bytes_grown(self) -> int:
        """About what the state takes once it has grown: moments grow as the weights do."""
        growth = 1.0 if self.carry is None else self.carry.plan.parameters[1] / self.carry.plan.parameters[0]
        return int(sum(path.stat().st_size for path in self.files) * growth)

    @property
    def said(self) -> str:
        """What comes along, for people."""
        beside = ", ".join(path.name for path in self.files if path.name != OPTIMIZER)
        if self.carry is None:
            return f"{beside} came along; there was no optimizer"
        count = len(approximate(self.carry.plan))
        near = f" ({count} of them approximately, for the memory of the moments)" if count else ""
        return f"the moments of {self.kind} grew along{near}; {beside} came along"

    def write(self, out: Path, pace: Pace) -> None:
        """Write the training state of the grown model."""
        import torch

        for path in self.files:
            if path.name != OPTIMIZER:
                shutil.copyfile(path, out / path.name)
        if self.optimizer is not None:
            assert self.rule is not None and self.carry is not None and self.first is not None
            with _told(self.folder):
                made = grown_optimizer(
                    self.optimizer, self.rule, self.carry, self.olds, self.news, self.first, self.step, pace
                )
            torch.save(made, out / OPTIMIZER)


def training_state(folder: Path, plan: Plan) -> TrainingState | None:
    """The training state in a folder that the Trainer has saved, seen to be one that can follow a growth.

    Args:
        folder: the source.
        plan: the growth.

    Returns:
        None where there is no training state.

    Raises:
        RequestError: the state is sharded, of an optimizer that is not declared, or of other parameters than the
            Trainer trains; the message says how the model alone can grow.
        SourceError: a file cannot be read, or only by running code that it brings.
    """
    for pattern, what in SHARDED.items():
        found = sorted(folder.glob(pattern))
        if found:
            raise RequestError(f"{found[0]}: is {what}'s form of a training state, which does not grow; {MODEL_ONLY}")
    files = [inside(folder, path.name) for pattern in (*COPIED, OPTIMIZER) for path in sorted(folder.glob(pattern))]
    if not files:
        return None
    if not (folder / OPTIMIZER).is_file():
        return TrainingState(folder, tuple(files))
    saved = read_optimizer(folder / OPTIMIZER)
    with _told(folder):
        if plan.source_family:
            raise RequestError(f"a {plan.source_family} becomes a {plan.family}, and moments do not follow")
        kind, rule = rule_of_saved(saved)
        old, new = bare_stock(plan.source_config), bare_stock(plan.target_config, "the grown config.json")
        carry = Carry(plan, layout_of(old), layout_of(new))
        olds, news = trainer_groups(old), trainer_groups(new)
        require_matching(saved, olds, carry, rule)
    step = read_json(folder / STATE).get("global_step") if (folder / STATE).is_file() else 0
    if not isinstance(step, int):
        raise SourceError(f"{folder / STATE}: global_step is {step!r}, no number of steps")
    first = sizes_of(plan.source_config)
    return TrainingState(folder, tuple(files), saved, rule, kind, carry, olds, news, first, step)


def read_optimizer(path: Path) -> Mapping[str, Any]:
    """An optimizer's `state_dict`; its tensors are read from the file when they are needed.

    Raises:
        SourceError: it is none, or holds more than plain data and tensors: such a file runs code when it is read.
    """
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, from damaged files and from those that bring code
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"{path}: is not read: only plain data and tensors are, for anything else runs code that the file brings "
            f"({said[0]}); {MODEL_ONLY}"
        ) from error
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not groups or not isinstance(saved.get("state"), dict):
        raise SourceError(f"{path}: is no optimizer's state_dict (no state and param_groups); {MODEL_ONLY}")
    return cast(Mapping[str, Any], saved)


def trainer_groups(model: Any) -> tuple[tuple[str, ...], ...]:
    """The names of a model's parameters as the Trainer gives them to its optimizer: decayed, and not decayed."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # asks nothing of the Trainer itself
    names = [name for name, _ in model.named_parameters()]
    return tuple(x for x in names if x in decayed), tuple(x for x in names if x not in decayed)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Puts the file before messages about it, and the way out behind them."""
    try:
        yield
    except (RequestError, SourceError) as error:
        raise type(error)(f"{folder / OPTIMIZER}: {error}; {MODEL_ONLY}") from error
