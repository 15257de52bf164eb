"""The work of a suite: runs that are still to be done, each by one of the processes that share a folder."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from growformer.bench.course import (
    Course,
    courses_of,
    first_of,
    recipe_of,
    target_of,
    trunk_points,
    trunk_recipe,
    written,
)
from growformer.bench.locks import lock
from growformer.bench.results import make_result, read_result, result_name, suite_hash, write_once
from growformer.bench.suite import read_suite
from growformer.checkpoint.folder import new_folder, target_errors
from growformer.errors import DivergedError, RequestError
from growformer.training import saving
from growformer.training.log import read_log
from growformer.training.place import Place

if TYPE_CHECKING:
    import torch
    import transformers

PAUSE = 1.0
"""Seconds before a process that finds all that is left in others' hands looks again."""


class Teller(Protocol):
    """What is told of the work."""

    def say(self, text: str) -> None: ...


class _Hushed:
    """A run's own lines are not shown."""

    def say(self, text: str) -> None:
        pass

    def tick(self, share: float, text: str) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """A run that is wanted."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return result_name(self.arm, self.rate, self.seed)


class Bench:
    """A suite and its folder.

    Args:
        path: the suite's file.
        out: the folder, shared by all processes that work on it.
        data: the folder of the text.
        teller: told what is done.
        by_seed: do all arms on one seed before the next one, instead of all seeds of one arm before the next arm.

    Raises:
        RequestError: the suite asks for what cannot be, or the folder is that of another suite.
        TargetError: the folder cannot be written.
    """

    def __init__(self, path: Path, out: Path, data: Path, teller: Teller, *, by_seed: bool = False) -> None:
        from growformer.api.training import growing

        self.suite, self.text = read_suite(path)
        self.out, self.data, self.teller, self.by_seed = out, data, teller, by_seed
        self.courses = courses_of(self.suite, data, growing())
        self._require_text()

    def claim(self) -> None:
        """Make the folder that of this suite: what is judged, and how, is fixed before the first run.

        Arms may be added later; those that are there stay as they are.
        """
        with target_errors(self.out):
            for folder in (self.out, self.out / "results", self.out / "work", self.out / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
        kept = self.out / "suite.yaml"
        with lock(self.out / "locks" / "suite.lock") as mine, target_errors(kept):
            if self._require_same(kept) and mine:
                partial = kept.with_name(".suite.yaml.new")
                partial.write_text(self.text, encoding="utf-8")
                partial.replace(kept)

    def _require_same(self, kept: Path) -> bool:
        """Whether the folder's suite is to be written: there is none, or this one has more arms."""
        if not kept.exists():
            return True
        there = read_suite(kept)[0]
        if suite_hash(there) != suite_hash(self.suite):
            raise RequestError(
                f"{kept}: says other things than the suite that is given; a suite is fixed before its first run: "
                "name a new folder by --out"
            )
        arms = {arm.name: arm for arm in self.suite.arms}
        for arm in there.arms:
            if arms.get(arm.name) != arm:
                raise RequestError(
                    f"{kept}: the suite that is given has {'another' if arm.name in arms else 'no'} arm {arm.name}; "
                    "arms may be added, and those that are there stay: name a new folder by --out"
                )
        return len(arms) > len(there.arms)

    def work(self) -> None:
        """Do what is left, side by side with other processes, until all results are there.

        Raises:
            GrowformerError: a run cannot be done.
        """
        with _threads(self.suite.threads), _no_bars():
            while jobs := self.wanted():
                if not any(self._try(job) for job in jobs):
                    time.sleep(PAUSE)

    def wanted(self) -> list[Job]:
        """The runs that are still to be done: all rates on one seed; then the best one on the others."""
        jobs = []
        for arm in self.suite.arms:
            runs = self.suite.runs_of(arm, self.chosen(arm.same_as or arm.name))
            jobs += [Job(arm.name, rate, seed) for rate, seed in runs if rate is not None]
        left = [job for job in jobs if not self._result(job).exists()]
        seeds = [self.suite.tune_seed, *self.suite.seeds]
        return sorted(left, key=lambda job: seeds.index(job.seed)) if self.by_seed else left

    def chosen(self, arm: str) -> float | None:
        """The rate with the least held-out loss on the tuning seed; None: trials are missing, or none ended."""
        from growformer.bench.summary import best_rate

        rates, seed = self.suite.rates_of(self.suite.arm(arm)), self.suite.tune_seed
        paths = [self._result(Job(arm, rate, seed)) for rate in rates]
        if not all(path.exists() for path in paths):
            return None
        return best_rate([read_result(path) for path in paths])

    def _try(self, job: Job) -> bool:
        """Do a run, unless somebody else is at it or at what it needs."""
        with lock(self.out / "locks" / f"{job.name}.lock") as mine:
            if not mine or self._result(job).exists():
                return False
            return self._perform(job)

    def _perform(self, job: Job) -> bool:
        course = self.courses[job.arm]
        place = Place(self.out / "work" / job.name)
        source = self._source(job, course) if 0 in course.grows else None
        recipe = recipe_of(self.suite, self.data, course, job.rate, job.seed, source)
        failure, measured = None, None
        try:
            if course.trunk and not place.out.exists():
                trunk = self._trunk(course, job.rate, job.seed)
                if trunk is None:
                    return False
                self._fork(trunk, place, written(recipe))
            self._train(recipe, place)
            measured = self._measured(place, recipe)
        except DivergedError as error:
            failure = str(error)
        result = make_result(
            self.suite, course, job.rate, job.seed,
            recipe=self._portable(recipe, course), data=self.data, measured=measured, failure=failure,
            log=read_log(place.log) if place.log.exists() else [],
        )  # fmt: skip
        write_once(self._result(job), result)
        shutil.rmtree(place.checkpoints, ignore_errors=True)
        said = failure if measured is None else f"{measured['test']:.4f} bits per byte, {result['seconds']:.0f} s"
        self.teller.say(f"{job.name}: {said}")
        return True

    def _trunk(self, course: Course, rate: float, seed: int) -> Place | None:
        """What arms of one start share, up to where this one leaves it; None: another process is at it.

        Raises:
            DivergedError: it does not get there at this rate.
        """
        before: Place | None = None
        hashed = hashlib.sha256(course.start.encode()).hexdigest()[:8]
        for to in (p for p in trunk_points(self.courses, course.start) if p <= course.trunk):
            place = Place(self.out / "work" / f"trunk-{hashed}--lr{rate:g}--seed{seed}--step{to}")
            failed = place.out.with_name(place.out.name + ".diverged")
            if not place.model.is_dir() and not failed.exists():
                with lock(self.out / "locks" / f"{place.out.name}.lock") as mine:
                    if not mine:
                        return None
                    recipe = trunk_recipe(self.suite, self.data, course.arm, rate, seed, to)
                    if before is not None and not place.out.exists():
                        self._fork(before, place, written(recipe))
                    try:
                        self._train(recipe, place)
                    except DivergedError as error:
                        failed.write_text(str(error), encoding="utf-8")
            if failed.exists():
                raise DivergedError(failed.read_text(encoding="utf-8"))
            before = place
        return before

    def _fork(self, trunk: Place, place: Place, recipe: str) -> None:
        """A folder of a run that goes on from a trunk's end."""
        last = saving.checkpoints(trunk.checkpoints)[-1]
        progress, _ = saving.read_state(last)
        with new_folder(place.out, 0, resume=True) as partial:
            made = Place(partial)
            shutil.rmtree(made.checkpoints, ignore_errors=True)  # of a process that was killed here
            shutil.copytree(last, made.checkpoints / last.name)
            made.log.write_bytes(trunk.log.read_bytes()[: progress.log_bytes])
            made.recipe.write_text(recipe, encoding="utf-8")

    def _source(self, job: Job, course: Course) -> Path:
        """The model of an arm that grows before its first step."""
        from growformer.api.models import expand
        from growformer.training.first import first_config, first_model
        from growformer.training.recipe import parse_recipe

        folder = self.out / "work" / f"{job.name}--source"
        if folder.is_dir():
            return folder
        event, arm = course.arm.grow[0], course.arm
        recipe = trunk_recipe(self.suite, self.data, arm, job.rate, job.seed, course.steps)
        file = parse_recipe(written(recipe), folder)
        model = first_model(file, first_config(file, None))
        request: dict[str, Any] = dict(target_of(self.suite, arm, event))
        request |= {"layers_at": event.layers_at} if event.layers_at is not None else {}
        seed = job.seed if event.seed is None else event.seed
        grown = expand(model, allow_change=event.allow_change, method=event.method, seed=seed, **request)
        with new_folder(folder, 0, resume=True) as partial:
            grown.save_pretrained(partial)
        return folder

    def _train(self, recipe: Mapping[str, Any], place: Place) -> None:
        from growformer.api.training import train

        path = place.out.with_name(place.out.name + ".yaml")
        with target_errors(path):
            path.write_text(written(recipe), encoding="utf-8")
        train(path, place.out, resume=True, watcher=_Hushed())

    def _measured(self, place: Place, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The end: bits per byte held out, and a hash of the weights."""
        import torch
        from transformers import AutoModelForCausalLM

        from growformer.training.first import load_text
        from growformer.training.recipe import parse_recipe

        model = AutoModelForCausalLM.from_pretrained(
            place.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        out: dict[str, Any] = {}
        for part in ("valid", "test"):
            data = {**recipe["data"], "valid": str(self.data / getattr(self.suite.data, part))}
            file = parse_recipe(written({**recipe, "data": data}), place.recipe)
            text = load_text(file, None, place.tokens)[1]
            out[part] = _bits(model, text.spread(max(1, self.suite.final_tokens // self.suite.sequence_length)))
        weights = (place.model / "model.safetensors").read_bytes()
        return out | {"weights": hashlib.sha256(weights).hexdigest()[:16]}

    def _portable(self, recipe: Mapping[str, Any], course: Course) -> dict[str, Any]:
        """A recipe with paths from the folder of the text."""
        out = {**recipe, "data": {"train": self.suite.data.train, "valid": self.suite.data.valid}}
        if 0 in course.grows:
            grown = target_of(self.suite, course.arm, course.arm.grow[0])
            out["model"] = {**first_of(self.suite, course.arm), "grown_before_the_first_step": grown}
        return out

    def _result(self, job: Job) -> Path:
        return self.out / "results" / f"{job.name}.json"

    def _require_text(self) -> None:
        """Refuse a budget for which an arm would use a byte twice."""
        longest = max(self.courses.values(), key=lambda course: course.steps)
        path = self.data / self.suite.data.train
        there = path.stat().st_size // self.suite.sequence_length * self.suite.sequence_length
        need = longest.steps * self.suite.batch_tokens
        if need > there:
            raise RequestError(
                f"arm {longest.arm.name}: takes {longest.steps:,} steps, {need:,} bytes, and {path} has {there:,}; no "
                "byte is used twice: a smaller budget fits, or more text does"
            )


def _bits(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> float:
    """Bits per byte of a byte-level model, sums in float64.

    Args:
        model: in eval mode.
        tokens: int64 [sequence, token].
    """
    import torch

    nats = 0.0
    with torch.no_grad():
        for rows in tokens.split(32):
            nats += float(model(input_ids=rows, labels=rows, use_cache=False).loss.double()) * len(rows)
    return nats / len(tokens) / math.log(2)


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """With so many threads: sums round as they do for everybody who shares the suite."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["Bench", "Job"]
