"""Net2WiderNet and Net2DeeperNet (Chen et al., arXiv 1511.05641) for convolutional nets: from sizes to one plan.

A net is a `Trunk`: a chain of plain layers, then stages of residual blocks. Between convolutions stand a batch norm and
a ReLU, which treat each channel on its own; so every axis of channels is one between linear maps that nothing else
reads, and a method grows it as it grows a Transformer's mlp. The blocks of a stage, and its shortcut, add to one stream
of channels: that is one axis, however many tensors write it.

A new block adds nothing: the gain and the shift of its last batch norm are zero, and relu(x + 0) = x, for x is the
output of a ReLU. A new layer of the chain is the identity kernel under a batch norm that takes nothing off: mean 0,
variance 1 - eps, gain 1, shift 0. Both hold in eval mode; in training mode a batch norm divides by the batch's own
variance, which the second does not foresee.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from growformer.algebra import Factor, Family, Fill, Lift, Method, Way
from growformer.errors import RequestError
from growformer.planning.build import tensor_plans
from growformer.planning.cover import Shapes, cover
from growformer.planning.growth import AxisGrowth, Growth, Scope
from growformer.planning.make import axes_json
from growformer.planning.picks import picker, way_of
from growformer.planning.plan import Plan, TensorPlan
from growformer.planning.resolve import layer_growth, plain_growth

__all__ = ["Stage", "Trunk", "grow_trunk", "plan_trunk"]

INNER = ("inner", "second")
"""The axes between the convolutions of a block, in order."""

CHAIN = "link"
"""The index axis of the chain's layers."""


@dataclass(frozen=True)
class Stage:
    """Residual blocks that add to one stream: its channels, and for each block the sizes of its inner axes."""

    channels: int
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Trunk:
    """The sizes of a convolutional net.

    Attributes:
        colors: the channels of an image.
        chain: the width of each plain layer, one at least.
        stages: the residual stages behind it.
        bridged: whether the first stage has a convolution in its shortcut (later ones always have), so that its stream
            is another axis than the last width of the chain.
        relu: whether the activation is ReLU.
    """

    colors: int
    chain: tuple[int, ...]
    stages: tuple[Stage, ...]
    bridged: bool = True
    relu: bool = True


class _Grower:
    """Grows the axes of one family by one method, each with draws of its own."""

    def __init__(self, family: Family, method: Method, seed: int, relu: bool) -> None:
        self.family, self.method, self.seed, self.relu = family, method, seed, relu

    def channels(self, axis: str, scope: Scope, old: int, new: int) -> AxisGrowth:
        """The growth of one axis of channels."""
        where = axis + "".join(f" of {name} {number}" for name, number in scope)
        if new < old:
            raise RequestError(
                f"{where}: {old} channels would become {new}; growing never takes away (layers_at says which are new)"
            )
        way = way_of(self.method, self.family, axis) if old != new and old else Way()
        if way.ahead:
            raise RequestError(f"{self.method.name} writes copies with the next layer's tensors; nets have none alike")
        if way.lift == "new" and way.closed == "writers" and not self.relu:
            raise RequestError(f"{where}: closed where it is written, a channel is 0, and must be 0 behind a ReLU")
        pick = picker(self.method, self.family, axis, self.seed)
        grown = plain_growth(axis, old, new, way, lambda _, was, count: pick(where, was, count))
        flat = (
            f"{where} {old} -> {new}: new channels are written with zeros, where a ReLU has no slope, so that no "
            f"gradient ever reaches them; mlp=paper is alive"
        )
        return replace(grown, scope=scope, dead=flat if 0 < old < new and grown.closed == "writers" else "")

    def layers(self, axis: str, scope: Scope, old: int, new: int, at: Sequence[int] | None) -> AxisGrowth:
        """The growth of one index axis of layers, the first of which stays the first."""
        if new < old:
            raise RequestError(f"{axis}: {old} layers would become {new}; growing never takes away")
        way = way_of(self.method, self.family, "layer") if old != new else Way()
        if way.lift == "copies" or way.closed == "pairs":
            raise RequestError(f"{self.method.name} ({self.method.source}) adds no layers to nets; layer=paper works")
        if old != new and not self.relu:
            raise RequestError(f"{axis} {old} -> {new}: a new layer passes on what a ReLU gave, and is behind another")
        grown = layer_growth(old, new, at, way, axis)
        if grown.sources[0] is None:
            raise RequestError(f"{axis}: a new layer would come first, where the size of images or channels changes")
        # The first layer reads other channels than the rest: it is no model for a new one.
        first = 1 if old > 1 else 0
        like = tuple(max(layer, first) for layer in grown.like)
        return replace(grown, scope=scope, like=like, donors=like if grown.donors and first else ())


def grow_trunk(
    family: Family,
    old: Trunk,
    new: Trunk,
    method: Method,
    seed: int = 0,
    layers_at: Mapping[str, Sequence[int]] | None = None,
) -> Growth:
    """The growth of every axis of a net.

    Args:
        family: the declaration of its tensors.
        old, new: its sizes and those there will be.
        method: the way of growing; every axis of channels grows by its way for mlp.
        seed: of the draws.
        layers_at: target places of new layers, by "link" or "stage 0", "stage 1", ...; left out, they are spread.

    Raises:
        RequestError: what the method, or the net, cannot do.
    """
    if len(old.stages) != len(new.stages) or old.bridged != new.bridged:
        raise RequestError(
            "the stages, and which of their shortcuts have a convolution, stay: a first stage without one keeps the "
            "stem's number of channels, and one with it another number"
        )
    grower, places = _Grower(family, method, seed, old.relu), dict(layers_at or {})
    axes = _chain_axes(grower, old, new, places.pop(CHAIN, None))
    last = replace([axis for axis in axes if axis.axis == "width"][-1], scope=())
    axes += [AxisGrowth("stage", Lift.identity(len(old.stages))), replace(last, axis="stem")]
    for number, (was, now) in enumerate(zip(old.stages, new.stages, strict=True)):
        scope = (("stage", number),)
        before = replace(last, scope=scope)
        joined = number == 0 and not old.bridged
        stream = before if joined else grower.channels("hidden", scope, was.channels, now.channels)
        last = replace(stream, axis="hidden")
        axes += [last, replace(before, axis="before")]
        axes += _stage_axes(grower, scope, was, now, (before, last), places.pop(f"stage {number}", None))
    if places:
        raise RequestError(f"layers_at names {', '.join(places)}; this net's layers stand in link, stage 0, ...")
    return Growth([*axes, replace(last, axis="pooled", scope=())])


def _chain_axes(grower: _Grower, old: Trunk, new: Trunk, at: Sequence[int] | None) -> list[AxisGrowth]:
    """The layers of the chain; for each, the channels that it reads and those that it writes.

    A new layer passes the channels of the one before it on, new ones as well: they are one axis still.
    """
    links = grower.layers(CHAIN, (), len(old.chain), len(new.chain), at)
    axes = [links]
    before = AxisGrowth("came", Lift.identity(old.colors))
    for place, source in enumerate(links.sources):
        scope = ((CHAIN, place),)
        axes.append(replace(before, axis="came", scope=scope))
        width = new.chain[place]
        if source is not None:
            before = grower.channels("width", scope, old.chain[source], width)
        elif width != before.new:
            raise RequestError(
                f"chain: a new layer at {place} is the identity of the {before.new} channels that it reads, and cannot "
                f"write {width}"
            )
        before = replace(before, scope=scope)
        axes.append(before)
    return axes


def _stage_axes(
    grower: _Grower,
    scope: Scope,
    old: Stage,
    new: Stage,
    reads: tuple[AxisGrowth, AxisGrowth],
    at: Sequence[int] | None,
) -> list[AxisGrowth]:
    """The blocks of a stage; for each, the channels that it reads and its inner ones.

    Args:
        grower: of its axes.
        scope: the stage's.
        old, new: its sizes.
        reads: what the first block reads, and what the others do.
        at: where new blocks go.
    """
    layers = grower.layers("layer", scope, len(old.blocks), len(new.blocks), at)
    axes = [layers]
    for place, source in enumerate(layers.sources):
        here = (*scope, ("layer", place))
        axes.append(replace(reads[place > 0], axis="into", scope=here))
        sizes = new.blocks[place]
        was = (0,) * len(sizes) if source is None else old.blocks[source]
        axes += [grower.channels(a, here, n, m) for a, n, m in zip(INNER, was, sizes, strict=False)]
    return axes


def plan_trunk(
    family: Family,
    method: Method,
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    trunks: tuple[Trunk, Trunk],
    shapes: Shapes,
    request: Mapping[str, Any],
    seed: int = 0,
    layers_at: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """The plan of a net's growth.

    Args:
        family: the declaration of its tensors, as its config has them (`Family.of`).
        method: the way of growing.
        configs: the source's and the target's.
        trunks: their sizes.
        shapes: the shape of every source tensor by its name, statistics of batch norms included.
        request: what was asked, for the plan.
        seed: of the draws.
        layers_at: see `grow_trunk`.

    Raises:
        RequestError: what `grow_trunk` refuses.
        PatternError: where config and tensors do not belong together.
    """
    growth = grow_trunk(family, *trunks, method, seed, layers_at)
    covered = cover(family, growth, shapes, configs[0])
    tensors = (_passing(family, configs[0], t) for t in tensor_plans(family, growth, covered, shapes))
    index = {CHAIN, family.layer}
    return Plan(
        family=family.name,
        method=method.name,
        seed=seed,
        request=request,
        moved=(),
        source_config=configs[0],
        target_config=configs[1],
        tensors=tuple(tensors),
        dropped=covered.dropped,
        axes=axes_json(growth),
        layers={_scoped(axis): tuple(axis.sources) for axis in growth if axis.axis in index},
        dead=tuple(dict.fromkeys(axis.dead for axis in growth if axis.dead)),
    )


def _scoped(axis: AxisGrowth) -> str:
    return axis.axis + "".join(f"@{name}={number}" for name, number in axis.scope)


def _passing(family: Family, config: Mapping[str, Any], tensor: TensorPlan) -> TensorPlan:
    """The plan of a tensor of a new layer of the chain, which passes on what it reads.

    sqrt(variance + eps) = 1, so the batch norm divides by nothing; its gain and shift are 1 and 0 in any new layer.
    """
    name, pattern = next((name, pattern) for name, pattern in family.patterns if name.text == tensor.pattern)
    if tensor.source is not None or CHAIN not in name.axes:
        return tensor
    atoms = list(pattern.atoms())
    if any(atom.stand == "read" for atom in atoms):
        return replace(tensor, fill=Fill("identity", tensor.fill.like))
    if any(atom.stand == "gain" and family.batch_norm(atom.role) is None for atom in atoms):
        variance = 1 - Fraction(config["eps"])
        return replace(tensor, fill=Fill("constant", tensor.fill.like, factor=Factor(variance**2)))
    return tensor
