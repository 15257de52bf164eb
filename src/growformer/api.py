"""The pieces in order: plan, expand, verify."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from growformer.algebra import Family, Field, Method
from growformer.checkpoint import (
    Receipt,
    TensorFiles,
    TensorSpec,
    copy_companions,
    new_folder,
    parse_size,
    read_config,
    require_growable,
    sha256,
    torch_dtype,
    write_card,
    write_config,
    write_folder,
)
from growformer.checkpoint.folder import require_new
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.errors import RequestError, SourceError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.planning import Applier, Plan, apply, make_plan
from growformer.planning.expansions import compose
from growformer.proof.claims import Claim, Proof
from growformer.proof.prove import LEVELS, Case, prove

if TYPE_CHECKING:
    import torch
    import transformers

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much is done and how much there is to do (bytes while writing, else 0 and 0)."""


@dataclass(frozen=True)
class Grown:
    """What `expand_checkpoint` did.

    Attributes:
        out: the new folder.
        plan: the plan that was run.
        proof: what was checked.
    """

    out: Path
    plan: Plan
    proof: Proof


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that serves a config.

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
            return family
    raise RequestError(f"config.json: model_type {kind!r} is no family here; there are {', '.join(FAMILIES)}")


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        RequestError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise RequestError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    return METHODS[name]


def plan(
    source: str | Path | transformers.PreTrainedModel,
    *expansions: Any,
    method: str = "paper",
    seed: int = 0,
    layers_at: Sequence[int] | None = None,
    **request: Any,
) -> Plan:
    """What a growth would do, from shapes alone; nothing is written.

    Args:
        source: a Hugging Face folder, or a model in memory.
        expansions: `MLPExpansion(4096)` and its kin, beside or instead of the request.
        method: a name from `growformer methods`.
        seed: of the draws for new entries.
        layers_at: places of the new layers in the grown model, counted from 0; None spreads them evenly.
        request: new sizes by the names of config.json: `hidden_size=1024`.

    Raises:
        RequestError: the request has no exact answer; the message names the nearest that works.
        SourceError: the folder cannot be read.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        raw = read_config(folder)
        with TensorFiles.open(folder) as files:
            for name in files:
                require_growable(files[name])
            shapes = {name: files[name].shape for name in files}
    else:
        raw = source.config.to_dict()
        raw["architectures"] = [type(source).__name__]
        shapes = {name: tuple(x.shape) for name, x in _on_disk(source).items()}
    family = family_of(raw)
    full, defaults = full_config(raw)
    asked, placed = dict(request), layers_at
    if expansions:
        steps = compose(*expansions)
        asked |= steps.fields(family, {**full, **request})
        placed = steps.layers_at(int(full[_layers_field(family)])) if layers_at is None else layers_at
    made = make_plan(family, method_named(method), raw, full, defaults, shapes, asked, seed=seed, layers_at=placed)
    full_config(made.target_config, "the grown config.json")
    return made


def _layers_field(family: Family) -> str:
    size = family.axes[family.layer]
    assert isinstance(size, Field)
    return size.name


def _on_disk(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors as its checkpoint would hold them: a shared tensor once, under its first name."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            out[name] = tensor
        seen.add(tensor.data_ptr())
    return out


def expand(model: transformers.PreTrainedModel, *expansions: Any, **request: Any) -> transformers.PreTrainedModel:
    """A larger model that computes the same function, in memory; the source is left as it is.

    Args:
        model: a stock Hugging Face model.
        expansions: see `plan`.
        request: see `plan`.

    Returns:
        A new stock model of the same class, in the same dtype, on the same device and in the same mode.

    Raises:
        RequestError: as `plan`.
    """
    made = plan(model, *expansions, **request)
    if made.dead:
        raise RequestError(f"{made.dead[0]} (a checkpoint can be grown so with expand_checkpoint(allow_dead=True))")
    state = apply(made, {name: x.detach().cpu() for name, x in _on_disk(model).items()})
    grown, report = type(model).from_pretrained(
        None,
        config=type(model.config).from_dict(dict(made.target_config)),
        state_dict=state,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        output_loading_info=True,
    )
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise SourceError(f"the grown tensors do not fit {type(model).__name__}: {', '.join(map(str, wrong[:4]))}")
    grown.growformer_plan = made
    return grown.to(model.device).train(model.training)


def expand_checkpoint(
    src: str | Path,
    out: str | Path,
    *expansions: Any,
    method: str = "paper",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
    layers_at: Sequence[int] | None = None,
    prove_level: str = "auto",
    allow_dead: bool = False,
    progress: Progress = lambda what, done, total: None,
    **request: Any,
) -> Grown:
    """Grow a Hugging Face folder into another that stock `from_pretrained` loads, and prove it.

    The new folder appears whole, proved, or not at all.

    Args:
        src: the source's folder.
        out: the folder to make; it must not exist.
        expansions: see `plan`.
        method: see `plan`.
        seed: see `plan`.
        dtype: storage dtype of the result (float32, float64, bfloat16, float16); None keeps the source's.
        max_shard_size: bytes of one file, such as "5GB".
        layers_at: see `plan`.
        prove_level: "structure", "full", or "auto": full where both models fit in memory.
        allow_dead: go on where the plan names entries that can never learn.
        progress: told what is being done.
        request: see `plan`.

    Raises:
        RequestError: as `plan`, or the plan names dead entries.
        TargetError: OUT exists, or the disk cannot hold it.
        ChangedError: a claim failed; nothing is left behind.
    """
    src, out = Path(src), Path(out)
    if prove_level not in LEVELS:
        raise RequestError(f"prove={prove_level!r} is unknown; there are {', '.join(LEVELS)}")
    storage, shard = _storage(dtype), parse_size(max_shard_size)
    require_new(out, src)
    made = plan(src, *expansions, method=method, seed=seed, layers_at=layers_at, **request)
    if made.dead and not allow_dead:
        raise RequestError(f"{made.dead[0]}; --allow-dead goes on all the same")
    with TensorFiles.open(src) as files:
        specs = [TensorSpec(t.name, _stored_as(files, t.source or t.fill.like, storage), t.shape) for t in made.tensors]
        total = sum(spec.nbytes for spec in specs)
        config = dict(made.target_config)
        if storage is not None:
            config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}
        _require_stock(family_of(config), config, specs)
        with new_folder(out, total + (64 << 20)) as folder:
            applier = Applier(made, files.read, None if storage is None else torch_dtype(storage))
            done = 0

            def wrote(count: int) -> None:
                nonlocal done
                done += count
                progress("write", done, total)

            write_folder(folder, specs, lambda spec: applier.rows(made.by_name[spec.name]), shard, wrote)
            _require_finite(src, applier.stds)
            write_config(folder, config)
            copy_companions(src, folder)
            case = Case(family_of(config), made, src, folder, full_config(made.source_config)[0], config)
            proof = prove(case, prove_level, lambda what: progress(what, 0, 0))
            proof.raise_if_changed()
            card = src / "README.md"
            write_card(
                folder,
                card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None,
                str(src.absolute()),  # a relative path of two parts would pass for a name on the Hub
                {"request": made.request, "proof": proof.markdown(), "method": made.method, "seed": seed}
                | {"dtype": dtype, "growformer": _version("growformer"), "dead": made.dead},
            )
            _receipt(src, folder, files, made, proof, dtype, applier.stds).write(folder)
    return Grown(out, made, proof)


def _require_stock(family: Family, config: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    """Refuse, before a byte is written, tensors that are not those of the stock model that the grown config means."""
    # A backbone's checkpoint may leave the prefix out and name the whole model's class all the same.
    found = stock_tensors(config, "the grown config.json")
    stock = {name.removeprefix(family.prefix): shape for name, shape in found.items()}
    planned = {spec.name.removeprefix(family.prefix): spec.shape for spec in specs}
    odd = [name for name, shape in planned.items() if stock.get(name) != shape]
    tied = {name for name in stock if stock[name] in planned.values()} if config.get("tie_word_embeddings") else set()
    odd += [name for name in stock if name not in planned and name not in tied]
    if odd:
        raise SourceError(
            f"tensor {odd[0]!r} is {list(planned.get(odd[0], ())) or 'missing'} in the plan and "
            f"{list(stock.get(odd[0], ())) or 'missing'} in the stock model of the grown config.json"
        )


def _require_finite(src: Path, figures: Mapping[str, float]) -> None:
    odd = [name for name, figure in figures.items() if not math.isfinite(figure)]
    if odd:
        raise SourceError(f"{src}: tensor {odd[0]!r} holds infinite numbers or NaN: it has no function to keep")


def _storage(dtype: str | None) -> str | None:
    names = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
    if dtype is not None and dtype not in names:
        raise RequestError(f"dtype={dtype!r} is unknown; there are {', '.join(names)}")
    return None if dtype is None else names[dtype]


def _stored_as(files: TensorFiles, source: str | None, storage: str | None) -> str:
    return storage or files[source or ""].dtype


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _receipt(
    src: Path, out: Path, files: TensorFiles, made: Plan, proof: Proof, dtype: str | None, stds: Mapping[str, float]
) -> Receipt:
    packages = ("torch", "transformers", "safetensors", "numpy")
    read = [src / "config.json", *files.files]
    written = sorted(path for path in out.rglob("*") if path.is_file())
    return Receipt(
        growformer=_version("growformer"),
        versions={"python": platform.python_version()} | {name: _version(name) for name in packages},
        family=made.family,
        method=made.method,
        seed=made.seed,
        dtype=dtype,
        request=dict(made.request),
        moved=list(made.moved),
        source={"path": str(src), "files": {path.name: sha256(path) for path in read}},
        target={"files": {str(path.relative_to(out)): sha256(path) for path in written}},
        axes=dict(made.axes),
        layers=list(made.layers),
        plan=made.to_json(),
        fidelity=made.fidelity,
        dead=list(made.dead),
        stds=dict(stds),
        measured=proof.to_json(),
    )


def verify(
    source: str | Path | transformers.PreTrainedModel,
    target: str | Path | transformers.PreTrainedModel,
    *,
    level: str = "full",
    progress: Progress = lambda what, done, total: None,
) -> Proof:
    """Prove that a grown model computes its source's function.

    Nothing in the receipt is believed: hashes, lifts and plan are all checked against the two folders.

    Args:
        source: the source's folder, or the model that `expand` was given.
        target: the grown folder, with its growformer.json, or the model that `expand` returned.
        level: "structure", "full", or "auto".
        progress: told what is being checked.

    Returns:
        The proof; `proof.raise_if_changed()` raises unless every claim holds.

    Raises:
        SourceError: a folder or the receipt cannot be read.
    """
    if level not in LEVELS:
        raise RequestError(f"prove={level!r} is unknown; there are {', '.join(LEVELS)}")
    if not isinstance(source, (str, Path)) or not isinstance(target, (str, Path)):
        return _verify_models(source, target, level, progress)
    src, out = Path(source), Path(target)
    raw, config = read_config(src), read_config(out)
    receipt = Receipt.read(out)
    made = replace(Plan.from_json(receipt.plan), axes=receipt.axes, layers=tuple(receipt.layers), source_config=raw)
    family = family_of(raw)
    changed = [f"{n} in the source" for n in _changed(receipt, src, "source")]
    changed += [f"{n} in the grown folder" for n in _changed(receipt, out, "target")]
    files = Claim(
        "files",
        not changed,
        "every hash as in the receipt" if not changed else f"other than in the receipt: {', '.join(changed)}",
        "none changed",
    )
    proof = prove(Case(family, made, src, out, full_config(raw)[0], config), level, lambda what: progress(what, 0, 0))
    return Proof((files, *proof.claims), proof.measured)


def _changed(receipt: Receipt, folder: Path, which: Literal["source", "target"]) -> list[str]:
    # A card is for people, and people may edit it.
    return [name for name in receipt.check_files(folder, which) if name != "README.md"]


def _verify_models(source: Any, target: Any, level: str, progress: Progress) -> Proof:
    """Two models in memory, written down so that the same checks see what stock loading makes of them."""
    made = getattr(target, "growformer_plan", None)
    if isinstance(source, (str, Path)) or not isinstance(made, Plan):
        raise RequestError("verify takes two folders, or a model and what `expand` made of it")
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder, "source"), Path(folder, "grown")
        source.save_pretrained(src)
        target.save_pretrained(out)
        raw = read_config(src)
        case = Case(family_of(raw), replace(made, source_config=raw), src, out, full_config(raw)[0], read_config(out))
        return prove(case, level, lambda what: progress(what, 0, 0))
