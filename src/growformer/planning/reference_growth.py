"""Expansions of the reference Transformer: a composition folded into one growth, then one plan.

The fold walks the composition with sizes alone. For every layer and head there will be it remembers which layer and
head of the source stands there, so that a composition however long moves each weight once, by one exact factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from growformer.algebra import Family, Kind, Lift, Method, Way, copies
from growformer.errors import RequestError
from growformer.planning.apply import apply
from growformer.planning.build import tensor_plans
from growformer.planning.cover import Shapes, cover
from growformer.planning.expansions import (
    AttentionExpansion,
    Expansion,
    HeadAddition,
    HeadsExpansion,
    HiddenExpansion,
    LayerAddition,
    MLPExpansion,
)
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.heads import alike
from growformer.planning.make import axes_json
from growformer.planning.picks import cycle
from growformer.planning.plan import Plan
from growformer.planning.ports import eps_factor
from growformer.planning.resolve import plain_growth, stream_growth
from growformer.planning.slopes import without_slope

if TYPE_CHECKING:
    from growformer.models import LayerSize, ReferenceConfig, ReferenceTransformer

__all__ = ["expand_reference", "grow_reference", "plan_reference"]


@dataclass
class _Head:
    """A head there will be: the source's head that it is (None: new), the one its fills are like, and its sizes."""

    source: int | None
    like: int
    key: int
    value: int


@dataclass
class _Layer:
    """A layer there will be, likewise."""

    source: int | None
    like: int
    mlp: int
    heads: list[_Head]


@dataclass
class _State:
    hidden: int
    layers: list[_Layer]


def grow_reference(config: ReferenceConfig, expansion: Expansion, method: Method) -> tuple[ReferenceConfig, Growth]:
    """The grown model's config, and the growth of every axis from the source to it.

    Sizes of mlp and the count of heads are scoped by layer, key and value by layer and head, in target indices.

    Args:
        config: the source's.
        expansion: one of the six, or a composition.
        method: which side of each axis is closed.

    Raises:
        RequestError: a smaller size, an index that is not there, or a place that is out of range.
    """
    from growformer.models import HeadSize, LayerSize

    state = _start(config)
    for step in expansion.steps:
        _act(state, step)
    if any(layer.source is None for layer in state.layers) and _way(method, "layer").lift == "copies":
        raise RequestError(
            f"{method.name} ({method.source}) has whole layers again; here layers are added: layer=paper"
        )
    hidden = _hidden(config.hidden, state.hidden, method)
    if len(state.layers) != len(config.layers) and _way(method, "layer").closed == "pairs":
        raise RequestError("layer: heads of the reference Transformer have tensors of their own, which have no pairs")
    layers = Lift.rows(len(config.layers), [layer.source for layer in state.layers])
    axes = [
        AxisGrowth("vocab", Lift.identity(config.vocab), "writers"),
        AxisGrowth("positions", Lift.identity(config.positions), "writers"),
        hidden,
        AxisGrowth("layer", layers, "readers", like=tuple(layer.like for layer in state.layers)),
    ]
    for place, layer in enumerate(state.layers):
        old = None if layer.source is None else config.layers[layer.source]
        axes += _layer_axes(place, layer, old, method)
    grown = replace(
        config,
        hidden=state.hidden,
        layers=tuple(LayerSize(n.mlp, tuple(HeadSize(e.key, e.value) for e in n.heads)) for n in state.layers),
        eps=config.eps if eps_factor(hidden) == 1 else Fraction(config.eps) * eps_factor(hidden),
    )
    return grown, Growth(axes, tied=config.tied)


def plan_reference(
    family: Family, method: Method, config: ReferenceConfig, expansion: Expansion, shapes: Shapes, seed: int = 0
) -> tuple[Plan, ReferenceConfig]:
    """The plan of an expansion of the reference Transformer, made at once, and the grown model's config.

    Args:
        family: the declaration of the reference Transformer's tensors (`growformer.families.reference`).
        method: the way of growing.
        config: the source's.
        expansion: one of the six, or a composition.
        shapes: the shape of every source tensor by its name.
        seed: of the draws.

    Raises:
        RequestError: what `grow_reference` refuses.
        PatternError: where config and tensors do not belong together.
    """
    grown, growth = grow_reference(config, expansion, method)
    switches = {"gated": bool(config.layers) and config.activation == "swiglu", "final_norm": config.final_norm}
    full = {**config.to_dict(), **switches}
    growth = without_slope(family, growth, full)
    covered = cover(family, growth, shapes, full)
    plan = Plan(
        family=family.name,
        method=method.name,
        seed=seed,
        request={"expansions": expansion.to_json()},
        moved=(),
        source_config=config.to_dict(),
        target_config=grown.to_dict(),
        tensors=tuple(tensor_plans(family, growth, covered, shapes)),
        dropped=covered.dropped,
        axes=axes_json(growth),
        layers={family.layer: tuple(growth.at(family.layer).sources)},
        dead=tuple(axis.dead for axis in growth if axis.dead),
    )
    return plan, grown


def expand_reference(
    family: Family, method: Method, model: ReferenceTransformer, expansion: Expansion, seed: int = 0
) -> ReferenceTransformer:
    """A larger reference Transformer that computes the same function; `model` is left as it is.

    Args:
        family: the declaration of the reference Transformer's tensors (`growformer.families.reference`).
        method: the way of growing.
        model: the source. The result has its dtype and device; in float64 the logits agree to rounding.
        expansion: one of the six, or a composition.
        seed: of the draws.

    Raises:
        RequestError: what `grow_reference` refuses.
    """
    import torch

    from growformer.models import ReferenceTransformer

    source = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    plan, config = plan_reference(family, method, model.config, expansion, shapes, seed)
    like = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # what it draws for weights that are replaced at once should cost nobody
        grown = ReferenceTransformer(config, like.dtype)
    grown.load_state_dict(apply(plan, source), assign=True)
    return grown.to(like.device).train(model.training)


def _start(config: ReferenceConfig) -> _State:
    layers = []
    for n, layer in enumerate(config.layers):
        heads = [_Head(e, e, head.key, head.value) for e, head in enumerate(layer.heads)]
        layers.append(_Layer(n, n, layer.mlp, heads))
    return _State(config.hidden, layers)


def _act(state: _State, step: Expansion) -> None:
    match step:
        case MLPExpansion():
            for place, layer in _chosen(step, state.layers, step.layers):
                layer.mlp = _larger(step, f"mlp of layer {place}", layer.mlp, step.mlp)
        case HeadsExpansion():
            for where, head in _chosen_heads(step, state.layers, step.layers, step.heads):
                head.value = _larger(step, f"value of {where}", head.value, step.value)
        case AttentionExpansion():
            for where, head in _chosen_heads(step, state.layers, step.layers, step.heads):
                head.key = _larger(step, f"key of {where}", head.key, step.key)
        case HiddenExpansion():
            state.hidden = _larger(step, "hidden", state.hidden, step.hidden)
        case HeadAddition():
            for _, layer in _chosen(step, state.layers, step.layers):
                old, last = layer.heads, layer.heads[-1]
                key, value = step.key or last.key, step.value or last.value
                layer.heads = [
                    _Head(None, last.like, key, value) if i is None else old[i] for i in step.sources(len(old))
                ]
        case LayerAddition():
            state.layers = _with_layers(step, state.layers)
        case _:
            raise RequestError(f"{step}: the reference Transformer does not know this expansion")


def _with_layers(step: LayerAddition, old: Sequence[_Layer]) -> list[_Layer]:
    if not old:
        raise RequestError(f"{step}: a model without layers has no weights to take a new layer's spread from")
    layers: list[_Layer] = []
    before = old[0]
    for i in step.sources(len(old)):
        if i is not None:
            before = old[i]
            layers.append(before)
        elif step.size is None:
            heads = [_Head(None, head.like, head.key, head.value) for head in before.heads]
            layers.append(_Layer(None, before.like, before.mlp, heads))
        else:
            heads = [_Head(None, e, head.key, head.value) for e, head in enumerate(step.size.heads)]
            layers.append(_Layer(None, before.like, step.size.mlp, heads))
    return layers


def _larger(step: Expansion, what: str, old: int, new: int) -> int:
    if new < old:
        raise RequestError(f"{step}: {what} is {old} already; growing never takes away, so ask for {old} or more")
    return new


def _chosen(step: Expansion, layers: Sequence[_Layer], wanted: Sequence[int] | None) -> Iterator[tuple[int, _Layer]]:
    for place in range(len(layers)) if wanted is None else wanted:
        if place >= len(layers):
            raise RequestError(f"{step}: there is no layer {place}; the model then has {len(layers)}, counted from 0")
        yield place, layers[place]


def _chosen_heads(
    step: Expansion, layers: Sequence[_Layer], wanted: Sequence[int] | None, heads: Sequence[int] | None
) -> Iterator[tuple[str, _Head]]:
    for place, layer in _chosen(step, layers, wanted):
        for e in range(len(layer.heads)) if heads is None else heads:
            if e >= len(layer.heads):
                raise RequestError(
                    f"{step}: there is no head {e} in layer {place}; it then has {len(layer.heads)}, counted from 0"
                )
            yield f"layer {place} head {e}", layer.heads[e]


def _hidden(old: int, new: int, method: Method) -> AxisGrowth:
    """The growth of the residual stream, which RMSNorms alone read."""
    way = _way(method, "hidden") if old != new else Way()
    if way.lift == "copies" and old != new:
        if new % old:
            raise RequestError(
                f"hidden={new}: a norm reads it, so only whole copies of its {old} channels are exact; "
                f"hidden={-(-new // old) * old} is the next"
            )
        lift = copies(old, [*range(old)] * (new // old), way.split)
        return AxisGrowth("hidden", lift, "writers", heard=True, shares=way.split)
    grown = stream_growth("hidden", old, new, mean=False)
    return grown if way.fill == "normal" else replace(grown, donors=tuple(j % old for j in range(new - old)))


def _way(method: Method, kind: Kind) -> Way:
    if kind not in method.ways:
        raise RequestError(f"{method.name} ({method.source}) does not grow {kind}; it grows {', '.join(method.ways)}")
    if method.ways[kind].fill == "gradient":
        raise RequestError(
            f"{method.name} ({method.source}) takes what new {kind} holds from passes through a stock model's modules; "
            f"the reference Transformer grows as tensors, and its MLPs and heads are no such modules; paper works"
        )
    return method.ways[kind]


def _layer_axes(place: int, layer: _Layer, old: LayerSize | None, method: Method) -> Iterator[AxisGrowth]:
    """The growth of one target layer's own axes; `old` is the source's layer that stands there.

    Where all of a layer is new, one way of closing it is as good as another: it is closed once, at what it writes.
    """
    scope = (("layer", place),)

    def way(kind: Kind, was: int, now: int) -> Way:
        return _way(method, kind) if was and was != now else Way()

    was = len(old.heads) if old else 0
    sources = [head.source for head in layer.heads]
    likes = tuple(head.like for head in layer.heads)
    ahead = way("heads", was, len(sources))
    if ahead.lift == "new" and ahead.closed == "pairs":
        raise RequestError("heads: every head of the reference Transformer has tensors of its own, which have no pairs")
    donors = [head.like for head in layer.heads if head.source is None]
    heads = alike("head", was, sources, donors, ahead if ahead.lift == "copies" else Way())
    yield replace(heads, scope=scope, like=likes)
    mlp = old.mlp if old else 0
    yield replace(plain_growth("mlp", mlp, layer.mlp, way("mlp", mlp, layer.mlp), cycle), scope=scope)
    for e, head in enumerate(layer.heads):
        at = heads.sources[e]
        size = None if old is None or at is None else old.heads[at]
        inner = (*scope, ("head", e))
        key, value = (size.key, size.value) if size else (0, 0)
        yield replace(plain_growth("key", key, head.key, way("key", key, head.key), cycle), scope=inner)
        yield replace(plain_growth("value", value, head.value, way("value", value, head.value), cycle), scope=inner)
