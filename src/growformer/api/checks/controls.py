"""Rules broken on purpose, in grown folders and in literals: what no check notices, no check proves."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import ODDS, ONE, Family, NamePattern, TensorPattern, lookup
from growformer.checkpoint import RECEIPT, TensorFiles, sha256
from growformer.checkpoint.stock import full_config
from growformer.planning import Plan
from growformer.planning.plan import Block, TensorPlan

if TYPE_CHECKING:
    import torch

    from growformer.proof.floor import Layout

CLOSED_RULE = "one closed entry is filled"
WINDOW_RULE = "the window is one longer"


@dataclass(frozen=True)
class Broken:
    """A grown folder in which one rule is broken; its receipt has the right hashes."""

    rule: str
    where: str
    folder: Path


def broken_folders(family: Family, plan: Plan, out: Path, root: Path) -> Iterator[Broken]:
    """Copies of a grown folder, each with one rule broken.

    Args:
        family: as the source's config has it.
        plan: that `out` was made by.
        out: the grown folder.
        root: where to put the copies.
    """
    found = (_closed(family, plan), _factor(family, plan, gain=True), _factor(family, plan, gain=False))
    tampers = [tamper for tamper in found if tamper is not None]
    tampers += [*_swaps(family, plan, out), *_eps(family, plan), *_length(family, plan)]
    tampers += _left_behind(family, plan)
    yield from _made(tampers, out, root)


def broken_choices(family: Family, plan: Plan, out: Path, root: Path) -> Iterator[Broken]:
    """The same for a growth that had something chosen: only what that choice rests on is broken."""
    tampers = [*_rope(plan), *_barred(family, plan), *_slices(family, plan)]
    if plan.request.get("rope") is not None:
        tampers += [tamper for tamper in _swaps(family, plan, out) if "rotary" in tamper[0]]
    yield from _made(tampers, out, root)


def _made(tampers: Iterable[_Tamper], out: Path, root: Path) -> Iterator[Broken]:
    for number, (rule, where, change) in enumerate(tampers):
        yield _broken(rule, where, change, out, root / f"{out.name}-broken-{number}")


def longer_window(out: Path, root: Path) -> Broken | None:
    """A copy of a grown folder in which a token sees one place further back; None where it sees everything."""
    from growformer.proof.decoding import LONGEST, window_of
    from growformer.proof.float64 import stock_config

    found = window_of(stock_config(out))
    # A longer window is cut in both models before they are compared.
    if found is None or found[1] > LONGEST:
        return None
    name, value = found
    return _broken(WINDOW_RULE, name, _field(name, value + 1), out, root / f"{out.name}-broken-window")


def _broken(rule: str, where: str, change: Callable[[Path], None], out: Path, folder: Path) -> Broken:
    shutil.copytree(out, folder)
    change(folder)
    return Broken(rule, where, folder)


_Tamper = tuple[str, str, Callable[[Path], None]]


def _tensor(name: str, change: Callable[[torch.Tensor], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        def one(tensors: dict[str, torch.Tensor]) -> None:
            change(tensors[name])

        _rewrite(folder, one)

    return run


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a folder's tensors, all of which stand in one file, and what the receipt says of it."""
    from safetensors.torch import save_file

    with TensorFiles.open(folder) as files:
        tensors = {name: files.read(name).clone() for name in files.names}
        (path,) = files.files
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt"})
    _sign(folder, path)


def _sign(folder: Path, path: Path) -> None:
    receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    receipt["target"]["files"][path.name] = sha256(path)
    (folder / RECEIPT).write_text(json.dumps(receipt), encoding="utf-8")


def _box(block: Block) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))


def _closed(family: Family, plan: Plan) -> _Tamper | None:
    """Fill one closed entry of an old layer's weight; the row of a token may be one that no input has."""

    def order(tensor: TensorPlan) -> tuple[bool, bool, int]:
        inside = any(f"{{{axis}}}" in tensor.pattern for axis in family.layers)
        return tensor.source is None, not inside, -len(tensor.dims)

    for tensor in sorted(plan.tensors, key=order):
        block = next((b for b in tensor.blocks() if b.source is None and not b.free), None)
        if block is None or not tensor.dims:
            continue

        def fill(x: torch.Tensor, at: tuple[int, ...] = block.start) -> None:
            x[at] += 0.5

        return CLOSED_RULE, tensor.name, _tensor(tensor.name, fill)
    return None


def _factor(family: Family, plan: Plan, gain: bool) -> _Tamper | None:
    """Leave out the factor of one gain, or of one weight (softmax may not see that of a bias)."""

    def is_gain(tensor: TensorPlan) -> bool:
        pattern = _pattern(family, tensor)[1]
        return any(atom.stand == "gain" for atom in pattern.atoms())

    def factored(tensor: TensorPlan) -> list[Block]:
        return [b for b in tensor.blocks() if b.source is not None and b.factor != ONE and not any(b.shares)]

    for tensor in plan.tensors:
        blocks = factored(tensor)
        if not blocks or tensor.source is None or (not is_gain(tensor) if gain else len(tensor.dims) < 2):
            continue

        def undo(x: torch.Tensor, blocks: list[Block] = blocks, offset: int = tensor.offset) -> None:
            for block in blocks:
                x[_box(block)] = (x[_box(block)] + offset) / float(block.factor) - offset

        return f"the factor of a {'gain' if gain else 'weight'} is left out", tensor.name, _tensor(tensor.name, undo)
    return None


def _eps(family: Family, plan: Plan) -> Iterator[_Tamper]:
    """Leave an eps as it was, where it had to change."""
    for name in dict.fromkeys(norm.eps for norm in family.norms.values() if isinstance(norm.eps, str)):
        old, new = lookup(plan.source_config, name), lookup(plan.target_config, name)
        if old is None or old == new:
            continue
        yield "an eps stays as it was", name, _field(name, old)
        return


def _length(family: Family, plan: Plan) -> Iterator[_Tamper]:
    """Let the length that a norm over a sum gives grow with its axis, as if it followed from the size."""
    for norm in family.norms.values():
        told = plan.axes.get(norm.axes[0], {"old": 0, "new": 0})
        if norm.length and told["old"] != told["new"]:
            value = lookup(plan.target_config, norm.length) * math.sqrt(told["new"] / told["old"])
            yield "a length grows with its axis", norm.length, _field(norm.length, value)
            return


def _rope(plan: Plan) -> Iterator[_Tamper]:
    """Leave the rope fields as they were, where they had to change."""
    names = [name for name in ("rope_parameters", "rope_scaling", "rope_theta") if name in plan.target_config]
    if plan.request.get("rope") is None or all(
        plan.target_config[name] == plan.source_config.get(name, plan.target_config[name]) for name in names
    ):
        return

    def leave(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in names}
        kept |= {name: plan.source_config[name] for name in names if name in plan.source_config}
        path.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        _sign(folder, path)

    yield "rope parameters stay as they were", f"rope={plan.request['rope']}", leave


def _barred(family: Family, plan: Plan) -> Iterator[_Tamper]:
    """Let barred channels be chosen, all of a run of them: a group of experts is chosen by its two best."""
    prefix = _prefix(family, plan)
    for tensor in plan.tensors:
        pattern = family.find(family.full_name(tensor.name, prefix))[1]
        odds = [a for a in pattern.atoms() if a.role == ODDS and plan.axes[str(a.axis)].get("barred")]
        block = next((b for b in tensor.blocks() if b.free), None)
        if not odds or block is None or tensor.source is None:
            continue

        def let(x: torch.Tensor, at: tuple[slice, ...] = _box(block)) -> None:
            x[at] = 3.0

        yield f"new channels of {odds[0].axis} are not barred", tensor.name, _tensor(tensor.name, let)
        return


def _slices(family: Family, plan: Plan) -> Iterator[_Tamper]:
    """Of the experts that are split in one layer: a slice twice, one that counts once, a row of another's."""
    many = max(int(told.get("slices", 1)) for told in plan.axes.values())
    if family.experts is None or many == 1:
        return
    axis, prefix, copies = family.experts.axis, _prefix(family, plan), int(plan.axes[family.experts.axis]["old"])
    found = [(t, *family.find(family.full_name(t.name, prefix))) for t in plan.tensors]
    layer = next({k: v for k, v in index.items() if k != axis} for _, _, _, index in found if axis in index)
    here = [(t, at, pattern, index) for t, at, pattern, index in found if layer.items() <= index.items()]
    of = {t.name: at.format({**index, axis: copies}).removeprefix(prefix) for t, at, _, index in here if axis in index}
    first = {t.name: of[t.name] for t, _, _, index in here if index.get(axis) == 0}
    down = [t.name for t, _, _, index in here if axis in index and t.dims[0].runs[0].factor != ONE]
    rows = [t.name for t, _, p, index in here if axis not in index and p.dims[0].atom and p.dims[0].atom.axis == axis]

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({other: tensors[name].clone() for name, other in first.items()})

    def once(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensors[name] / many for name in down})

    def another(tensors: dict[str, torch.Tensor]) -> None:
        for name in rows:
            tensors[name][copies] = tensors[name][1]

    where = f"{axis} 0 and {copies} of {', '.join(f'{k} {v}' for k, v in layer.items())}"
    yield "an expert has one slice twice", where, lambda folder: _rewrite(folder, twice)
    yield "what slices give is not multiplied", ", ".join(down[:1]), lambda folder: _rewrite(folder, once)
    yield "a slice is chosen by another expert's row", ", ".join(rows), lambda folder: _rewrite(folder, another)


def _left_behind(family: Family, plan: Plan) -> Iterator[_Tamper]:
    """Leave a norm's gain, then its shift, where it stood before a new layer took it over."""
    if not any(norm.feeds for norm in family.norms.values()):
        return  # nor need the source's patterns know every tensor of the target
    prefix, seen = _prefix(family, plan), set[str]()
    for tensor in plan.tensors:
        name, pattern, index = family.find(family.full_name(tensor.name, prefix))
        for atom in pattern.atoms():
            norm = family.norms.get(atom.role or "")
            axis = norm.feeds if norm is not None else ""
            if axis not in index or atom.stand in seen or plan.layers[axis][index[axis]] is not None:
                continue
            if tensor.source is None:
                continue  # the next layer is new as well
            before = max((at for at in range(index[axis]) if plan.layers[axis][at] is not None), default=None)
            if before is None:
                continue
            seen.add(atom.stand)
            stood = name.format({axis: before}).removeprefix(prefix)

            def back(folder: Path, here: str = tensor.name, there: str = stood) -> None:
                def swap(tensors: dict[str, torch.Tensor]) -> None:
                    tensors[here], tensors[there] = tensors[there], tensors[here]

                _rewrite(folder, swap)

            yield f"a {atom.stand} is left where a new layer took it over", tensor.name, back


def _field(name: str, value: Any) -> Callable[[Path], None]:
    """Set a field of config.json; its name may have dots."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        *parents, last = name.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        _sign(folder, path)

    return change


def _swaps(family: Family, plan: Plan, out: Path) -> Iterator[_Tamper]:
    """Swap two query heads across groups, and two rotary pairs, in one layer."""
    for attention in family.attentions[:1]:
        group = attention.kv_heads is not None and attention.kv_heads != attention.heads
        heads = {attention.heads, *([attention.kv_heads] if attention.group and attention.kv_heads else [])}
        yield from _swap(
            family, plan, "two query heads change places", heads, {"q", None} if group else {"q"}, ends=True
        )
        rotary = attention.rotary
        if rotary is not None and rotary.whole:
            yield from _swap(
                family, plan, "two rotary pairs change places", {rotary.axis}, {"q", "k", None}, ends=False
            )


def _swap(
    family: Family, plan: Plan, rule: str, axes: set[str], roles: set[str | None], *, ends: bool
) -> Iterator[_Tamper]:
    """Swap the first channel of an axis with the last (or the second) in the tensors of one layer with these roles."""
    prefix = _prefix(family, plan)
    mine: list[str] = []
    layer: dict[str, int] | None = None
    for tensor in plan.tensors:
        name, pattern = _pattern(family, tensor)
        index = name.match(family.full_name(tensor.name, prefix)) or {}
        where = {axis: i for axis, i in index.items() if axis in family.layers}
        hit = any(a.axis in axes and a.role in roles for a in pattern.atoms())
        if tensor.source is None or not where or not hit or (layer is not None and where != layer):
            continue
        layer = where
        mine.append(tensor.name)
    if not mine:
        return

    def change(tensors: dict[str, torch.Tensor]) -> None:
        import torch

        from growformer.proof.floor import permuted

        layout = _layout(family, plan, tensors, prefix)
        order = {}
        for axis in axes:
            places = torch.arange(int(plan.axes[axis]["new"]))
            other = len(places) - 1 if ends else 1
            places[0], places[other] = other, 0
            order[axis] = places
        (moved,) = permuted(layout, {name: tensors[name] for name in mine}, [order])
        tensors.update(moved)

    yield rule, mine[0], lambda folder: _rewrite(folder, change)


def _pattern(family: Family, tensor: TensorPlan) -> tuple[NamePattern, TensorPattern]:
    """The pattern that a tensor is planned by; the kind of its layer in the grown model is none of the source's."""
    return next((name, pattern) for name, pattern in family.patterns if name.text == tensor.pattern)


def _prefix(family: Family, plan: Plan) -> str:
    bare = bool(family.prefix) and not any(tensor.name.startswith(family.prefix) for tensor in plan.tensors)
    return family.prefix if bare else ""


def _layout(family: Family, plan: Plan, tensors: Mapping[str, torch.Tensor], prefix: str) -> Layout:
    from growformer.proof.floor import Layout

    full = full_config(plan.target_config)[0]
    return Layout(family, full, {name: tuple(x.shape) for name, x in tensors.items()}, prefix)


_PAIR = re.compile(r"\b([A-Za-z_]\w*) ([A-Za-z_]\w*)(?=\s*[|)])")


def mislabelled(family: Family) -> Iterator[tuple[str, Family, set[str]]]:
    """Literals with one wrong pattern of the right shape.

    Args:
        family: as it is declared.

    Yields:
        (what is wrong, the literal, the axes to put in another order).
    """
    values = {attention.value: attention.key for attention in family.attentions}
    asked: dict[str, tuple[str, str, set[str]]] = {}
    # Weights first: softmax does not see what is added to every key, whatever its order.
    for name, text in sorted(family.tensors.items(), key=lambda item: item[1].lstrip().startswith("->")):
        found = _PAIR.search(text)
        if found is not None and set(found.groups()) <= set(family.axes):
            wrong = text[: found.start()] + f"{found[2]} {found[1]}" + text[found.end() :]
            asked.setdefault("a product the wrong way round", (name, wrong, set(found.groups())))
        for value, keys in values.items():
            same = next((key for key in keys if family.axes.get(key) == family.axes.get(value)), None)
            if same is not None and re.search(rf"\b{value}\b", text):
                wrong = re.sub(rf"\b{value}\b", same, text, count=1)
                asked.setdefault("two axes of one size mixed up", (name, wrong, {value, same}))
    for what, (name, wrong, axes) in asked.items():
        literal = replace(family, tensors={**family.tensors, name: wrong})
        yield f"{what}: {name}: {wrong!r}", literal, axes
