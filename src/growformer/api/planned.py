"""plan: what a growth would do, from a folder or a model in memory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import KINDS, Family, Field, Method, Tied
from growformer.api.becoming import seen
from growformer.checkpoint import TensorFiles, read_config, require_growable
from growformer.checkpoint.hub import located
from growformer.checkpoint.stock import disk_names, fields_read, full_config
from growformer.errors import RequestError, SourceError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.methods.paper import PAPER
from growformer.planning import Plan, make_plan
from growformer.planning.becoming import check_there
from growformer.planning.choices import Choices
from growformer.planning.expansions import compose
from growformer.planning.sizes import size_of

if TYPE_CHECKING:
    import torch
    import transformers


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that serves a config, as that config has it (see `Family.of`).

    Raises:
        RequestError: none does; the message lists those there are.
    """
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            named = config.get("architectures") or []
            served = ", ".join(family.architectures)
            if not isinstance(named, list):
                raise RequestError(f"config.json: architectures is {named!r}, not a list; {family.name} has {served}")
            odd = [a for a in named if a not in family.architectures]
            if odd:
                raise RequestError(f"config.json: architecture {odd[0]} is not served; {family.name} has {served}")
            return family.of(full_config(config)[0])
    raise RequestError(f"config.json: model_type {kind!r} is no family here; there are {', '.join(FAMILIES)}")


def method_named(name: str) -> Method:
    """The method of a name: one alone ("lemon"), or with others for some kinds of axes ("lemon,key=paper").

    Raises:
        RequestError: there is none; the message lists those there are.
    """
    first, *others = (part.strip() for part in name.split(","))
    if "=" in first:
        first, others = PAPER.name, [first, *others]
    made = _method(first)
    for part in others:
        kind, _, other = (word.strip() for word in part.partition("="))
        if kind not in KINDS or not other:
            raise RequestError(f"method {name!r}: {part!r} should be KIND=METHOD, with KIND one of {', '.join(KINDS)}")
        way = _method(other).ways.get(kind)
        if way is None:
            grows = ", ".join(METHODS[other].ways)
            raise RequestError(f"method {name!r}: {other} does not grow {kind}; it grows {grows}")
        made = replace(made, name=name, ways={**made.ways, kind: way})
    return made


def _method(name: str) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RequestError(f"method {name!r} is unknown; {hint}growformer methods lists those there are")
    return METHODS[name]


def plan(
    source: str | Path | transformers.PreTrainedModel,
    *expansions: Any,
    method: str = "paper",
    seed: int = 0,
    layers_at: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ignore_fields: Sequence[str] = (),
    rope: str = "theta",
    new_tokens: str = "open",
    same: str = "refused",
    **request: Any,
) -> Plan:
    """What a growth would do, from shapes alone; nothing is written.

    Args:
        source: a Hugging Face folder, a Hub id, or a model in memory.
        expansions: `MLPExpansion(4096)` and its kin, beside or instead of the request.
        method: a name from `growformer methods`.
        seed: of the draws for new entries.
        layers_at: places of the new layers in the grown model, counted from 0; None spreads them evenly.
        ignore_fields: config fields that no fact of the family covers, and that growth should not mind.
        rope: where the pairs of a rotary head go when it gets wider: theta, strided, longrope or proportional (see
            `growformer.planning.choices.ROPES`).
        new_tokens: "open", or "closed": their probability is exactly zero, where the head has a bias to say so.
        same: "refused", or "planned": a request for the source's own sizes is a growth by nothing, a control.
        request: new sizes by the names of config.json: `hidden_size=1024`. With `model_type="mixtral"` those of the
            mixture of experts that a dense model becomes: `num_local_experts=8, num_experts_per_tok=2`.

    Raises:
        RequestError: the request has no exact answer; the message names the nearest that works.
        SourceError: the folder cannot be read, or stores a head other than the embedding that config.json ties it to.
    """
    if isinstance(source, (str, Path)):
        folder = located(source)
        raw = read_config(folder)
        with TensorFiles.open(folder) as files:
            for name in files:
                require_growable(files[name])
            shapes = {name: files[name].shape for name in files}
    else:
        raw = source.config.to_dict()
        from growformer.checkpoint.layout import disk_shapes  # with torch, which a plan of a folder does without

        raw["architectures"] = [type(source).__name__]
        shapes = disk_shapes(source)
    choices = Choices(rope, new_tokens, same)
    source_family = family_of(raw)
    view = seen(source_family, raw, request, ignore_fields)
    family, asked, placed = view.family, view.request, layers_at
    if expansions:
        steps = compose(*expansions)
        asked |= steps.fields(family, {**view.full, **asked})
        placed = steps.layers_at(int(view.full[_layers_field(family)])) if layers_at is None else layers_at
    if view.origin is not None:
        check_there(view.origin.becoming, source_family, family, asked)
    made = make_plan(
        family,
        method_named(method),
        view.raw,
        view.full,
        view.defaults,
        shapes,
        asked,
        seed=seed,
        layers_at=placed,
        read=fields_read(view.raw),
        ignored=ignore_fields,
        choices=choices,
        origin=view.origin,
    )
    meant = "was planned: another field of the source's config.json speaks of it as well"
    require_sizes(family, made.target_config, made, "the grown config.json", meant)
    if family.tied is not None and family.tied.head in made.dropped:
        require_equal(
            source, family.tied, next(str(t.source) for t in made.tensors if t.pattern == family.tied.embedding)
        )
    return made


def require_sizes(family: Family, config: Mapping[str, Any], made: Plan, where: str, meant: str) -> None:
    """Refuse a config.json that transformers reads as other sizes than were planned (by an older name, say).

    Args:
        family: of the config.
        config: what the config.json is to hold.
        made: the plan.
        where: what it is called.
        meant: what the planned size is.
    """
    read = full_config(config, where)[0]
    for axis, size in family.axes.items():
        found, planned = size_of(size, read), int(made.axes[axis]["new"])
        if found != planned:
            raise RequestError(f"{where} says {found} {axis} to transformers, and {planned} {meant}")


def require_equal(source: str | Path | transformers.PreTrainedModel, tied: Tied, embedding: str) -> None:
    """Refuse a head that the config ties to an embedding of other values: what was meant, only its owner knows."""
    from growformer.proof.certificate import DictTensors, FileTensors
    from growformer.proof.equations import same

    if isinstance(source, (str, Path)):
        with TensorFiles.open(located(source)) as files:
            equal = same(FileTensors(files), tied.head, embedding)
    else:
        equal = same(DictTensors(on_disk(source)), tied.head, embedding)
    if not equal:
        raise SourceError(
            f"config.json: {tied.field} is true, and {tied.head} is stored all the same, other than {embedding}; "
            f"transformers 5 does not tie them then, older versions do: set {tied.field} to false if the stored "
            f"{tied.head} counts, or remove {tied.head} from the files if the embedding does"
        )


def _layers_field(family: Family) -> str:
    size = family.axes[family.layer]
    assert isinstance(size, Field)
    return size.name


def on_disk(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors as its checkpoint would hold them: a shared tensor once, under its first name."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            out[name] = tensor
        seen.add(tensor.data_ptr())
    return disk_names(model, out)
