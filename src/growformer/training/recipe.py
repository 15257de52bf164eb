"""Recipes of `growformer train`: one YAML file, checked whole before anything runs."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from growformer.errors import RequestError
from growformer.training.learning_rate import LearningRate
from growformer.training.schedule import Entry


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Model(Part):
    """The first model: a checkpoint (`from`), or `model_type` and the fields of its config.json from scratch."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    source: str | None = Field(default=None, alias="from", description="A Hugging Face model folder to go on from.")
    model_type: str | None = Field(default=None, description="From scratch: llama, gpt2, qwen3, ...")

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.source is None) == (self.model_type is None):
            raise ValueError(
                "takes either from: FOLDER, or model_type and the fields of its config.json; "
                f"{'both are' if self.source else 'neither is'} given"
            )
        if self.source is not None and self.model_extra:
            raise ValueError(
                f"a model that comes from a folder has its config; leave out {', '.join(self.model_extra)}"
            )
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of config.json that are given."""
        return dict(self.model_extra or {})


class Data(Part):
    """Text files, each byte used once at most."""

    train: Paths = Field(description="A text file, or a list of them, to train on.")
    valid: Paths = Field(description="Held-out text for the evaluation.")
    tokenizer: str | None = Field(
        default=None, description="A folder with a tokenizer; left out: that of model.from, or a token is a byte."
    )
    repeat: bool = Field(default=False, description="Start over, in a new order, where the text ends.")


class Budget(Part):
    """How long to train: exactly one of the three."""

    steps: PositiveInt | None = None
    tokens: PositiveFloat | None = Field(default=None, description="At least so many; the last step is a whole one.")
    flops: PositiveFloat | None = Field(default=None, description="At least so many; the last step is a whole one.")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name, value in dict(self).items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"takes exactly one of steps, tokens and flops; given: {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """steps, tokens or flops."""
        return next(name for name, value in dict(self).items() if value is not None)

    @property
    def amount(self) -> float:
        """Of what `kind` names."""
        return float(getattr(self, self.kind))


class Optimizer(Part):
    """A class of torch.optim and its arguments. Gains and biases (tensors with one dim) are not decayed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(default="AdamW", description="AdamW, Muon, SGD, ...")
    lr: PositiveFloat = Field(default=3e-3, description="The learning rate's peak.")
    others: Optimizer | None = Field(
        default=None,
        description="For Muon: the optimizer of what is no matrix between layers (embeddings, head, gains).",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """What the class is called with, `lr` included."""
        return {"lr": self.lr, **(self.model_extra or {})}


class Evaluate(Part):
    """Held-out loss in bits per byte."""

    every: PositiveInt = Field(default=100, description="Steps.")
    tokens: PositiveInt = Field(default=16384, description="Held-out tokens, spread evenly over the text.")


class Checkpoint(Part):
    """What a run resumes from."""

    every: PositiveInt = Field(default=500, description="Steps.")
    keep: PositiveInt = Field(default=2, description="How many of the last ones stay.")


class Rank(Part):
    """A growth in rank."""

    step: PositiveInt = Field(description="After which it comes.")
    rank: PositiveInt = Field(description="The new rank.")


class Factorised(Part):
    """Weights between layers begin as products of small rank, which grow and end dense (InRank, arXiv 2306.11250)."""

    rank: PositiveInt = Field(description="Of the first products.")
    grow: list[Rank] = Field(default_factory=list, description="The growths in rank, in order.")
    dense: PositiveInt | None = Field(
        default=None, description="The step after which every weight is dense; left out: the last."
    )
    warmup: int = Field(default=0, ge=0, description="Steps over which the learning rate of new entries rises from 0.")

    @model_validator(mode="after")
    def _rising(self) -> Factorised:
        ranks = [self.rank, *(growth.rank for growth in self.grow)]
        steps = [0, *(growth.step for growth in self.grow), *([] if self.dense is None else [self.dense])]
        for what, numbers in (("ranks", ranks), ("steps", steps)):
            if any(a >= b for a, b in itertools.pairwise(numbers)):
                raise ValueError(f"its {what} must rise, and are {', '.join(map(str, numbers))}")
        return self


class Recipe(Part):
    """What `growformer train` does."""

    output: str | None = Field(default=None, description="Folder of the run, unless --out names it.")
    model: Model
    data: Data
    sequence_length: int = Field(ge=2, description="Tokens of a sequence.")
    batch_tokens: PositiveInt = Field(description="Tokens of a step, on all machines together.")
    micro_batch: PositiveInt | None = Field(default=None, description="Sequences of one pass; left out: all at once.")
    seed: int = Field(default=0, ge=0, description="Of the first weights, the data's order and the new entries.")
    budget: Budget
    optimizer: Optimizer = Optimizer()
    learning_rate: LearningRate = LearningRate()
    precision: Literal["float32", "bf16"] = Field(
        default="float32", description="bf16: autocast; weights stay float32."
    )
    compile: bool = Field(default=False, description="Compile the model (torch.compile), anew after each growth.")
    clip_norm: PositiveFloat | None = Field(default=1.0, description="Largest norm of the gradient; null: none.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grow: list[Entry] = Field(default_factory=list, description="The growths, in order.")
    factorised: Factorised | None = Field(default=None, description="Begin with weights that are products.")
    prove: bool = Field(default=True, description="Prove each growth in true float64 before training goes on.")
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log_every: PositiveInt = Field(default=1, description="Steps between two lines of the log.")
    report: bool = Field(default=True, description="Write report.html at the end.")

    @field_validator("batch_tokens")
    @classmethod
    def _batch(cls, tokens: int, info: ValidationInfo) -> int:
        length = info.data.get("sequence_length")
        if length is not None and tokens % length:
            whole = max(1, round(tokens / length)) * length
            raise ValueError(f"{tokens} is no multiple of sequence_length {length}; {whole} is")
        return tokens

    @field_validator("factorised")
    @classmethod
    def _alone(cls, factorised: Factorised | None, info: ValidationInfo) -> Factorised | None:
        budget = info.data.get("budget")
        if factorised is not None and info.data.get("grow"):
            raise ValueError("a model of products grows in rank alone; grow its sizes in a second run, from its model")
        if factorised is not None and budget is not None and budget.kind == "flops":
            raise ValueError("products change what a step costs; give the budget in steps or tokens")
        return factorised

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.batch_tokens // self.sequence_length


FREE = ("output", "checkpoint", "log_every", "report", "data.repeat", "micro_batch", "device")
"""What may change when a run resumes: nothing that decides which weights come next, on the same machine."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and the file it came from.

    Attributes:
        recipe: what it says.
        path: the file; relative paths in it start at its folder.
        text: of the file.
        lines: of each key, by its path: ("grow", 1, "at").
    """

    recipe: Recipe
    path: Path
    text: str
    lines: Mapping[tuple[str | int, ...], int]

    def where(self, *key: str | int) -> str:
        """A key's place for a message: "recipe.yaml, line 4: model.hidden_size"."""
        known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in self.lines), ())
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.path}{line}: {dotted(key)}".removesuffix(": ")

    def file(self, name: str) -> Path:
        """A path that the recipe names."""
        return self.path.parent / Path(name).expanduser()


def read_recipe(path: Path) -> RecipeFile:
    """Read and check a recipe.

    Raises:
        RequestError: it cannot be read, is no YAML, or says what no recipe can; the message names the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path) -> RecipeFile:
    """The same from its text; see `read_recipe`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RequestError(f"{path}{line}: is no YAML: {getattr(error, 'problem', None) or error}") from error
    lines: dict[tuple[str | int, ...], int] = {}
    if node is not None:
        _lines(node, (), lines, path)
    if not isinstance(data, dict):
        raise RequestError(f"{path}: holds {_kind(data)}, expected keys such as model, data and budget")
    file = RecipeFile(Recipe.model_construct(), path, text, lines)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RequestError("\n".join(_messages(error, file))) from error
    return RecipeFile(recipe, path, text, lines)


def differences(before: Recipe, now: Recipe) -> list[str]:
    """What two recipes say differently, but for what is `FREE`: "budget.steps: 100 was, 200 is"."""
    one, two = (dict(_leaves(r.model_dump(by_alias=True), ())) for r in (before, now))
    free = tuple(tuple(name.split(".")) for name in FREE)
    keys = [key for key in [*one, *(k for k in two if k not in one)] if not any(key[: len(f)] == f for f in free)]
    return [
        f"{dotted(key)}: {one.get(key, 'nothing')!r} was, {two.get(key, 'nothing')!r} is"
        for key in keys
        if one.get(key) != two.get(key)
    ]


def dotted(key: tuple[str | int, ...]) -> str:
    """("grow", 1, "at") as grow[1].at."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e6 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _lines(node: yaml.Node, key: tuple[str | int, ...], out: dict[tuple[str | int, ...], int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            here = (*key, name.value)
            if here in out:
                raise RequestError(f"{path}, line {name.start_mark.line + 1}: {dotted(here)} is there twice")
            out[here] = name.start_mark.line + 1
            _lines(value, here, out, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out[(*key, i)] = value.start_mark.line + 1
            _lines(value, (*key, i), out, path)


def _messages(error: ValidationError, file: RecipeFile) -> list[str]:
    """Each mistake once: a value that may be a number or a list would otherwise be refused as both."""
    out: dict[str, str] = {}
    for found in error.errors(include_url=False):
        key = _key(found, file.lines)
        where = file.where(*key)
        out.setdefault(where, f"{where}: {_said(found, key)}")
    return list(out.values())


def _key(found: Any, lines: Mapping[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    """Where in the file: pydantic adds the alternatives of a union to the path, such as "float" or "list[int]"."""
    loc = tuple(found["loc"])
    if found["type"] == "missing":
        return loc
    return next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines), loc)


def _said(found: Any, key: tuple[str | int, ...]) -> str:
    kind, given = found["type"], found["input"]
    if kind == "extra_forbidden":
        known = _known(key[:-1])
        close = difflib.get_close_matches(str(key[-1]), known, 1)
        return "is no key here; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(found["ctx"]["error"])
    if kind == "literal_error":
        return f"{given!r} is none of {found['ctx']['expected']}"
    said = found["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    return f"{given!r} is given; it must be {said}"


def _known(key: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand at a place."""
    model: Any = Recipe
    for part in key:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            model = next(
                (t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None
            )
            if model is None:
                return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", None)
    return [t for a in inner for t in _types(a)] if inner else [annotation]


def _leaves(data: Any, key: tuple[str | int, ...]) -> list[tuple[tuple[str | int, ...], Any]]:
    if isinstance(data, Mapping) and data:
        return [leaf for name, value in data.items() for leaf in _leaves(value, (*key, name))]
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return [leaf for i, value in enumerate(data) for leaf in _leaves(value, (*key, i))]
    return [(key, data)]


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


__all__ = ["Recipe", "RecipeFile", "differences", "parse_recipe", "read_recipe"]
