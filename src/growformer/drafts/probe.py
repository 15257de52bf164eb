"""Tiny random stock models of a config, one field changed at a time, each watched through a forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from growformer.checkpoint.stock import disk_names, full_config, stock_class
from growformer.drafts.classes import Classes, own_name, share
from growformer.drafts.trace import Guest, Trace, is_norm, watch

Config = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk stands in a parameter: by dim of the disk tensor, (dim, start, stop, step) of it."""

    param: str
    dims: tuple[tuple[int, int, int], ...]


@dataclass
class Probe:
    """One tiny model.

    Attributes:
        raw, full: its config, as given and with defaults.
        shapes: of its tensors on disk.
        places: where each of them stands in memory.
        trace: what a forward pass showed; None where it was not run.
        given: the shapes of what it was given.
        classes: those beside its own.
        heads: by class that was run as well, where its own tensors stand, by their names in full.
    """

    raw: Config
    full: Config
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Place] = field(default_factory=dict)
    trace: Trace | None = None
    model: Any = None
    given: dict[str, tuple[int, ...]] = field(default_factory=dict)
    classes: Classes = field(default_factory=Classes)
    heads: dict[str, dict[str, Place]] = field(default_factory=dict)


def class_of(raw: Mapping[str, Any]) -> Any:
    """The stock class of a config."""
    from transformers import CONFIG_MAPPING

    return stock_class(CONFIG_MAPPING[str(raw["model_type"])].from_dict(dict(raw)))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing meanwhile: probes are meant to be odd."""
    import transformers

    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity(50)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build(raw: Mapping[str, Any], seed: int = 0) -> Any:
    """A tiny model in float32, on eager kernels, of random numbers, norms and biases too."""
    import torch
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[str(raw["model_type"])].from_dict(copy.deepcopy(dict(raw)))
    cls = stock_class(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = cls(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=draw)
                x.copy_(1 + 0.3 * noise if x.dim() == 1 and name.endswith("weight") else 0.3 * noise)
    return model


def inputs(model: Any, batch: int = 2, length: int = 11, same: bool = False) -> dict[str, Any]:
    """Something the model takes: tokens (`same`: one token everywhere), an image, sounds."""
    import torch

    draw = torch.Generator().manual_seed(1)
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    out: dict[str, Any] = {}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "vision_config", config).image_size
        size = size if isinstance(size, (list, tuple)) else (size, size)
        out["pixel_values"] = torch.randn(batch, config.num_channels, *size, generator=draw)
    elif model.main_input_name == "input_features":
        out["input_features"] = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    else:
        ids = torch.randint(3, max(4, text.vocab_size - 1), (batch, length), generator=draw)
        out["input_ids"] = torch.full_like(ids, 5) if same else ids
        if isinstance(getattr(text, "eos_token_id", None), int) and "clip" in config.model_type:
            out["input_ids"][:, -1] = text.eos_token_id
    if "decoder_input_ids" in takes:
        out["decoder_input_ids"] = torch.randint(3, max(4, text.vocab_size - 1), (batch, 7), generator=draw)
    if "use_cache" in takes:
        out["use_cache"] = False
    return out


def places(model: Any) -> dict[str, Place]:
    """Where each tensor on disk stands in the model's memory: its entries are numbered and found again."""
    import torch

    own: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    starts: list[tuple[int, str]] = []
    at = 1
    for name, x in model.state_dict().items():
        if x.data_ptr() in seen and x.numel():
            continue
        seen.add(x.data_ptr())
        own[name] = torch.arange(at, at + x.numel(), dtype=torch.float64).reshape(x.shape)
        starts.append((at, name))
        at += x.numel()
    out = {}
    for name, x in disk_names(model, own).items():
        if not x.numel():
            continue
        first = int(x.flatten()[0])
        start, param = max(s for s in starts if s[0] <= first)
        shape = own[param].shape
        dims = []
        for k in range(x.dim()):
            line = (x.movedim(k, 0).reshape(x.shape[k], -1)[:, 0] - start).long()
            index = torch.unravel_index(line, shape) if shape else ()
            moving = [j for j, i in enumerate(index) if x.shape[k] > 1 and int(i[0]) != int(i[-1])]
            if len(moving) == 1:
                i = index[moving[0]]
                dims.append((moving[0], int(i[0]), int(i[-1]) + 1))
            elif x.dim() == len(shape):
                dims.append((k, 0, x.shape[k]))
            else:
                dims.append((-1, 0, x.shape[k]))
        out[name] = Place(param, tuple(dims))
    return out


def probe(raw: Mapping[str, Any], run: bool = True, classes: Classes | None = None) -> Probe | None:
    """Build and watch the model of a config; None where the config or the model refuses."""
    try:
        return attempt(raw, run, classes)
    except Exception:  # whatever a class raises, it is a no
        return None


def attempt(raw: Mapping[str, Any], run: bool = True, classes: Classes | None = None) -> Probe:
    """The same, and what is raised is raised.

    Args:
        raw: a tiny config.
        run: False builds the model on the meta device, for names and shapes alone.
        classes: to run beside its own.
    """
    import torch

    with quiet():
        full, _ = full_config(raw)
        if not run:
            with torch.device("meta"):
                return Probe(dict(raw), full, stored(build_meta(raw)))
        model = build(raw)
        found, saved = places(model), stored(model)
        untie(model)
        given = inputs(model)
        shapes = {name: tuple(x.shape) for name, x in given.items() if isinstance(x, torch.Tensor)}
        classes = classes or Classes()
        hosted: list[tuple[str, Guest, dict[str, Place]]] = []
        trace = watch(model, given, invited(raw, model, classes, hosted))
        heads = {name: own for name, guest, own in hosted if guest.ran}
        return Probe(dict(raw), full, saved, found, trace, model, shapes, classes, heads)


def invited(
    raw: Mapping[str, Any], main: Any, classes: Classes, hosted: list[tuple[str, Guest, dict[str, Place]]]
) -> Iterator[Guest]:
    """The models of the classes beside, with the parameters of `main` and of one another.

    One that norms what it adds is left out.

    Args:
        raw, main: the config and its model.
        classes: which.
        hosted: gets, for each, the class, the guest, and where its own tensors stand.
    """
    known = dict([*main.named_parameters(remove_duplicate=False), *main.named_buffers(remove_duplicate=False)])
    prefix = f"{main.base_model_prefix}."  # in memory; names on disk may be others
    heads = frozenset(n for n in known if not n.startswith(prefix) and any(m.startswith(prefix) for m in known))
    for one in (c for c in classes.beside if c.shows):
        try:
            model = build({**raw, "architectures": [one.name]})
            if getattr(model.config, "pad_token_id", None) is None:
                model.config.pad_token_id = 0  # a classifier looks for the last token that is none
            found, given = places(model), inputs(model)
        except Exception:  # whatever a class raises, it is a no
            continue
        mine = share(known, model, one.lead)
        normed = [n for n, module in model.named_modules() if is_norm(n, module)]
        if any(full.rpartition(".")[0] in {one.lead + n for n in normed} for full in mine):
            continue
        named = {full: own_name(one.name, full, classes.bare) for full in mine}
        known |= {full: x for full, x in mine.items() if full in classes.bare}
        guest = Guest(model, given, {named[full]: x for full, x in mine.items()}, one.lead, heads)
        own = {
            one.lead + disk: Place(named[one.lead + place.param], place.dims)
            for disk, place in found.items()
            if one.lead + disk in one.fresh and one.lead + place.param in named
        }
        hosted.append((one.name, guest, own))
        yield guest


def ends(model: Any) -> tuple[Any, Any]:
    """The modules of the head and of the embedding; None for what the model does not have."""
    found = []
    for get in (model.get_output_embeddings, model.get_input_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):
            found.append(None)
    return found[0], found[1]


def untie(model: Any) -> None:
    """Give the head a tensor of its own, so that what it reads is not taken for what the embedding writes."""
    import torch

    head, embedding = ends(model)
    own = getattr(head, "weight", None)
    if isinstance(own, torch.Tensor) and id(own) == id(getattr(embedding, "weight", None)):
        head.weight = torch.nn.Parameter(own.detach().clone())


def build_meta(raw: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[str(raw["model_type"])].from_dict(copy.deepcopy(dict(raw)))
    return stock_class(config)(config)


def stored(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of what the model's checkpoint holds; a shared tensor once."""
    seen: set[int] = set()
    own = {}
    for name, x in model.state_dict().items():
        if x.data_ptr() not in seen or x.numel() == 0:
            own[name] = x
        seen.add(x.data_ptr())
    return {name: tuple(x.shape) for name, x in disk_names(model, own).items()}


def with_layers(raw: Mapping[str, Any], full: Mapping[str, Any], name: str, value: int) -> Config:
    """`raw` with a layer count changed, and the lists that follow it."""
    out = {**raw, name: value}
    old = full.get(name) if "layer" in name else None
    for key, entries in raw.items():
        if not isinstance(entries, list) or not isinstance(old, int) or not old:
            continue
        if len(entries) == old:
            out[key] = [entries[min(i, old - 1)] for i in range(value)]
        elif (spelt := runs(entries)) and len(spelt) == old:
            out[key] = [[[spelt[min(i, old - 1)] for i in range(value)], 1]]
    return out


def runs(entries: Any) -> list[Any]:
    """What a list of [entries, times] spells; empty where it is none."""
    try:
        return [x for names, times in entries for _ in range(times) for x in names if isinstance(names, list)]
    except (TypeError, ValueError):
        return []


def changed(base: Probe, name: str, also: Sequence[str] = ()) -> Probe | None:
    """The base with one integer field changed (and the fields `also` with it) to the first value that it runs with."""
    value = base.full.get(name)
    old = value if isinstance(value, int) else 30
    near = [old + 1, old + 2, old + 3, old + 4, old + 6, old + 8, 3 * old, old - 1, old - 2]
    # Doubling and halving keep ratios whole; layers cost time.
    steps = near if "layer" in name else [2 * old, 3 * old // 2, old // 2, *near]
    for new in (n for n in dict.fromkeys(steps) if n > 0 and n != old):
        raw = {**with_layers(base.raw, base.full, name, new), **dict.fromkeys(also, new)}
        found = probe(raw, classes=base.classes)
        if found is not None and found.full.get(name) == new:
            return found
    return None


def integers(full: Mapping[str, Any]) -> list[str]:
    """Fields that may be sizes."""
    skip = ("_token_id", "_id", "_index", "num_labels", "chunk_size_feed_forward", "initializer", "transformers")
    return [
        k for k, v in full.items()
        if isinstance(v, int) and not isinstance(v, bool) and v >= 0 and not k.endswith(skip) and not k.startswith("_")
    ]  # fmt: skip
