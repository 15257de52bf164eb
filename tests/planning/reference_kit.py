"""What the tests of the reference Transformer's growth share: models, random growths, origins of entries."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from growformer.families.reference import REFERENCE
from growformer.methods import METHODS
from growformer.models import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer, randomise
from growformer.planning import Plan
from growformer.planning.expansions import (
    AttentionExpansion,
    Expansion,
    HeadAddition,
    HeadsExpansion,
    HiddenExpansion,
    LayerAddition,
    MLPExpansion,
    compose,
)
from growformer.planning.reference_growth import expand_reference, grow_reference, plan_reference

PAPER = METHODS["paper"]

# Every size differs from every other in its layer, so that no swapped axis can pass unseen.
RAGGED = ReferenceConfig(
    vocab=23,
    positions=5,
    hidden=12,
    layers=(
        LayerSize(17, (HeadSize(3, 7), HeadSize(6, 2), HeadSize(4, 9))),
        LayerSize(10, (HeadSize(8, 1),)),
        LayerSize(13, (HeadSize(1, 11), HeadSize(14, 15))),
    ),
    eps=0.03,
    final_norm=True,
)

ALONE: dict[str, Expansion] = {
    "mlp": MLPExpansion(20),
    "mlp of one layer": MLPExpansion(16, layers=[1]),
    "heads": HeadAddition(2),
    "heads, placed and sized": HeadAddition(2, layers=[0, 2], at=[0, 2], key=5, value=3),
    "value": HeadsExpansion(16),
    "value of one head": HeadsExpansion(10, layers=[0], heads=[1]),
    "key": AttentionExpansion(15),
    "key of one head": AttentionExpansion(9, layers=[2], heads=[0]),
    "hidden": HiddenExpansion(19),
    "layers": LayerAddition(2),
    "layers, placed and sized": LayerAddition(2, at=[0, 4], size=LayerSize(5, (HeadSize(2, 3), HeadSize(7, 1)))),
}
ALL_SIX = compose(*(ALONE[name] for name in ("layers", "key", "heads", "hidden", "mlp", "value")))
EVERYTHING = {**ALONE, "all six": ALL_SIX}


def grow_one(config: ReferenceConfig, expansion: Expansion) -> ReferenceConfig:
    return grow_reference(config, expansion, PAPER)[0]


def plan_one(model: ReferenceTransformer, expansion: Expansion, seed: int = 0) -> Plan:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return plan_reference(REFERENCE, PAPER, model.config, expansion, shapes, seed)[0]


def expand_one(model: ReferenceTransformer, expansion: Expansion, seed: int = 0) -> ReferenceTransformer:
    return expand_reference(REFERENCE, PAPER, model, expansion, seed)


def source_model(config: ReferenceConfig, seed: int = 1) -> ReferenceTransformer:
    return randomise(ReferenceTransformer(config), seed)


def some_tokens(config: ReferenceConfig, sequences: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab, (sequences, config.positions), generator=generator)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@torch.no_grad()
def difference(a: ReferenceTransformer, b: ReferenceTransformer) -> float:
    """max|a-b| / max|a| over all logits."""
    tokens = some_tokens(a.config)
    return relative(a(tokens), b(tokens))


# --- random configs, and random compositions that fit them -----------------------------------------------------------

HEAD_SIZES = st.builds(HeadSize, key=st.integers(1, 4), value=st.integers(1, 4))
LAYER_SIZES = st.builds(LayerSize, mlp=st.integers(1, 6), heads=st.lists(HEAD_SIZES, min_size=1, max_size=3).map(tuple))


def configs(activations: tuple[str, ...] = ("relu", "gelu", "swiglu")) -> st.SearchStrategy[ReferenceConfig]:
    return st.builds(
        ReferenceConfig,
        vocab=st.integers(3, 9),
        positions=st.integers(2, 5),
        hidden=st.integers(2, 7),
        layers=st.lists(LAYER_SIZES, min_size=1, max_size=3).map(tuple),
        eps=st.sampled_from([0.0, 1e-3, 0.03, Fraction(1, 7)]),
        final_norm=st.booleans(),
        causal=st.booleans(),
        activation=st.sampled_from(activations),
        tied=st.booleans(),
    )


def some_of(count: int) -> st.SearchStrategy[list[int] | None]:
    """None, which means all, or some of the indices below `count` in any order."""
    return st.none() | st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)


@st.composite
def expansions(draw: st.DrawFn, config: ReferenceConfig) -> Expansion:
    """One of the six that fits a model of this config."""
    kind = draw(st.sampled_from(["mlp", "heads", "value", "key", "hidden", "layers"]))
    more = draw(st.integers(1, 3))
    if kind == "hidden":
        return HiddenExpansion(config.hidden + more)
    if kind == "layers":
        count, total = min(more, 2), len(config.layers) + min(more, 2)
        at = draw(st.none() | st.permutations(range(total)).map(lambda order: order[:count]))
        return LayerAddition(count, at=at, size=draw(st.none() | LAYER_SIZES))
    layers = draw(some_of(len(config.layers)))
    chosen = config.layers if layers is None else [config.layers[n] for n in layers]
    fewest = min(len(layer.heads) for layer in chosen)
    if kind == "mlp":
        return MLPExpansion(max(layer.mlp for layer in chosen) + more - 1, layers)
    if kind == "heads":
        count = min(more, 2)
        at = draw(st.none() | st.permutations(range(fewest + count)).map(lambda order: order[:count]))
        size = st.none() | st.integers(1, 5)
        return HeadAddition(count, layers, at, key=draw(size), value=draw(size))
    heads = draw(some_of(fewest))
    sizes = [size for layer in chosen for e, size in enumerate(layer.heads) if heads is None or e in heads]
    if kind == "key":
        return AttentionExpansion(max(size.key for size in sizes) + more - 1, layers, heads)
    return HeadsExpansion(max(size.value for size in sizes) + more - 1, layers, heads)


@st.composite
def growths(
    draw: st.DrawFn, activations: tuple[str, ...] = ("relu", "gelu", "swiglu"), most: int = 6
) -> tuple[ReferenceConfig, list[Expansion]]:
    """A config, and expansions that fit one after another."""
    config = now = draw(configs(activations))
    steps: list[Expansion] = []
    for _ in range(draw(st.integers(1, most))):
        steps.append(draw(expansions(now)))
        now = grow_one(now, steps[-1])
    return config, steps


# --- where each entry comes from --------------------------------------------------------------------------------------

Entries = npt.NDArray[np.object_]
Origins = Mapping[str, Entries]
"""For each target tensor, at each entry: (source tensor, source index, exact factor), or None where it is new."""


def origins(plan: Plan) -> Origins:
    """Where every entry of the target comes from, read off the plan's blocks."""
    out: dict[str, Entries] = {}
    for tensor in plan.tensors:
        entries = out[tensor.name] = np.full(tensor.shape, None, dtype=object)
        for block in tensor.blocks():
            if tensor.source is None or block.source is None:
                continue
            for offset in np.ndindex(block.shape):
                there = tuple(map(operator.add, block.source, offset))
                entries[tuple(map(operator.add, block.start, offset))] = (tensor.source, there, block.factor)
    return out


def through(first: Origins, second: Origins) -> Origins:
    """The origins of a plan that follows another."""
    out: dict[str, Entries] = {}
    for name, entries in second.items():
        composed = out[name] = np.full(entries.shape, None, dtype=object)
        for place, entry in np.ndenumerate(entries):
            before = None if entry is None else first[entry[0]][entry[1]]
            if before is not None:
                composed[place] = (*before[:2], before[2] * entry[2])
    return out


def alike(a: Origins, b: Origins) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and (a[name] == b[name]).all() for name in a)


def old_entries(found: Origins) -> list[Any]:
    """Every (source tensor, source index, factor)."""
    return [entry for entries in found.values() for entry in entries.flat if entry is not None]


def in_a_row(source: ReferenceTransformer, steps: list[Expansion]) -> tuple[ReferenceTransformer, Origins]:
    """The model grown step by step, and the composed origins of its entries."""
    model = source
    found: Origins | None = None
    for seed, step in enumerate(steps):
        here = origins(plan_one(model, step, seed))
        found = here if found is None else through(found, here)
        model = expand_one(model, step, seed)
    assert found is not None
    return model, found


def new_entries(found: Origins) -> dict[str, Tensor]:
    """For each target tensor, where its entries are new."""
    is_new = np.frompyfunc(lambda entry: entry is None, 1, 1)
    return {name: torch.from_numpy(is_new(entries).astype(bool)) for name, entries in found.items()}


def edited(
    model: ReferenceTransformer, edit: Callable[[dict[str, Tensor]], None], **switches: Any
) -> ReferenceTransformer:
    """A copy of the model with an edited state dict, or other switches."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    edit(state)
    copy = source_model(dataclasses.replace(model.config, **switches))
    copy.load_state_dict(state)
    return copy
