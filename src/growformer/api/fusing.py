"""fuse: two models of one family become one that is as wide as both together. It is neither of them, and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.api.folders import Progress, require_stock
from growformer.api.fused import METHOD, half_of, planned, prove_fused, require_fused_sizes
from growformer.api.models import loaded
from growformer.api.planned import family_of, on_disk
from growformer.api.records import card_of, config_stored, receipt_of, source_of, storage_named, version
from growformer.checkpoint import (
    Receipt,
    TensorFiles,
    TensorSpec,
    copy_companions,
    new_folder,
    parse_size,
    sha256,
    torch_dtype,
    write_card,
    write_config,
    write_folder,
)
from growformer.checkpoint.folder import companions, require_new
from growformer.checkpoint.hub import located
from growformer.checkpoint.stock import OWN
from growformer.errors import RequestError
from growformer.methods.copied import DEEPFUSION
from growformer.planning.fuse import Fuser, Fusion, Half, fuse_plan
from growformer.planning.plan import ALLOWED
from growformer.proof.claims import Proof
from growformer.proof.prove import LEVELS

if TYPE_CHECKING:
    import torch
    import transformers


TOKENIZERS = "both models must mean the same by every token id; OUT has the tokenizer of the first"


@dataclass(frozen=True)
class Fused:
    """What `fuse_checkpoint` did.

    Attributes:
        out: the new folder.
        fusion: the plan that was run.
        proof: what was checked, and what was measured.
        notes: what the user should know.
    """

    out: Path
    fusion: Fusion
    proof: Proof
    notes: tuple[str, ...]


def fuse(
    one: transformers.PreTrainedModel,
    other: transformers.PreTrainedModel,
    *,
    allow_change: bool = False,
    ignore_fields: Sequence[str] = (),
) -> transformers.PreTrainedModel:
    """One model of two of one family, as wide as both together, in memory; both are left as they are.

    Along every axis of width (hidden, heads, MLP) tensors stand as blocks on a diagonal, and what leaves the stream
    gives the mean of both models' logits. Norms read both streams at once, so that the result is neither model, nor
    exactly their mean, unless the two are equal: `growformer.api.fused.measure` says by how much (Deep Fusion, arXiv
    2306.11903).

    Args:
        one, other: stock models of one class, with the same vocabulary, layers and head size, and with one tokenizer:
            that is yours to know.
        allow_change: needed: the function changes.
        ignore_fields: config fields that may differ; those of `one` count.

    Returns:
        A new stock model of the same class, in the dtype, on the device and in the mode of `one`.

    Raises:
        RequestError: the two cannot be fused; the message names the field or the tensor, with both values.
    """
    fusion = fuse_plan(_half("the first model", one), _half("the second model", other), DEEPFUSION, ignore_fields)
    fusion.one.require_allowed(dead=False, change=allow_change, say=ALLOWED)
    if one.dtype != other.dtype:
        raise RequestError(f"the first model is in {one.dtype} and the second in {other.dtype}; convert one of them")
    states = [{name: x.detach().cpu() for name, x in on_disk(model).items()} for model in (one, other)]
    fuser = Fuser(fusion, *(_reader(state) for state in states))
    fuser.require_alike()
    require_fused_sizes(fusion)
    config = type(one.config).from_dict(dict(fusion.target_config))
    made = loaded(type(one), config, {t.name: fuser.tensor(t.name) for t in fusion.one.tensors}, one)
    made.growformer_fusion = fusion
    return made.to(one.device).train(one.training)


def fuse_checkpoint(
    one: str | Path,
    other: str | Path,
    out: str | Path,
    *,
    allow_change: bool = False,
    ignore_fields: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
    prove_level: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> Fused:
    """Fuse two Hugging Face folders into a third that stock `from_pretrained` loads.

    The new folder appears whole, its blocks checked and its difference measured, or not at all.

    Args:
        one, other: folders or Hub ids; see `fuse`.
        out: the folder to make; it must not exist.
        allow_change: needed: the function changes; the proof says by how much.
        ignore_fields: see `fuse`.
        dtype: storage dtype of the result; None keeps the models', which must be the same.
        max_shard_size: bytes of one file, such as "5GB".
        prove_level: "structure" leaves the models out; "full" must run them; "auto": where they fit in memory.
        progress: told what is being done.

    Raises:
        RequestError: as `fuse`.
        TargetError: OUT exists, or the disk cannot hold it.
        ChangedError, UncheckedError: a claim failed; nothing is left behind.
    """
    folders, out = (located(one), located(other)), Path(out)
    if prove_level not in LEVELS:
        raise RequestError(f"prove={prove_level!r} is unknown; there are {', '.join(LEVELS)}")
    storage, shard = storage_named(dtype), parse_size(max_shard_size)
    for folder in folders:
        require_new(out, folder)
    with ExitStack() as opened:
        files = [opened.enter_context(TensorFiles.open(folder)) for folder in folders]
        fusion = planned(folders, files, ignore_fields)
        say = ("--allow-dead goes on all the same", "--allow-change goes on all the same")
        fusion.one.require_allowed(dead=False, change=allow_change, say=say)
        specs = [TensorSpec(t.name, storage or _dtype(t.name, fusion, files), t.shape) for t in fusion.one.tensors]
        config = config_stored(fusion.target_config, dtype)
        require_stock(family_of(config), config, specs)
        fuser = Fuser(fusion, files[0].read, files[1].read, dtype=None if storage is None else torch_dtype(storage))
        fuser.require_alike()
        total = sum(spec.nbytes for spec in specs)
        with new_folder(out, total + (64 << 20)) as made:
            progress("write", 0, total)
            write_folder(made, specs, lambda spec: fuser.rows(spec.name), shard)
            write_config(made, config)
            copy_companions(folders[0], made)
            proof = prove_fused(folders, files, made, fusion, prove_level, progress)
            proof.raise_if_changed()
            notes = (*_notes(folders), *dict.fromkeys((*fusion.one.notes, *fusion.other.notes)))
            _card(made, folders, fusion, proof, dtype, config)
            _receipt(made, folders, files, fusion, proof, dtype).write(made)
    return Fused(out, fusion, proof, notes)


def _reader(state: Mapping[str, torch.Tensor]) -> Any:
    return lambda name, rows: state[name] if rows is None else state[name][rows]


def _half(label: str, model: transformers.PreTrainedModel) -> Half:
    from growformer.checkpoint.layout import disk_shapes

    return half_of(label, model.config.to_dict() | {"architectures": [type(model).__name__]}, disk_shapes(model))


def _dtype(name: str, fusion: Fusion, files: Sequence[TensorFiles]) -> str:
    """The storage dtype of a tensor, the same in both models."""
    plans = (fusion.one, fusion.other)
    a, b = (held[str(plan.by_name[name].source)].dtype for plan, held in zip(plans, files, strict=True))
    if a != b:
        raise RequestError(f"{name} is stored as {a} in the first model and as {b} in the second; say --dtype")
    return a


def _notes(folders: Sequence[Path]) -> tuple[str, ...]:
    """That there is one tokenizer, and whether the other's files are others."""
    first, second = ({p.name: sha256(p) for p in companions(folder) if "token" in p.name} for folder in folders)
    odd = sorted(name for name in first.keys() & second.keys() if first[name] != second[name])
    return (TOKENIZERS, *([f"{', '.join(odd)} differ between the two models"] if odd else []))


def _card(
    made: Path, folders: Sequence[Path], fusion: Fusion, proof: Proof, dtype: str | None, config: Mapping[str, Any]
) -> None:
    write_card(
        made,
        card_of(folders[0]),
        str(folders[0].absolute()),
        {"request": fusion.one.request, "proof": proof.markdown(), "method": METHOD, "dtype": dtype}
        | {"growformer": version(), "changes": fusion.one.changes}
        | {"beside": str(folders[1].absolute()), "imports": OWN.get(str(config.get("model_type")))},
    )


def _receipt(
    made: Path, folders: Sequence[Path], files: Sequence[TensorFiles], fusion: Fusion, proof: Proof, dtype: str | None
) -> Receipt:
    one, other = (
        source_of(folder, [folder / "config.json", *held.files]) for folder, held in zip(folders, files, strict=True)
    )
    said: dict[str, Any] = {"method": METHOD, "moved": [], "plan": fusion.to_json() | {"other_source": other}}
    return receipt_of(fusion.one, one, made, proof, dtype=dtype, **said)
