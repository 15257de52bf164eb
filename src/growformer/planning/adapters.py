"""Adapters of PEFT (LoRA): how their tensors stand to the rank, and the plan under which the rank grows.

A pair A [rank, input], B [output, rank] adds s B A to a weight, s = alpha / rank, or alpha / sqrt(rank) where it is
rank-stabilised (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). The rank is an axis that A writes and B
reads. It grows closed at its readers: new rows of A are drawn, new columns of B are zero, so that B A stays as it is
and the new columns have a gradient from the first step on. alpha grows along, so that s stays: weights and moments then
keep their bits, and old entries learn as before, which a factor on B would change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from growformer.algebra import Atom, Factor, Fill, Lift, Run, TensorPattern
from growformer.errors import RequestError, SourceError
from growformer.planning.plan import Plan, TensorPlan

PREFIX = "base_model.model."
"""What PEFT puts before the base model's names in an adapter's file."""

TENSORS: Mapping[str, str] = {
    ".lora_A.weight": "rank <- input",
    ".lora_B.weight": "output <- rank",
    ".lora_B.bias": "-> output",
    ".lora_embedding_A": "rank <- input",
    ".lora_embedding_B": "output <- rank",
    ".lora_magnitude_vector": "-> output",
}
"""What an adapter's file holds beside a module's weight, by how its name ends."""

PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
"""The endings of A and of B: of linear modules, and of embeddings."""

_WHOLE = (".weight", ".bias", ".trainable_tokens_delta")
"""How the names of tensors end that an adapter's file may hold beside pairs: of modules that are trained whole."""

_KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias"),
        *("lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("rank_pattern", "revision", "target_modules", "task_type", "trainable_token_indices", "use_dora"),
        "use_rslora",
    )
)
"""Fields of adapter_config.json under which B A s is all that depends on the rank. (DoRA's norms are of W + s B A.)"""

_INITS = (True, False, None, "gaussian")
"""Values of init_lora_weights under which the base's weights stay what they are, whatever the rank."""


@dataclass(frozen=True)
class Pair:
    """One adapted module.

    Attributes:
        module: its name in the base model.
        a, b: the names of its two tensors in the adapter's file.
        rank: the rows of A.
        alpha: of the module.
        stable: the scale is alpha / sqrt(rank).
    """

    module: str
    a: str
    b: str
    rank: int
    alpha: int | float
    stable: bool

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank**0.5 if self.stable else self.alpha / self.rank


def pairs_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Pair]:
    """The adapted modules, by name.

    Args:
        config: what adapter_config.json holds.
        shapes: of the adapter's tensors, by their names in its file.

    Raises:
        RequestError: an adapter of another kind, or a variant of LoRA that is not declared, by name.
        SourceError: tensors that are no pairs, or of another rank than the config says.
    """
    if config.get("peft_type") != "LORA":
        raise RequestError(f"peft_type={config.get('peft_type')!r}: of PEFT's adapters, those of type LORA can grow")
    for field, value in config.items():
        if field not in _KNOWN and value:
            raise RequestError(f"{field}={value!r:.80} makes a variant of LoRA of which no fact is declared")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise RequestError(
            f"init_lora_weights={init!r} changes the base's weights by the rank when the adapter is loaded; save it as "
            f"plain LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    found: dict[str, Pair] = {}
    for name, shape in shapes.items():
        pattern(name, shape)
        for end_a, end_b in PAIRS:
            if name.endswith(end_a):
                module = name.removeprefix(PREFIX).removesuffix(end_a)
                rank, alpha = resolved(config, "r", module), resolved(config, "lora_alpha", module)
                b = name.removesuffix(end_a) + end_b
                if b not in shapes or shape[0] != rank or shapes[b][1] != rank:
                    there = list(shapes[b]) if b in shapes else "not there"
                    raise SourceError(f"{name} is {list(shape)} and {b} is {there}; adapter_config.json says r={rank}")
                found[module] = Pair(module, name, b, rank, alpha, bool(config.get("use_rslora")))
    if not found:
        raise SourceError("the adapter holds no pair of lora_A and lora_B")
    return found


def pattern(name: str, shape: tuple[int, ...]) -> TensorPattern | None:
    """How an adapter's tensor stands to the rank; None for one of a module that is trained whole.

    Raises:
        SourceError: a tensor of another kind, or of a module that is neither linear nor an embedding.
    """
    text = next((text for end, text in TENSORS.items() if name.endswith(end)), None)
    if text is None:
        if "lora_" in name or not name.endswith(_WHOLE):
            raise SourceError(f"{name}: no adapter's tensor of this name is declared")
        return None
    found = TensorPattern.parse(text)
    if len(found.dims) != len(shape):
        raise SourceError(f"{name} has {len(shape)} dims; of linear modules and embeddings it has {len(found.dims)}")
    return found


def resolved(config: Mapping[str, Any], field: str, module: str) -> Any:
    """A module's `r` or `lora_alpha`: that of the first pattern that its name ends with, else the config's own."""
    for key, value in (config.get(_PATTERN[field]) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[field]


_PATTERN = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def told(config: Mapping[str, Any], field: str, wanted: Mapping[str, Any], default: Any = None) -> dict[str, Any]:
    """The two fields of a config that give every module its `r` or `lora_alpha`.

    Args:
        config: whose patterns stay where they say it already.
        field: "r" or "lora_alpha".
        wanted: the value of each module.
        default: the config's own; None: what most modules have.
    """
    by = _PATTERN[field]
    default = Counter(wanted.values()).most_common(1)[0][0] if default is None else default
    # PEFT sorts them when it saves, and takes the first that fits: what holds in that order holds in every file.
    said = {field: default, by: dict(sorted((config.get(by) or {}).items()))}
    if all(resolved(said, field, module) == value for module, value in wanted.items()):
        return said
    return {field: default, by: {module: value for module, value in wanted.items() if value != default}}


def rank_plan(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    r: int | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Plan:
    """The plan under which an adapter's rank grows and what it computes stays.

    Args:
        config: what adapter_config.json holds.
        shapes: of its tensors, by their names in its file.
        r: the new rank of all modules that `rank_pattern` does not name; None: the old one.
        rank_pattern: new ranks by the ends of modules' names, beside those of the config.
        seed: of the draws.

    Raises:
        RequestError: a rank that is none, or smaller than it is, or the same everywhere; or see `pairs_of`.
        SourceError: see `pairs_of`.
    """
    pairs = pairs_of(config, shapes)
    request: dict[str, Any] = {} if r is None else {"r": _rank(r)}
    if rank_pattern:
        request["rank_pattern"] = {key: _rank(value) for key, value in rank_pattern.items()}
    patterns = {**request.get("rank_pattern", {}), **(config.get("rank_pattern") or {})}
    goal = {"r": request.get("r", config["r"]), "rank_pattern": patterns | request.get("rank_pattern", {})}
    ranks = {module: int(resolved(goal, "r", module)) for module in pairs}
    alphas = {module: _alpha(pair, ranks[module]) for module, pair in pairs.items()}
    for module, pair in pairs.items():
        if ranks[module] < pair.rank:
            raise RequestError(f"r={ranks[module]}: {module} has rank {pair.rank} already, and ranks only grow")
    if all(ranks[module] == pair.rank for module, pair in pairs.items()):
        have = ", ".join(map(str, sorted({pair.rank for pair in pairs.values()})))
        asked = _words(request) or "nothing asked"
        raise RequestError(f"{asked}: the adapter has rank {have}; ask for more, such as r={2 * max(ranks.values())}")
    target = {**config, **told(goal, "r", ranks, goal["r"]), **told(config, "lora_alpha", alphas)}
    moved = {
        f"{module_said}lora_alpha {pair.alpha} -> {alphas[module]}, so that the scale stays {pair.scale:g}": None
        for module, pair in pairs.items()
        for module_said in ([""] if len(set(alphas.values())) == 1 else [f"{module}: "])
    }
    lifts = {module: lift(pair.rank, ranks[module]) for module, pair in pairs.items()}
    within = {name: lifts[pair.module] for pair in pairs.values() for name in (pair.a, pair.b)}
    return Plan(
        family="lora",
        method="rank",
        seed=seed,
        request=request,
        moved=tuple(moved),
        source_config=dict(config),
        target_config=target,
        tensors=tuple(_tensor_plan(name, shape, within.get(name)) for name, shape in shapes.items()),
        axes={"rank": {"old": config["r"], "new": target["r"], "closed": "readers"}},
    )


def lift(old: int, new: int) -> Lift:
    """The lift of a rank."""
    return Lift(old, (Run(old, 0), *([Run(new - old, None, back=None)] if new > old else [])))


def _tensor_plan(name: str, shape: tuple[int, ...], rank: Lift | None) -> TensorPlan:
    found = pattern(name, shape)
    end = next((end for end in TENSORS if name.endswith(end)), name)
    label = f"{{module}}{end}" if end != name else name
    if found is None or rank is None:
        return TensorPlan(name, name, tuple(map(Lift.identity, shape)), False, Fill("normal", name), label)
    return along_rank(name, found, shape, rank, label)


def along_rank(name: str, pattern: TensorPattern, shape: tuple[int, ...], rank: Lift, label: str) -> TensorPlan:
    """The plan of a tensor that grows along its rank and no other axis, which is closed at its readers.

    Args:
        name: the tensor's.
        pattern: with an axis `rank`.
        shape: of the tensor.
        rank: the lift.
        label: what tables call its kind.
    """

    def of(atom: Atom, size: int) -> Lift:
        return rank.freed(atom.stand == "write") if atom.axis == "rank" else Lift.identity(size)

    dims = tuple(
        dim.lift(lambda atom, size=size: of(atom, size))  # type: ignore[misc]
        for dim, size in zip(pattern.dims, shape, strict=True)
    )
    return TensorPlan(name, name, dims, False, Fill("normal", name), label)


def _alpha(pair: Pair, rank: int) -> int | float:
    """The alpha under which the scale stays; a whole number where it is one."""
    ratio = Factor.sqrt(rank, pair.rank) if pair.stable else Factor.of(rank, pair.rank)
    exact = Factor(ratio.square * Fraction(pair.alpha) ** 2)
    whole = float(exact)
    negative = -1 if pair.alpha < 0 else 1
    return negative * (int(whole) if Factor.of(int(whole)) == exact else whole)


def _rank(value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d*", text):
        raise RequestError(f"r={value!r}: a rank is a whole number of at least 1")
    return int(text)


def _words(request: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in request.items())
