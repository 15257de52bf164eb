"""expand_checkpoint: a folder in, a folder out, proved before it appears."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import Family
from growformer.api.becoming import case_of
from growformer.api.planned import family_of, plan
from growformer.api.records import card_of, config_stored, receipt_of, source_of, storage_named, version
from growformer.api.streaming import fingerprint, stream, threads_of
from growformer.checkpoint import (
    TensorFiles,
    TensorSpec,
    copy_companions,
    new_folder,
    parse_size,
    torch_dtype,
    write_card,
    write_config,
)
from growformer.checkpoint.adapters import CONFIG, is_adapter
from growformer.checkpoint.folder import require_new
from growformer.checkpoint.hashing import Hashes
from growformer.checkpoint.hub import located
from growformer.checkpoint.stock import OWN, full_config, stock_tensors
from growformer.errors import GrowformerError, RequestError, SourceError
from growformer.planning import Plan
from growformer.proof.claims import Proof
from growformer.proof.prove import LEVELS, prove

if TYPE_CHECKING:
    from growformer.proof.certifier import Certifier

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much is done and how much there is to do (bytes while writing, else 0 and 0)."""


@dataclass(frozen=True)
class Grown:
    """What `expand_checkpoint` did.

    Attributes:
        out: the new folder.
        plan: the plan that was run.
        proof: what was checked.
        training: what has grown along of a training state; empty where there was none.
    """

    out: Path
    plan: Plan
    proof: Proof
    training: str = ""


def expand_checkpoint(
    src: str | Path,
    out: str | Path,
    *expansions: Any,
    method: str = "paper",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
    memory: int | str = "1GiB",
    threads: int | None = None,
    resume: bool = False,
    layers_at: Sequence[int] | None = None,
    prove_level: str = "auto",
    allow_dead: bool = False,
    allow_change: bool = False,
    model_only: bool = False,
    warmup: int = 0,
    follow: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
    **request: Any,
) -> Grown:
    """Grow a Hugging Face folder into another that stock `from_pretrained` loads, and prove it.

    The new folder appears whole, proved, or not at all.

    Args:
        src: the source's folder, or its Hub id.
        out: the folder to make; it must not exist.
        expansions: see `plan`.
        method: see `plan`.
        seed: see `plan`.
        dtype: storage dtype of the result (float32, float64, bfloat16, float16); None keeps the source's.
        max_shard_size: bytes of one file, such as "5GB".
        memory: bytes that the blocks in the making may take together, beside the interpreter itself.
        threads: how many work at once; None: one for each core.
        resume: go on with a run that was killed; the result has the same bits as an unbroken one.
        layers_at: see `plan`.
        prove_level: "structure", "full", or "auto": full where both models fit in memory.
        allow_dead: go on where the plan names entries that can never learn.
        allow_change: go on where the method makes another function of the model; the proof says by how much.
        model_only: leave behind the training state (optimizer, schedule, random states) of a checkpoint that the
            Hugging Face Trainer has saved; otherwise it grows along.
        warmup: steps over which the learning rate of new entries rises from 0, where an optimizer grows along.
        follow: where `src` is the folder of a PEFT adapter: the grown base, which it is to fit.
        progress: told what is being done.
        request: see `plan`; of an adapter, `r` and `rank_pattern`.

    Raises:
        RequestError: as `plan`, or the plan names dead entries.
        TargetError: OUT exists, or the disk cannot hold it.
        ChangedError: a claim failed; nothing is left behind.
    """
    from growformer.optim.tables import Pace  # with torch, which nobody waits for who only plans
    from growformer.training.trainer_folder import training_state

    src, out = located(src), Path(out)
    if prove_level not in LEVELS:
        raise RequestError(f"prove={prove_level!r} is unknown; there are {', '.join(LEVELS)}")
    if is_adapter(src):
        from growformer.api.adapters import expand_adapter

        asked = {"an expansion": expansions, "dtype": dtype, "layers_at": layers_at, "warmup": warmup}
        odd = [name for name, value in asked.items() if value] + (["method"] if method != "paper" else [])
        if odd:
            raise RequestError(f"{odd[0]} says nothing of an adapter, which {src} holds; its rank grows by r=16")
        base = None if follow is None else located(follow)
        kept = {"seed": seed, "level": prove_level, "resume": resume, "model_only": model_only}
        return Grown(out, *expand_adapter(src, out, follow=base, **kept, **request))  # type: ignore[arg-type]
    if follow is not None:
        raise RequestError(f"follow is for adapters of PEFT, and {src} holds none ({CONFIG})")
    storage, shard, room = storage_named(dtype), parse_size(max_shard_size), parse_size(memory)
    workers = threads_of(threads)
    require_new(out, src)
    weights = _weights(src)
    seen = fingerprint(weights)
    # Hashed beside all else from the start, for the imports alone take seconds.
    with Hashes(weights) as hashes:
        made = plan(src, *expansions, method=method, seed=seed, layers_at=layers_at, **request)
        say = ("--allow-dead goes on all the same", "--allow-change goes on all the same")
        made.require_allowed(dead=allow_dead, change=allow_change, say=say)
        made.require_closure(False, "a folder has none; growformer.expand(model, ..., closure=loss) in memory")
        training = None if model_only else training_state(src, made)
        with TensorFiles.open(src) as files, ExitStack() as opened:
            specs = [
                TensorSpec(t.name, _stored_as(files, t.source or t.fill.like, storage), t.shape) for t in made.tensors
            ]
            total = sum(spec.nbytes for spec in specs)
            config = config_stored(made.target_config, dtype)
            family = family_of(made.target_config)
            require_stock(family, config, specs)
            room_beside = (64 << 20) + (0 if training is None else training.bytes_grown)
            with new_folder(out, total + room_beside, resume=resume) as folder:
                case = case_of(family_of(made.source_config), made, src, folder, made.source_config, config)
                certifiers: list[Certifier] = []
                done = 0

                def wrote(count: int) -> None:
                    nonlocal done
                    done += count
                    progress("write", done, total)

                def look() -> Callable[[str], None]:
                    from growformer.proof.certifier import Certifier

                    certifiers.append(Certifier(**case.told(*opened.enter_context(case.open()))))
                    return certifiers[0].look

                streamed = stream(
                    made,
                    files,
                    folder,
                    specs,
                    dtype=None if storage is None else torch_dtype(storage),
                    max_shard_bytes=shard,
                    memory=room,
                    threads=workers,
                    progress=wrote,
                    before=seen,
                    look=None if made.changes else look,
                )
                _require_finite(src, streamed.figures)
                write_config(folder, config)
                copy_companions(src, folder)
                if training is not None:
                    progress("optimizer", 0, 0)
                    training.write(folder, Pace(warmup=warmup))
                certificate = certifiers[0].result(workers) if certifiers else None
                proof = prove(case, prove_level, lambda what: progress(what, 0, 0), certificate=certificate)
                proof.raise_if_changed()
                write_card(
                    folder,
                    card_of(src),
                    str(src.absolute()),  # a relative path of two parts would pass for a name on the Hub
                    {"request": made.request, "proof": proof.markdown(), "method": made.method, "seed": seed}
                    | {"dtype": dtype, "growformer": version(), "dead": made.dead}
                    | {"within_eps": made.within_eps, "changes": made.changes}
                    | {"imports": OWN.get(str(config.get("model_type")))},
                )
                known = streamed.hashes | hashes.result()
                read = [src / "config.json", *files.files, *(training.files if training is not None else ())]
                source = source_of(src, read, known)
                receipt_of(made, source, folder, proof, dtype=dtype, stds=streamed.figures, known=known).write(folder)
    return Grown(out, made, proof, "" if training is None else training.said)


def _weights(src: Path) -> list[Path]:
    """The source's files of tensors; none where they cannot be read, which planning says with its reason."""
    try:
        with TensorFiles.open(src) as files:
            return files.files
    except (GrowformerError, OSError):
        return []


def require_stock(family: Family, config: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    """Refuse, before a byte is written, tensors that are not those of the stock model that the grown config means."""
    # A backbone's checkpoint may leave the prefix out and name the whole model's class all the same.
    found = stock_tensors(config, "the grown config.json")
    stock = {name.removeprefix(family.prefix): shape for name, shape in found.items()}
    planned = {spec.name.removeprefix(family.prefix): spec.shape for spec in specs}
    odd = [name for name, shape in planned.items() if stock.get(name) != shape]
    # Configs from before the field was written leave it to its class's default.
    tied = family.tied
    ties = tied is not None and (not tied.field or full_config(config)[0].get(tied.field))
    may_lack = tied.head if tied is not None and ties else None
    odd += [name for name in stock if name not in planned and name != may_lack]
    if odd:
        raise SourceError(
            f"tensor {odd[0]!r} is {list(planned.get(odd[0], ())) or 'missing'} in the plan and "
            f"{list(stock.get(odd[0], ())) or 'missing'} in the stock model of the grown config.json"
        )


def _require_finite(src: Path, figures: Mapping[str, float]) -> None:
    odd = [name for name, figure in figures.items() if not math.isfinite(figure)]
    if odd:
        raise SourceError(f"{src}: tensor {odd[0]!r} holds infinite numbers or NaN: it has no function to keep")


def _stored_as(files: TensorFiles, source: str | None, storage: str | None) -> str:
    return storage or files[source or ""].dtype
