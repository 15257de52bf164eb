"""GrowthCallback: a model that the Hugging Face Trainer trains grows on its way, by a schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

import growformer  # the public functions: they find the layer above when they are called
from growformer.checkpoint.layout import disk_shapes
from growformer.checkpoint.skeleton import skeleton, stock_skeleton
from growformer.errors import RequestError
from growformer.optim.fade import require_fade
from growformer.optim.rates import inner_optimizer, rates_of
from growformer.optim.saved import KEY, Companion
from growformer.training.growable import require_live, stock
from growformer.training.schedule import Entry, Growth, entries_of, spell_out
from growformer.training.stages import request_of, sizes_of
from growformer.training.telling import log, logits, probe
from growformer.training.triggers import Now, Size, fires

logger = logging.get_logger(__name__)

COUNTED = ("tokens", "tokens_per_parameter")
"""Rules that need the Trainer to count tokens."""

REFUSED = {
    "flops": "the Trainer only estimates FLOPs; use tokens, or share",
    "slope": "needs the FLOPs of every step, which the Trainer only estimates; use plateau",
}
"""Rules that a Trainer has no numbers for."""

Shapes = dict[str, tuple[int, ...]]


class GrowthCallback(TrainerCallback):
    """Grows a Trainer's model, optimizer and block rates in place, after the steps that a schedule names.

    `Trainer(..., callbacks=[GrowthCallback({1000: {"intermediate_size": 4096, "warmup": 100}})])`: the model, the
    optimizer, the learning-rate schedule and every reference to them stay the same objects. A growth is made whole or
    not at all; if it cannot be made, training stops with the model as it was. `growth/*` is logged wherever the
    Trainer's other numbers go.

    What a growth leaves behind (rates of new blocks, what rules remember) is saved within the optimizer's state, so
    that every checkpoint has it that has moments, and comes back by `Trainer.train(resume_from_checkpoint=...)` with a
    callback of the same schedule. An empty schedule only brings it back.

    Args:
        schedule: see `entries_of`: {step: {size: value}}, or a list of entries as in a recipe of `growformer train`.
        seed: of the draws for new entries, where an entry names none.
        averages: copies of the model that follow it (an EMA's), which grow along.

    Raises:
        RequestError: the schedule says what cannot be.
    """

    def __init__(
        self,
        schedule: Mapping[int, Mapping[str, Any]] | Sequence[Entry | Mapping[str, Any]] = (),
        *,
        seed: int = 0,
        averages: Sequence[torch.nn.Module] = (),
    ) -> None:
        self.entries = entries_of(schedule)
        self.seed = seed
        self.averages = averages
        self.growths: list[Growth] = []
        self.companion = Companion()
        self._first: dict[str, int | None] = {}
        self._probe: torch.Tensor | None = None
        self._fitting: Callable[[], None] = lambda: None
        self._saving: Callable[[], None] = lambda: None
        for i, entry in enumerate(self.entries):
            kind = entry.at.each(entry.at.length or 1)[0].kind
            if kind in REFUSED:
                raise RequestError(f"grow[{i}].at.{kind}: {REFUSED[kind]}")
            if entry.prove:
                raise RequestError(
                    f"grow[{i}].prove: the Trainer's callback compares logits before and after (growth/difference); "
                    f"for a proof, grow a saved checkpoint with growformer expand"
                )
            if entry.searched or entry.probe_batches != 1:
                key = "fade: line-search" if entry.searched else "probe_batches"
                raise RequestError(
                    f"grow[{i}].{key}: the Trainer hands its batches to no callback, so there is nothing to ask a loss "
                    f"on; growformer train has such batches, and so has a loop of your own"
                )

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Listen for a grown checkpoint that is loaded into a model still small."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if not isinstance(model, torch.nn.Module):
            return

        def fit(module: torch.nn.Module, given: Mapping[str, Any], *rest: Any) -> None:
            self._fit(module, optimizer, {name: tuple(x.shape) for name, x in given.items()})

        self._fitting()
        self._fitting = model.register_load_state_dict_pre_hook(fit).remove

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up what a checkpoint has saved, and plan all growths that are to come, from shapes alone."""
        self._fitting()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not self.entries and not _saved(optimizer):
            return
        inner = stock(model)
        self._first = self._first or dict(sizes_of(_config(inner)))
        held = self.companion.thaw_at is not None  # by a training before this one, whose steps are not counted here
        self.companion = Companion(first=self._first, thaw_at=0 if held else None)
        self._take_up(optimizer, inner)
        self._first = self.companion.first
        self.growths = spell_out(self._entries(state), self.companion.first)
        ahead = self.growths[self._stage(inner) :]
        if ahead:
            self._require_possible(args, state, kwargs.get("lr_scheduler"), ahead)
            plan_ahead(inner, ahead, self.seed)
            self._probe = probe(inner)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Grow, if it is time: the optimizer has stepped, gradients are gone, nothing of this step is saved yet."""
        if self.companion.thaw_at is not None and state.global_step >= self.companion.thaw_at:
            rates_of(kwargs["optimizer"]).thaw()
            self.companion.thaw_at = None
        if not self.growths or state.global_step >= state.max_steps:
            return
        grown = False
        while (growth := self._due(stock(kwargs["model"]), state, grown)) is not None:
            told = self._grow(growth, state, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
            log(told, args, state, control)
            grown = True

    def _entries(self, state: TrainerState) -> list[Entry]:
        """The entries that lead on from the first sizes that are known.

        A checkpoint without an optimizer (save_only_model) does not say with what sizes the run began: then entries
        that the model has behind it are left out.
        """
        out, first = list(self.entries), self.companion.first
        while state.global_step and out and all(_reached(first.get(name), to) for name, to in out[0].to.items()):
            del out[0]
        return out

    def _stage(self, model: Any) -> int:
        """How many growths the model has behind it, by its sizes: sizes never fall from one to the next."""
        now = sizes_of(_config(model))
        done = [all((now.get(name) or 0) >= size for name, size in growth.to.items()) for growth in self.growths]
        return next((i for i, reached in enumerate(done) if not reached), len(done))

    def _take_up(self, optimizer: Any, model: Any) -> None:
        inner = inner_optimizer(optimizer)
        rates = rates_of(inner, model)
        found = _saved(optimizer)
        if found:
            inner.param_groups[0].pop(KEY)
            self.companion = Companion.of(found)
            rates.load_state_dict(found["rates"])

        def save(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            saved["param_groups"][0][KEY] = self.companion.saved(rates.state_dict())

        self._saving()
        self._saving = inner.register_state_dict_post_hook(save).remove

    def _require_possible(self, args: Any, state: TrainerState, scheduler: Any, ahead: Sequence[Growth]) -> None:
        apart = {
            "FSDP": bool(args.fsdp),
            "DeepSpeed": bool(args.deepspeed),
            "DistributedDataParallel": args.world_size > 1,
            "DataParallel": args.n_gpu > 1,
        }
        for what, found in apart.items():
            if found:
                raise RequestError(
                    f"{what} holds the old parameters, and the Trainer wraps a model only as it begins: stop at the "
                    f"step where it should grow, grow the checkpoint (growformer expand CHECKPOINT OUT "
                    f"{' '.join(f'{name}={size}' for name, size in ahead[0].to.items())}), and train with "
                    f"resume_from_checkpoint=OUT"
                )
        if args.load_best_model_at_end:
            raise RequestError(
                "load_best_model_at_end would load weights of a smaller model into the grown one, if the best "
                "checkpoint is from before a growth: say load_best_model_at_end=False, and load "
                "trainer.state.best_model_checkpoint with from_pretrained"
            )
        for growth in ahead:
            at = growth.at
            if at.kind in COUNTED and args.include_num_input_tokens_seen == "no":
                raise RequestError(
                    f"{growth.where}.at.{at.kind}: the Trainer counts no tokens; say "
                    f"TrainingArguments(include_num_input_tokens_seen=True)"
                )
            if at.plateau is not None and args.logging_strategy == "no":
                raise RequestError(f"{growth.where}.at.plateau: the Trainer logs no loss; say logging_steps=...")
            if growth.entry.learning_rate != 1 and not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise RequestError(
                    f"{growth.where}.learning_rate: {type(scheduler).__name__} has no base rates that can be "
                    f"multiplied; leave it out, or take one of the Trainer's other schedules (lr_scheduler_type)"
                )
            if at.step is not None and at.step >= state.max_steps:
                raise RequestError(
                    f"{growth.where}.at.step: {at.step} is not before the end of training ({state.max_steps} steps), "
                    f"so this growth would never come"
                )

    def _due(self, model: Any, state: TrainerState, grown: bool) -> Growth | None:
        """The next growth, if its time has come with this step, which may have seen one already."""
        stage, companion = self._stage(model), self.companion
        if stage == len(self.growths):
            return None
        growth = self.growths[stage]
        if grown and growth.at.remembers:
            return None  # this step's loss was the stage's before
        size = Size(model.num_parameters(), 0.0)
        for step, loss in self._losses(state) if growth.at.remembers else [(state.global_step, 0.0)]:
            seen = Now(step, state.num_input_tokens_seen, 0.0, step / state.max_steps, loss, size, size)
            found, companion.memory = fires(growth.at, seen, companion.memory)
            companion.shown = max(companion.shown, step)
            if found:
                return growth
        return None

    def _losses(self, state: TrainerState) -> list[tuple[int, float]]:
        """The loss of every step that no rule has been shown: a logged loss is the mean since the one logged before.

        This step's own is logged after it.
        """
        out: list[tuple[int, float]] = []
        before = 0
        for line in state.log_history:
            if "loss" in line:
                steps = range(max(before, self.companion.shown) + 1, line["step"] + 1)
                out += [(step, line["loss"]) for step in steps]
                before = line["step"]
        return out

    def _grow(
        self, growth: Growth, state: TrainerState, model: Any, optimizer: Any, scheduler: Any
    ) -> dict[str, float]:
        entry, inner = growth.entry, stock(model)
        before = None if self._probe is None else logits(inner, self._probe)
        began = time.monotonic()
        growformer.grow(
            model,
            optimizer,
            warmup=entry.warmup,
            freeze_old=entry.freeze_old > 0,
            keep_dynamics=entry.keep_dynamics,
            fade=entry.fade_steps,
            averages=self.averages,
            allow_change=growth.entry.allow_change,
            **request_of(growth, self.seed),
        )
        seconds = time.monotonic() - began
        if entry.learning_rate != 1:
            _multiply(inner_optimizer(optimizer), scheduler, entry.learning_rate)
        companion = self.companion
        companion.memory, companion.shown = {}, state.global_step
        if entry.freeze_old:
            companion.thaw_at = max(companion.thaw_at or 0, state.global_step + entry.freeze_old)
        told: dict[str, float] = {
            "growth/step": state.global_step,
            "growth/stage": self._stage(inner),
            "growth/parameters": inner.num_parameters(),
            "growth/seconds": round(seconds, 3),
        }
        if before is not None and self._probe is not None:
            change = logits(inner, self._probe)[..., : before.shape[-1]] - before
            told["growth/difference"] = float(change.abs().max() / before.abs().max())
        return told | {f"growth/{name}": size for name, size in growth.to.items()}

    def _fit(self, model: Any, optimizer: Any, given: Shapes) -> None:
        """Grow a model that is still small before weights of a grown one are loaded into it.

        The Trainer loads weights before it tells its callbacks that training begins, so this is told by the model.
        What is drawn for new entries is overwritten at once.
        """
        here = _shapes(model)
        if all(here.get(name) == shape for name, shape in given.items()):
            return
        here = disk_shapes(stock(model)) | here
        odd = [name for name, shape in given.items() if here.get(name) != shape]
        if not odd:
            return
        first = dict(sizes_of(_config(model)))
        try:
            growths = spell_out(self.entries, first)
            bares = plan_ahead(stock(model), growths, self.seed)
        except RequestError:  # a model that is larger than the schedule's first
            growths, bares = [], []
        for count, bare in enumerate(bares, 1):
            grown = _shapes(bare)
            if all(grown.get(name) == shape for name, shape in given.items()) and not _lacks(bare, given):
                self._first = first
                for growth in growths[:count]:
                    entry = growth.entry
                    fade = None if entry.fade is None else 0  # how far that has come is loaded with the rates
                    growformer.grow(
                        model, optimizer, allow_change=entry.allow_change, fade=fade, **request_of(growth, self.seed)
                    )
                logger.warning(f"The checkpoint holds a grown model: the model was grown {count} times to load it.")
                return
        wrong = [name for name in odd if name in here]
        if wrong:  # names that the model does not have are for torch to judge
            raise RequestError(
                f"the checkpoint holds {wrong[0]} as {list(given[wrong[0]])}, and the model has it as "
                f"{list(here[wrong[0]])}; no growth of the schedule leads there: build the model from the checkpoint's "
                f"folder (from_pretrained), and resume then"
            )


def plan_ahead(model: Any, growths: Sequence[Growth], seed: int) -> list[Any]:
    """The models that growths lead to, one on top of the other, without memory.

    Raises:
        RequestError: one of them has no exact answer, or live modules cannot follow it; the message says which.
    """
    out: list[Any] = []
    bare = stock_skeleton(model)
    for growth in growths:
        try:
            made = growformer.plan(bare, **request_of(growth, seed))
            require_live(made, model, change=growth.entry.allow_change)
            made.require_closure(False, "growformer.grow(..., closure=loss) in a loop of your own")
            require_fade(made, growth.entry.fade_steps)
        except RequestError as error:
            raise RequestError(f"{growth.where}: {error}") from error
        bare = skeleton(model, made.target_config)
        out.append(bare)
    return out


def _saved(optimizer: Any) -> dict[str, Any]:
    """What a loaded optimizer's state says of growths."""
    groups = inner_optimizer(optimizer).param_groups
    return dict(groups[0].get(KEY, {}))


def _reached(size: int | None, to: int | list[int]) -> bool:
    return (size or 0) >= (max(to) if isinstance(to, list) else to)


def _config(model: Any) -> dict[str, Any]:
    return dict(model.config.to_dict())


def _shapes(model: Any) -> Shapes:
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _lacks(model: Any, given: Shapes) -> bool:
    """Whether what is loaded is a part of a model's tensors (one file of several): growth would spoil the others."""
    return bool(set(_shapes(model)) - set(given) - set(model.all_tied_weights_keys))


def _multiply(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
