"""A run: steps, evaluations, growths and checkpoints, all of which a run that was killed repeats from its last one."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from growformer.checkpoint.folder import new_folder
from growformer.checkpoint.stock import OWN
from growformer.errors import ChangedError, DivergedError, RequestError
from growformer.planning import Plan
from growformer.proof.float64 import stock_model
from growformer.training import first, saving
from growformer.training.factorised import grow_rank, products, spared
from growformer.training.learner import Learner, bits
from growformer.training.learning_rate import part_of_peak
from growformer.training.log import Log, growth_line
from growformer.training.machines import Machines
from growformer.training.place import Place
from growformer.training.probing import Probes
from growformer.training.proving import Witness
from growformer.training.recipe import RecipeFile
from growformer.training.saving import Progress
from growformer.training.stages import Growing, Stage, plan_stages, request_of, steps_of
from growformer.training.triggers import Now, fires

PROVED_ON = 4
"""Held-out sequences that a growth is proved on."""


class Watcher(Protocol):
    """What is told of a run as it goes."""

    def say(self, text: str) -> None: ...

    def tick(self, share: float, text: str) -> None: ...


class Run:
    """A run, at its start or at its last checkpoint.

    Attributes:
        progress: where it stands.
        model: a stock model, unwrapped.
        optimizers: over its parameters.
        stages: all of its models.
    """

    def __init__(self, file: RecipeFile, place: Place, growing: Growing, machines: Machines, watcher: Watcher) -> None:
        self.file, self.recipe, self.place = file, file.recipe, place
        self.growing, self.machines, self.watcher = growing, machines, watcher
        self.tokenizer = first.load_tokenizer(file)
        config = first.first_config(file, self.tokenizer)
        machines.on_first(lambda: first.load_text(file, self.tokenizer, place.tokens) and None)
        self.text, held_out = first.load_text(file, self.tokenizer, place.tokens)
        self.stages = plan_stages(file, config, growing)
        self._share_work()
        self.tokens = held_out.spread(max(1, self.recipe.evaluate.tokens // self.recipe.sequence_length))
        self.bytes_per_token = held_out.tokens.bytes / held_out.tokens.count
        self.about = {"train": self.text.tokens.print, "valid": held_out.tokens.print, "processes": machines.count}
        self._require_text()
        self._start(config)
        self.began = time.monotonic()

    def _share_work(self) -> None:
        recipe, count = self.recipe, self.machines.count
        if recipe.sequences % count:
            raise RequestError(
                f"{self.file.where('batch_tokens')}: a step has {recipe.sequences} sequences, which {count} processes "
                f"cannot share evenly; {recipe.sequences // count * count or count} can be"
            )
        self.mine = recipe.sequences // count
        self.micro = recipe.micro_batch or self.mine
        if self.mine % self.micro:
            raise RequestError(
                f"{self.file.where('micro_batch')}: {self.micro} sequences a pass, and {self.mine} a step for each "
                "process; it must divide them"
            )

    def _require_text(self) -> None:
        steps = steps_of(self.recipe.budget, self.stages, self.recipe.batch_tokens)
        if steps is not None:
            ahead = max((stage.probes for stage in self.stages), default=0) - 1  # after the last step but one at most
            try:
                self.text.require((steps + max(ahead, 0)) * self.recipe.sequences)
            except RequestError as error:
                raise RequestError(f"{self.file.where('budget')}: {error}") from error

    def _start(self, config: dict[str, Any]) -> None:
        """From the last checkpoint, or from the beginning."""
        saved = saving.checkpoints(self.place.checkpoints)
        device = self.machines.device
        if saved:
            self.progress, about = saving.read_state(saved[-1])
            self.threads = about.pop("threads")
            self._require_same(saved[-1], about)
            model = saving.read_model(saved[-1]).to(device)
            optimizers = first.make_optimizers(self.file, model)
            self.generators = saving.read_training(saved[-1], model, optimizers)[self.machines.rank]
        else:
            self.progress = Progress()
            self.threads = torch.get_num_threads()
            model = first.begun(self.file, first.first_model(self.file, config)).to(device)
            optimizers = first.make_optimizers(self.file, model)
            self.generators = saving.first_generators(self.recipe.seed, self.machines.rank, device)
        self.model, self.optimizers = model, optimizers
        self.machines.require_same(model, "at the start")
        self.learner = Learner(self.recipe, self.machines, self.micro, model, optimizers)

    def _require_same(self, checkpoint: Path, about: dict[str, Any]) -> None:
        for name, found in self.about.items():
            if about.get(name) != found:
                what = {
                    "processes": f"is of {about.get(name)} processes, and now there are {found}",
                    "train": "is of another training text, or of another tokenizer",
                    "valid": "is of another held-out text, or of another tokenizer",
                }[name]
                raise RequestError(f"{checkpoint}: {what}; resume with what the run was begun with")

    def go(self) -> None:
        """Train to the end, and write the model."""
        first_time = self.progress.step == 0
        with self._log() as self.log, saving.random_states(self.generators, self.machines.device):
            self._introduce(first_time)
            if first_time:
                self._evaluate()
            while not self._done():
                self._step()
                if self.progress.step % self.recipe.evaluate.every == 0 or self._done():
                    self._evaluate()
                grown = False
                while self._time_to_grow(grown):
                    self._grow()
                    grown = True
                if grown and self._done():  # probes have used up the rest
                    self._evaluate()
                self._grow_rank()
                if self.progress.step % self.recipe.checkpoint.every == 0 or self._done():
                    self._save()
            self._finish()

    @contextmanager
    def _log(self) -> Iterator[Log | None]:
        if not self.machines.first:
            yield None
            return
        with Log(self.place.log, self.progress.log_bytes) as log:
            yield log

    def _write(self, kind: str, **values: Any) -> None:
        if self.log is not None:
            self.log.write(kind, step=self.progress.step, **values)

    def _say(self, text: str) -> None:
        if self.machines.first:
            self.watcher.say(text)

    def _introduce(self, first_time: bool) -> None:
        name = f"{type(self.model).__name__}, {self.model.num_parameters():,} parameters"
        if not first_time:
            self._say(f"Resuming at step {self.progress.step:,}: {name}")
            if self.threads != torch.get_num_threads():
                self._say(
                    f"    with {torch.get_num_threads()} threads, and {self.threads} before: sums may round otherwise "
                    f"(OMP_NUM_THREADS={self.threads} gives the same bits)"
                )
            return
        budget = self.recipe.budget
        self._say(f"{name}; {budget.kind}: {budget.amount:,.0f}; {len(self.stages) - 1} growths planned")
        versions = {n: importlib.metadata.version(n) for n in ("growformer", "torch", "transformers")}
        self._write(
            "start",
            model=type(self.model).__name__,
            stages=[{"parameters": s.size.parameters, "flops_per_token": s.size.flops_per_token} for s in self.stages],
            budget={"kind": budget.kind, "amount": budget.amount},
            text={"bytes": self.text.tokens.bytes, "tokens": self.text.tokens.count},
            held_out_tokens=self.tokens.numel(),
            processes=self.machines.count,
            device=self.machines.device.type,
            versions=versions,
        )

    def _used(self) -> float:
        """The share of the budget."""
        used = {"steps": self.progress.step, "tokens": self.progress.tokens, "flops": self.progress.flops}
        return used[self.recipe.budget.kind] / self.recipe.budget.amount

    def _done(self) -> bool:
        return self._used() >= 1

    def _step_share(self) -> float:
        """What the next step takes of the budget."""
        tokens = self.recipe.batch_tokens
        takes = {"steps": 1, "tokens": tokens, "flops": tokens * self.stages[self.progress.stage].size.flops_per_token}
        return takes[self.recipe.budget.kind] / self.recipe.budget.amount

    def _step(self) -> None:
        progress, recipe = self.progress, self.recipe
        if progress.position + recipe.sequences > self.text.count and not recipe.data.repeat:
            if progress.step:
                self._save()
            self.text.require(progress.position + recipe.sequences)
        if progress.thaw_at == progress.step:
            self.learner.thaw()
            progress.thaw_at = None
        used = self._used()
        part = part_of_peak(recipe.learning_rate, used, used + self._step_share()) * progress.multiplier
        self.loss = self.learner.step(self._rows(), part)
        progress.step += 1
        progress.tokens += recipe.batch_tokens
        progress.position += recipe.sequences
        progress.flops += recipe.batch_tokens * (self.stages[progress.stage].size.flops_per_token - spared(self.model))
        if not math.isfinite(self.loss):
            raise DivergedError(
                f"step {progress.step}: the loss is {self.loss}; lower optimizer.lr, or lengthen learning_rate.warmup"
            )
        if progress.step % recipe.log_every == 0:
            self._write(
                "step",
                tokens=progress.tokens,
                flops=progress.flops,
                loss=self.loss,
                lr=self.learner.rate,
                seconds=self._seconds(),
            )
        if self.machines.first:
            self.watcher.tick(self._used(), f"step {progress.step:,}, loss {self.loss:.3f}")

    def _rows(self) -> torch.Tensor:
        """This process's share of the next step's text."""
        return self.text.batch(self.progress.position + self.machines.rank * self.mine, self.mine)

    def _ahead(self, count: int) -> torch.Tensor:
        """The next batches of all processes, [batch, sequence, token], which stay the next."""
        recipe = self.recipe
        rows = self.text.batch(self.progress.position, count * recipe.sequences)
        return rows.reshape(count, recipe.sequences, recipe.sequence_length)

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 3)

    def _measure(self) -> float:
        """Held-out loss, bits per byte."""
        return bits(self.learner.measure(self.tokens), self.bytes_per_token)

    def _evaluate(self) -> None:
        found = self._measure()
        self._write("evaluation", bits_per_byte=found, tokens=self.progress.tokens, flops=self.progress.flops)
        self._say(f"Step {self.progress.step:,}: {found:.4f} bits per byte held out")

    def _time_to_grow(self, grown: bool) -> bool:
        """Whether the next growth comes after this step, which may have seen one already."""
        progress = self.progress
        if progress.stage + 1 >= len(self.stages) or self._done():
            return False
        now, after = self.stages[progress.stage], self.stages[progress.stage + 1]
        assert after.growth is not None
        if grown and after.growth.at.remembers:
            return False  # this step's loss was the stage's before
        seen = Now(progress.step, progress.tokens, progress.flops, self._used(), self.loss, now.size, after.size)
        found, progress.memory = fires(after.growth.at, seen, progress.memory)
        return self.machines.decided(lambda: found)

    def _grow(self) -> None:
        progress, stage = self.progress, self.stages[self.progress.stage + 1]
        growth = stage.growth
        assert growth is not None
        entry = growth.entry
        proving = (self.recipe.prove if entry.prove is None else entry.prove) and not stage.changes
        before = self._measure()
        probes = Probes(self.learner, stage, self._ahead)
        witness = Witness(self.place.out / ".proof", self.model) if proving and self.machines.first else None
        parameters = [self.model.num_parameters()]
        try:
            self.learner.grow(
                self.growing.grow,
                warmup=entry.warmup,
                freeze_old=entry.freeze_old > 0,
                keep_dynamics=entry.keep_dynamics,
                allow_change=growth.entry.allow_change,
                **probes.options,
                **request_of(growth, self.recipe.seed),
            )
        except RequestError as error:
            raise RequestError(f"{growth.where} at step {progress.step}: {error}") from error
        plan = self.model.growformer_plan
        said = self.machines.on_first(lambda: self._proof(witness, stage, plan))
        probes.search()
        progress.flops += probes.flops
        progress.stage += 1
        progress.memory = {}
        progress.multiplier *= entry.learning_rate
        if entry.freeze_old:
            progress.thaw_at = max(progress.thaw_at or 0, progress.step + entry.freeze_old)
        after = self._measure()
        parameters.append(self.model.num_parameters())
        self._write(
            "growth",
            to=dict(growth.to),
            at=growth.at.said(),
            parameters=parameters,
            tokens=progress.tokens,
            flops=progress.flops,
            bits_per_byte=[before, after],
            plan={"fidelity": plan.fidelity, "moved": list(plan.moved), "notes": list(plan.notes)},
            learning_rate=entry.learning_rate,
            proof=said,
            **probes.log(),
        )
        self._say(growth_line(progress.step, growth.to, parameters, (before, after), said, plan.changes) + str(probes))

    def _grow_rank(self) -> None:
        """What the recipe's `factorised` asks for after this step; the last makes every product dense."""
        asked, step = self.recipe.factorised, self.progress.step
        if asked is None or not products(self.model):
            return
        ranks: list[int | None] = [growth.rank for growth in asked.grow if growth.step == step]
        if self._done() or step == asked.dense:
            ranks = [None]
        for rank in ranks:
            before, parameters = self._measure(), [self.model.num_parameters()]
            grew, dense = self.learner.grow(grow_rank, rank=rank, seed=self.recipe.seed, warmup=asked.warmup)
            after = self._measure()
            parameters.append(self.model.num_parameters())
            found = {"rank": rank, "grew": len(grew), "dense": len(dense), "bits_per_byte": [before, after]}
            used = {"tokens": self.progress.tokens, "flops": self.progress.flops}
            self._write("rank", parameters=parameters, **found, **used)
            self._say(
                f"Step {step:,}: {len(grew)} products grown to rank {rank}, {len(dense)} dense "
                f"({parameters[0]:,} -> {parameters[1]:,} parameters)\n"
                f"    held out {before:.6f} -> {after:.6f} bits per byte"
            )

    def _proof(self, witness: Witness | None, stage: Stage, plan: Plan) -> dict[str, Any] | None:
        if witness is None:
            return None
        proof = witness.prove(self.growing.family, plan, self.model, self.tokens[:PROVED_ON])
        try:
            proof.raise_if_changed()
        except ChangedError as error:
            assert stage.growth is not None
            raise ChangedError(f"{stage.growth.where} at step {self.progress.step}: {error}") from None
        return proof.to_json()

    def _save(self) -> None:
        about = {**self.about, "threads": torch.get_num_threads()}
        self.generators = saving.generator_states(self.machines.device)
        everyone = self.machines.all(self.generators)
        if self.log is not None:
            self.progress.log_bytes = self.log.length()

        def save() -> None:
            saving.save(
                self.place.checkpoints, self.recipe.checkpoint.keep, self.progress,
                self.model, self.tokenizer, self.optimizers, everyone, about,
            )  # fmt: skip

        self.machines.on_first(save)

    def _finish(self) -> None:
        self.machines.require_same(self.model, "at the end")
        self.machines.on_first(self._write_model)
        for stage in self.stages[self.progress.stage + 1 :]:
            assert stage.growth is not None
            self._say(f"{stage.growth.where} did not come: the budget ended before {stage.growth.at.said()}")
        own = OWN.get(self.model.config.model_type)
        loads = f"from_pretrained loads it after `import {own}`" if own else "stock from_pretrained loads it"
        self._say(f"Model: {self.place.model} ({loads})")

    def _write_model(self) -> None:
        """The end: a folder that stock loading gives back, to the last bit."""
        with new_folder(self.place.model, 0, resume=True) as partial:
            saving.write_model(partial, self.model, self.tokenizer)
            loaded, report = stock_model(partial)
            wrong = [name for names in report.values() for name in names]
            found = dict(loaded.named_parameters())
            for name, parameter in self.model.named_parameters():
                if name not in found or not torch.equal(found[name], parameter.cpu()):
                    wrong.append(name)
            if wrong:
                raise ChangedError(f"{partial}: loads with other weights than were trained: {', '.join(wrong[:4])}")
