"""Suites: one YAML file that fixes what is compared, at what cost, and how it will be judged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from growformer.errors import RequestError
from growformer.training.recipe import Optimizer
from growformer.training.schedule import LIFT_STEPS

FOLDER = "GROWFORMER_DATA"
"""Environment variable with the folder of the text, where neither --data nor the suite's own folder is to count."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(Part):
    """Three files that share no text. Each byte of `train` is used at most once in a run."""

    folder: str = Field(default=".", description="Of the three, from where the command runs, or beside the suite.")
    train: str = Field(default="train.txt", description="Trained on.")
    valid: str = Field(default="valid.txt", description="Held out: curves, and the choice of learning rates.")
    test: str = Field(default="test.txt", description="Held out: the result of a run, looked at once, at its end.")


class Budget(Part):
    """What each arm may cost, its source model included."""

    tokens: PositiveFloat | None = Field(default=None, description="As many FLOPs as the final model takes for these.")
    flops: PositiveFloat | None = Field(default=None, description="FLOPs of training, forward and backward.")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError("takes exactly one of tokens and flops")
        return self


_IN_MID_RUN = (
    *("warmup", "fade", "probe_batches", "lift_steps", "freeze_old"),
    *("keep_dynamics", "learning_rate", "prove", "control"),
)


class Event(Part):
    """A growth; what is not named here is as in the recipes of `growformer train`."""

    at: float = Field(ge=0, lt=1, description="Share of the arm's own steps; 0: before the first.")
    to: dict[str, PositiveInt] | None = Field(
        default=None, description="Sizes; left out: the final model's, of all sizes that `start` names."
    )
    method: str = Field(default="paper", description="See `growformer methods`.")
    allow_change: bool = Field(default=False, description="The method may make another function of the model.")
    warmup: int = Field(default=0, ge=0, description="Steps over which the rate of new entries rises.")
    fade: PositiveInt | Literal["line-search"] | None = Field(
        default=None, description="msg and gated: steps over which new entries fade in, or line-search: at once."
    )
    probe_batches: PositiveInt = Field(default=1, description="Batches on which gradmax or a line search asks a loss.")
    lift_steps: PositiveInt = Field(default=LIFT_STEPS, description="For ligo: steps in which the lift is learned.")
    freeze_old: int = Field(default=0, ge=0, description="Steps for which old entries are held.")
    keep_dynamics: bool = Field(default=False, description="Scaled tensors keep the updates that they had.")
    learning_rate: PositiveFloat = Field(default=1.0, description="What the rate is multiplied by from then on.")
    layers_at: list[int] | None = Field(default=None, description="Places of new layers; left out: even.")
    seed: int | None = Field(default=None, description="Of new entries; left out: the run's.")
    prove: bool = Field(default=False, description="Prove the growth in true float64.")
    control: bool = Field(default=False, description="A growth by nothing, which must change no bit.")

    @model_validator(mode="after")
    def _in_mid_run(self) -> Event:
        needless = [n for n in _IN_MID_RUN if getattr(self, n) != type(self).model_fields[n].default]
        if self.at == 0 and needless:
            raise ValueError(f"{needless[0]} is of a growth in mid-run; at: 0 comes before the first step")
        return self


class Rank(Part):
    """A growth in rank."""

    at: float = Field(gt=0, lt=1, description="Share of the arm's own steps.")
    rank: PositiveInt = Field(description="The new rank.")


class Products(Part):
    """Weights between layers begin as products of small rank; as `factorised` in the recipes of `growformer train`."""

    rank: PositiveInt = Field(description="Of the first products.")
    grow: list[Rank] = Field(default_factory=list, description="The growths in rank, in order.")
    dense: float = Field(gt=0, lt=1, description="Share of the arm's own steps after which every weight is dense.")
    warmup: int = Field(default=0, ge=0, description="Steps over which the rate of new entries rises.")

    @model_validator(mode="after")
    def _rising(self) -> Products:
        for what, numbers in (("ranks", [self.rank, *(g.rank for g in self.grow)]), ("shares", self.shares)):
            if list(numbers) != sorted(set(numbers)):
                raise ValueError(f"its {what} must rise, and are {', '.join(f'{x:g}' for x in numbers)}")
        return self

    @property
    def shares(self) -> list[float]:
        """When it changes."""
        return [*(growth.at for growth in self.grow), self.dense]


class Arm(Part):
    """One thing that is compared."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*$", description="Of the arm.")
    about: str = Field(default="", description="A line for the report.")
    model: dict[str, Any] | None = Field(
        default=None, description="Another final model than the suite's: of another architecture, for the same budget."
    )
    start: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Sizes in which the first model differs from the final one."
    )
    factorised: Products | None = Field(default=None, description="Begin with weights that are products.")
    grow: list[Event] = Field(default_factory=list, description="Growths, in order; none: nothing grows.")
    budget: PositiveFloat = Field(default=1.0, description="Times the suite's budget: points of the scratch curve.")
    rates: list[PositiveFloat] | None = Field(default=None, description="Learning rates tried; left out: the suite's.")
    step_zero: str | None = Field(
        default=None, description="Arm with the same growth before the first step, whose saving is subtracted."
    )
    same_as: str | None = Field(
        default=None,
        description="Arm that this one must equal, bit for bit; it runs once, at that arm's learning rate.",
    )

    @model_validator(mode="after")
    def _grows(self) -> Arm:
        shares = [event.at for event in self.grow]
        if shares != sorted(set(shares)):
            raise ValueError(f"{self.name}: its growths stand at {shares}; each must come after the one before it")
        if self.grow and not self.start:
            raise ValueError(f"{self.name}: grows, and names no start: {{size: ...}} to grow from")
        if self.grow and self.factorised is not None:
            raise ValueError(f"{self.name}: a model of products grows in rank alone; an arm has grow or factorised")
        if any(event.to is None and not event.control for event in self.grow[:-1]):
            raise ValueError(f"{self.name}: only its last growth may leave out the sizes that it leads to")
        return self

    @property
    def shares(self) -> list[float]:
        """Of its steps, after which its model is another one."""
        return [event.at for event in self.grow] if self.factorised is None else self.factorised.shares

    @property
    def from_scratch(self) -> bool:
        """Whether it is the suite's final model from scratch."""
        return self.model is None and not self.start and not self.grow and self.factorised is None


class Analysis(Part):
    """How the results will be judged: fixed before the first run."""

    curve: list[str] = Field(
        min_length=2, description="Arms of the final size from scratch, at different budgets: the scratch curve."
    )
    floor: float = Field(
        default=0.0, ge=0, description="E of the curve L(C) = E + A C^-a, bits per byte; 0: a line in logarithms."
    )
    interval: Literal["t", "bootstrap"] = Field(
        default="t", description="Over seeds: Student's t of paired values, or percentiles of resampled seeds."
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Of every interval.")
    draws: PositiveInt = Field(default=10000, description="Resamples of the bootstrap.")
    margin: float = Field(default=0.0, ge=0, lt=1, description="A saving counts if its interval lies above this share.")


class Suite(Part):
    """What `growformer bench` runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    data: Text = Text()
    model: dict[str, Any] = Field(description="The final model: model_type and fields of config.json.")
    sequence_length: int = Field(ge=2, description="Tokens of a sequence.")
    batch_tokens: PositiveInt = Field(description="Tokens of a step.")
    budget: Budget
    warmup_steps: PositiveInt = Field(description="Steps over which each arm's learning rate rises from 0.")
    decay: float = Field(gt=0, lt=1, description="Share of each arm's own steps over which its rate falls to 0.")
    optimizer: Optimizer = Field(default=Optimizer(), description="But for its lr, which is tried.")
    clip_norm: PositiveFloat | None = 1.0
    rates: list[PositiveFloat] = Field(min_length=1, description="Learning rates that every arm tries.")
    tune_seed: int = Field(default=0, ge=0, description="The seed on which they are tried.")
    seeds: list[int] = Field(min_length=1, description="Of the first weights, the data's order and the new entries.")
    evaluate_every: PositiveInt = Field(default=100, description="Steps between two points of a curve.")
    evaluate_tokens: PositiveInt = Field(default=32768, description="Of `valid`, for curves.")
    final_tokens: PositiveInt = Field(default=262144, description="Of `valid` and `test`, at the end of each run.")
    checkpoint_every: PositiveInt = Field(default=500, description="Steps after which a killed run goes on.")
    threads: PositiveInt = Field(default=1, description="Of each process: with as many, sums round alike.")
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bf16"] = "float32"
    arms: list[Arm] = Field(min_length=1)
    analysis: Analysis

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        arms = {arm.name: arm for arm in self.arms}
        if len(arms) < len(self.arms):
            names = [arm.name for arm in self.arms]
            raise ValueError(f"arms: {next(n for n in names if names.count(n) > 1)} is there twice")
        for arm in self.arms:
            self._check(arm, arms)
        for name in self.analysis.curve:
            if name not in arms or not arms[name].from_scratch:
                raise ValueError(f"analysis.curve: {name} is no arm of the final size from scratch")
        if len({arms[name].budget for name in self.analysis.curve}) < 2:
            raise ValueError("analysis.curve: its arms have one budget; a curve needs different ones")
        return self

    def _check(self, arm: Arm, arms: dict[str, Arm]) -> None:
        unknown = [name for name in arm.start if name not in self.model_of(arm)]
        if unknown:
            raise ValueError(f"arms: {arm.name}.start: {unknown[0]} is no size that model names")
        tried = self.rates if arm.rates is None else arm.rates
        if len(tried) != len(self.rates) or len(set(tried)) < len(tried):
            raise ValueError(f"arms: {arm.name} tries {tried}; every arm tries {len(self.rates)} different rates")
        for key in ("step_zero", "same_as"):
            named = getattr(arm, key)
            if named is not None and named not in arms:
                raise ValueError(f"arms: {arm.name}.{key}: there is no arm {named}")
        if arm.same_as is not None and (arms[arm.same_as].same_as or arm.rates is not None):
            raise ValueError(f"arms: {arm.name} takes its learning rate from {arm.same_as}, which must try some itself")
        zero = arms.get(arm.step_zero or "")
        if zero is not None and not _same_growth(arm, zero):
            raise ValueError(
                f"arms: {arm.name}.step_zero: {zero.name} does not grow once, at: 0, from the same start and by the "
                "same method to the same sizes"
            )
        late = [at for at in arm.shares if at > 1 - self.decay]
        if late:
            raise ValueError(
                f"arms: {arm.name} grows at {late[0]:g}, and the learning rate falls from {1 - self.decay:g} on; "
                "a growth must come before that"
            )

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def model_of(self, arm: Arm) -> dict[str, Any]:
        """The final model of an arm."""
        return self.model if arm.model is None else arm.model

    def rates_of(self, arm: Arm) -> list[float]:
        """The learning rates that an arm tries."""
        return list(self.rates if arm.rates is None else arm.rates)

    def runs_of(self, arm: Arm, chosen: float | None) -> list[tuple[float | None, int]]:
        """The runs that an arm wants, as `runs_of` has them."""
        control = arm.same_as is not None
        return runs_of(self.rates_of(arm), self.seeds, self.tune_seed, chosen, control=control)


def runs_of(
    rates: Sequence[float], seeds: Sequence[int], tune_seed: int, chosen: float | None, *, control: bool
) -> list[tuple[float | None, int]]:
    """The runs that an arm wants: every rate on one seed, then the one chosen on the others.

    Args:
        rates: that it tries.
        seeds: that it is reported for.
        tune_seed: the one on which rates are tried.
        chosen: the rate; None: not known yet.
        control: whether it takes another arm's rate, and runs once.

    Returns:
        (rate, seed) of each; the rate is None where it is still to be chosen.
    """
    if control:
        return [(chosen, tune_seed)]
    return [*((rate, tune_seed) for rate in rates), *((chosen, seed) for seed in seeds if seed != tune_seed)]


def _same_growth(arm: Arm, zero: Arm) -> bool:
    """Whether an arm does before its first step what another does in mid-run."""
    if (zero.model, zero.start) != (arm.model, arm.start) or len(zero.grow) != 1 or zero.grow[0].at > 0 or not arm.grow:
        return False
    last = arm.grow[-1]
    alike = all(getattr(zero.grow[0], key) == getattr(last, key) for key in ("method", "to", "allow_change"))
    return alike and (len(arm.grow) > 1 or zero.grow[0].layers_at == last.layers_at)


def read_suite(path: Path) -> tuple[Suite, str]:
    """Read and check a suite.

    Returns:
        It, and the text of the file.

    Raises:
        RequestError: it cannot be read, or says what no suite can; the message names the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Suite.model_validate(data), text
    except ValidationError as error:
        raise RequestError("\n".join(_said(path, found) for found in error.errors(include_url=False))) from error


def text_folder(suite: Suite, path: Path, given: Path | None) -> Path:
    """The folder of the text: `--data`, else what the environment says, else the suite's own.

    Raises:
        RequestError: a file is not there.
    """
    said = str(given) if given is not None else os.environ.get(FOLDER)
    tried = [Path(said)] if said else [Path(suite.data.folder), path.parent / suite.data.folder]
    names = (suite.data.train, suite.data.valid, suite.data.test)
    for folder in tried:
        if all((folder / name).is_file() for name in names):
            return folder.resolve()
    raise RequestError(
        f"{tried[-1]}: does not hold {', '.join(names)}; say where they are by --data FOLDER or {FOLDER}"
    )


def _said(path: Path, found: Any) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).lstrip(".")
    message = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
    return f"{path}: {key + ': ' if key else ''}{message}"


__all__ = ["Analysis", "Arm", "Event", "Suite", "read_suite", "runs_of", "text_folder"]
