"""An adapter follows its base: the plan under which it is to the grown base what it was to the small one.

A growth is linear in every weight: what comes from the source is W' = L_out W L_in', with the factors, copies and means
that the base's plan gives to the two dims. So the base with the adapter's s B A added, grown by the same plan, is the
grown base with s (L_out B) (A L_in') added. The adapter says nothing of new channels: its entries there are zero on one
side of the pair and reached by a gradient through the other, for the rank is an old axis. Where readers of copies share
a weight entry by entry, the pair shares evenly: any parts that add up to the whole are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from growformer.algebra import ONE, Factor, Fill, Lift, Run
from growformer.errors import RequestError, SourceError
from growformer.planning.adapters import PAIRS, Pair, pairs_of, told
from growformer.planning.plan import Plan, TensorPlan

Sides = Callable[[str], tuple[int, int]]
"""Of a weight's name in the base's checkpoint: which of its dims it reads, and which it writes."""

_FOLLOWS_NOT: Mapping[str, str] = {
    "use_dora": "the norms that it learns are of whole rows, to which growth adds",
    "lora_bias": "its biases are no part of the base's plan",
    "modules_to_save": "it holds whole modules of the small base",
    "trainable_token_indices": "it holds rows of the small base's embedding",
}
"""Fields of adapter_config.json under which an adapter cannot follow, and why."""


def follow_plan(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    base: Plan,
    sides: Sides,
    *,
    tied: str = "",
    seed: int = 0,
) -> Plan:
    """The plan under which an adapter follows its base.

    Args:
        config: what adapter_config.json holds.
        shapes: of its tensors, by their names in its file.
        base: the plan that has grown the base.
        sides: see `Sides`.
        tied: the embedding's name in the base's checkpoint, where the head shares it.
        seed: of the draws, for modules of new layers.

    Raises:
        RequestError: an adapter, or a growth, of which there is no such plan, with the reason.
        SourceError: the adapter is none of this base.
    """
    pairs = pairs_of(config, shapes)
    _require_followable(config, shapes, base)
    continued: dict[str, list[TensorPlan]] = {}
    for tensor in base.tensors:
        if tensor.source is not None:
            continued.setdefault(tensor.source, []).append(tensor)
    why = " (its embeddings are tied: the head has none of its own)" if tied else ""
    named = {module: weight_of(module, continued, why) for module in pairs}
    if tied in named.values():
        raise RequestError(
            f"{tied} is adapted, and the head shares it: what the adapter adds for the one, the other lacks"
        )
    tensors: list[TensorPlan] = []
    grown: dict[str, Pair] = {}
    for module, pair in pairs.items():
        for tensor in continued[named[module]]:
            here = _in_memory(tensor, module, named[module])
            tensors += _carried_pair(pair, here, tensor, shapes, sides(tensor.name))
            grown[here] = pair
    plain = _by_suffix(config)
    if plain:
        for tensor in base.tensors:
            like = next((m for m, disk in named.items() if tensor.fill.like == disk), None)
            if tensor.source is None and like is not None:
                here = _in_memory(tensor, like, named[like])
                tensors += _new_pair(pairs[like], here, tensor, sides(tensor.name))
                grown[here] = pairs[like]
    target: dict[str, Any] = dict(config)
    if not plain:
        modules = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        target |= {"target_modules": sorted(grown), **{k: v for k, v in modules.items() if k in config}}
    target |= told(config, "r", {module: pair.rank for module, pair in grown.items()}, config["r"])
    target |= told(config, "lora_alpha", {module: pair.alpha for module, pair in grown.items()}, config["lora_alpha"])
    return Plan(
        family="lora",
        method="follow",
        seed=seed,
        request=dict(base.request),
        moved=(),
        source_config=dict(config),
        target_config=target,
        tensors=tuple(tensors),
        axes=dict(base.axes),
        layers=dict(base.layers),
    )


def _require_followable(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: Plan) -> None:
    for field, why in _FOLLOWS_NOT.items():
        if config.get(field):
            raise RequestError(f"{field}={config[field]!r:.80}: the adapter cannot follow its base, for {why}")
    if config.get("bias", "none") != "none":
        raise RequestError(f"bias={config['bias']!r}: the adapter cannot follow its base, for it holds biases of it")
    ends = tuple(end for pair in PAIRS for end in pair)
    whole = next((name for name in shapes if not name.endswith(ends)), None)
    if whole is not None:
        raise RequestError(
            f"{whole} is a tensor of the small base; save the adapter without (PEFT: save_embedding_layers=False)"
        )
    if base.learned:
        raise RequestError(
            f"the base was grown by {base.method}, which asks a loss, and its plan alone does not say how; an adapter "
            f"follows methods that ask none (paper)"
        )
    if base.source_family or base.function != "exact":
        what = f"became a {base.family}" if base.source_family else f"has a function that is {base.function}"
        raise RequestError(f"the base {what}; an adapter follows growths that are exact, within one family")


def weight_of(module: str, names: Collection[str], why: str = "") -> str:
    """The name of a module's weight in a base's checkpoint; a bare backbone's, or a bare model's, lack a prefix.

    Raises:
        SourceError: none, or several, could be it.
    """
    wanted = f"{module}.weight"
    found = [n for n in names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    if wanted in names:
        return wanted
    if len(found) != 1:
        said = "no weight" if not found else f"{len(found)} weights"
        raise SourceError(f"{module} is adapted, and the base's plan has {said} {wanted}{why}")
    return found[0]


def _in_memory(tensor: TensorPlan, module: str, disk: str) -> str:
    """What the adapter calls a module of the grown base, as it calls that of the small one."""
    name, disk = tensor.name.removesuffix(".weight"), disk.removesuffix(".weight")
    if len(module) >= len(disk):
        return module[: len(module) - len(disk)] + name
    return name.removeprefix(disk[: len(disk) - len(module)])


def _by_suffix(config: Mapping[str, Any]) -> bool:
    """Whether the config names its modules by what their names end with, the same in every layer."""
    names = config.get("target_modules")
    if not isinstance(names, (list, tuple, set)) or any(
        config.get(k) for k in ("layers_to_transform", "exclude_modules")
    ):
        return False
    return not any(part.isdigit() for name in names for part in str(name).split("."))


def _carried_pair(
    pair: Pair, module: str, tensor: TensorPlan, shapes: Mapping[str, tuple[int, ...]], sides: tuple[int, int]
) -> list[TensorPlan]:
    read, write = sides
    if len(tensor.dims) != 2 or tensor.offset:
        raise SourceError(f"{tensor.name} is no matrix; adapters follow linear modules and embeddings")
    width, height = tensor.source_shape[read], tensor.source_shape[write]
    if (shapes[pair.a][1], shapes[pair.b][0]) != (width, height):
        raise SourceError(
            f"{pair.module}: the adapter maps {shapes[pair.a][1]} channels to {shapes[pair.b][0]}, the base "
            f"{width} to {height}: it was not trained on this base"
        )
    rank = Lift.identity(pair.rank)
    a = (rank, carried(tensor.dims[read]))
    b = (carried(tensor.dims[write]), rank)
    return [
        TensorPlan(_renamed(name, pair, module), name, dims, False, Fill("normal", name), tensor.pattern)
        for name, dims in ((pair.a, a), (pair.b, b))
    ]


def _new_pair(pair: Pair, module: str, tensor: TensorPlan, sides: tuple[int, int]) -> list[TensorPlan]:
    """The pair of a new layer's module, as PEFT begins one: A drawn, B zero."""
    read, write = sides
    shapes = ((pair.a, (pair.rank, tensor.shape[read]), True), (pair.b, (tensor.shape[write], pair.rank), False))
    out = []
    for name, shape, free in shapes:
        dims = tuple(Lift(0, (Run(size, None, back=None),)) for size in shape)
        out.append(TensorPlan(_renamed(name, pair, module), None, dims, free, Fill("normal", name), tensor.pattern))
    return out


def _renamed(name: str, pair: Pair, module: str) -> str:
    front, _, end = name.rpartition(pair.module)
    return front + module + end


def carried(lift: Lift) -> Lift:
    """The linear part of a dim's lift: new channels zero, and what is shared among copies shared evenly."""
    runs = []
    for run in lift.runs:
        if run.old is None:
            runs.append(Run(run.count, None, back=None))
            continue
        part = Factor.of(1, run.share[1]) if run.share is not None else ONE
        runs.append(
            replace(run, factor=run.factor * part, share=None, noise=0.0, own=False, copy=-1, fresh=False, ahead=False)
        )
    return Lift(lift.old, tuple(runs))
