"""expand_checkpoint and verify of PEFT's adapters: a folder in, a folder out, proved before it appears."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.api.planned import family_of
from growformer.api.records import receipt_of, source_of
from growformer.checkpoint import Receipt, TensorFiles, new_folder
from growformer.checkpoint.adapters import CONFIG, WEIGHTS, is_adapter, read_adapter, write_adapter
from growformer.checkpoint.folder import copy_companions, read_config, require_new, size_text
from growformer.checkpoint.stock import full_config
from growformer.errors import RequestError, SourceError
from growformer.planning import Applier, Plan
from growformer.planning.adapters import rank_plan
from growformer.planning.cover import stored_dims
from growformer.planning.follow import Sides, follow_plan
from growformer.proof.claims import Claim, Proof

if TYPE_CHECKING:
    from growformer.algebra import Family
    from growformer.proof.adapters import Adapter, Bases

_TRAINING = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def expand_adapter(
    src: Path,
    out: Path,
    *,
    follow: Path | None = None,
    seed: int = 0,
    level: str = "auto",
    resume: bool = False,
    model_only: bool = False,
    **request: Any,
) -> tuple[Plan, Proof]:
    """Grow an adapter's folder into another that PEFT loads.

    Args:
        src: the adapter's folder.
        out: the folder to make; it must not exist.
        follow: the grown base, with its growformer.json: the adapter is grown to fit it. None: its rank grows.
        seed: of the draws.
        level: "structure" leaves out the models; "full" must run them.
        resume: forget what a killed run has left.
        model_only: leave a training state behind.
        request: `r`, and `rank_pattern` (see `rank_plan`).

    Returns:
        The plan that was run, and the proof.

    Raises:
        RequestError, SourceError: see `rank_plan` and `follow_plan`.
        TargetError: OUT exists, or the disk cannot hold it.
        ChangedError, UncheckedError: a claim failed; nothing is left behind.
    """
    from growformer.proof.adapters import Adapter, prove_follow, prove_rank

    require_new(out, src)
    state = next((name for name in _TRAINING if (src / name).is_file()), None)
    if state is not None and not model_only:
        raise RequestError(
            f"{src}: has a training state ({state}), which does not grow with a saved adapter: grow in memory "
            f"(growformer.grow(model, optimizer, r=...)), or leave it behind with --model-only"
        )
    old = Adapter(*read_adapter(src))
    base = None if follow is None else GrownBase(follow)
    made = _planned(src, old, base, seed, request)
    small = {} if base is None else base.weighing(made)
    applier = Applier(made, lambda name, rows: _rows({**small, **old.tensors}[name], rows))
    config = dict(made.target_config) | ({} if base is None else {"base_model_name_or_path": str(base.folder)})
    size = 2 * sum(8 * tensor.entries for tensor in made.tensors) + (1 << 20)
    with new_folder(out, size, resume=resume) as folder:
        write_adapter(folder, config, {tensor.name: applier.tensor(tensor.name) for tensor in made.tensors})
        copy_companions(src, folder)
        new = Adapter(*read_adapter(folder))
        if base is None:
            proof = prove_rank(old, new)
        else:
            bases, why = base.bases(level)
            proof = prove_follow(made, old, new, bases, why)
        proof.raise_if_changed()
        source = source_of(src, (src / CONFIG, src / WEIGHTS))
        receipt_of(made, source, folder, proof, stds=applier.stds).write(folder)
    return made, proof


def plan_adapter(src: Path, *, follow: Path | None = None, seed: int = 0, **request: Any) -> Plan:
    """The plan of `expand_adapter`; nothing is written."""
    from growformer.proof.adapters import Adapter

    base = None if follow is None else GrownBase(follow)
    return _planned(src, Adapter(*read_adapter(src)), base, seed, request)


def _planned(src: Path, old: Adapter, base: GrownBase | None, seed: int, request: Mapping[str, Any]) -> Plan:
    odd = sorted(set(request) - {"r", "rank_pattern"})
    if odd:
        raise RequestError(
            f"{odd[0]}: {src} holds an adapter, whose rank can grow (r=16), and which can follow a base that has grown "
            f"(--follow GROWN_BASE)"
        )
    if request and base is not None:
        raise RequestError(f"{', '.join(request)} and --follow: one after the other, each with its own proof")
    if base is not None:
        return base.follow(old, seed)
    return rank_plan(old.config, {name: tuple(x.shape) for name, x in old.tensors.items()}, seed=seed, **request)


def _rows(tensor: Any, rows: slice | None) -> Any:
    return tensor if rows is None else tensor[rows]


class GrownBase:
    """A base that growformer has grown, as its receipt tells.

    Args:
        folder: the grown base.

    Raises:
        SourceError: no receipt, or tensors of other shapes than it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if is_adapter(folder):
            raise SourceError(f"{folder}: holds an adapter; --follow takes the grown base itself")
        read_config(folder)
        self.receipt = Receipt.read(folder)
        self.plan = Plan.from_json(self.receipt.plan)
        self.family: Family = family_of(self.plan.source_config)
        with TensorFiles.open(folder) as files:
            found = {name: tuple(info.shape) for name, info in files.items()}
        odd = next((t for t in self.plan.tensors if found.get(t.name) != t.shape), None)
        if odd is not None:
            raise SourceError(
                f"{folder}: {odd.name} is {list(found.get(odd.name, ())) or 'not there'}, and {list(odd.shape)} in its "
                f"growformer.json"
            )
        full = full_config(self.plan.source_config)[0]
        tied = self.family.tied
        shares = tied is not None and (not tied.field or bool(full.get(tied.field)))
        self.tied = tied.embedding if tied is not None and shares else ""
        bare = self.family.prefix and not any(t.name.startswith(self.family.prefix) for t in self.plan.tensors)
        self.sides = sides_of(self.family, self.family.prefix if bare else "")

    def follow(self, adapter: Adapter, seed: int) -> Plan:
        """The plan under which an adapter of the small base follows."""
        shapes = {name: tuple(x.shape) for name, x in adapter.tensors.items()}
        return follow_plan(adapter.config, shapes, self.plan, self.sides, tied=self.tied, seed=seed)

    @property
    def small(self) -> Path | None:
        """The small base's folder, where the receipt names it and it is there as it was."""
        said = self.receipt.source["path"]
        if said is None or not Path(said).is_dir() or self.receipt.check_files(Path(said), "source"):
            return None
        return Path(said)

    def weighing(self, plan: Plan) -> dict[str, Any]:
        """The small base's tensors by which means of writers are weighed."""
        names = {run.weigh for tensor in plan.tensors for dim in tensor.dims for run in dim.runs if run.weigh}
        if not names:
            return {}
        if self.small is None:
            raise SourceError(f"{self.folder}: {min(names)} of the small base is needed, and {self._missing}")
        with TensorFiles.open(self.small) as files:
            return {name: files.read(name) for name in names}

    @property
    def _missing(self) -> str:
        return f"its growformer.json names {self.receipt.source['path']!r}, which is not there as it was"

    def bases(self, level: str) -> tuple[Bases | None, str]:
        """What the claim about functions needs; or None, and why there is none.

        Raises:
            SourceError: it was asked for (`level` "full") and cannot be had.
        """
        from growformer.proof.adapters import Bases
        from growformer.proof.inputs import probe_inputs

        old, new = self.plan.parameters
        need, room = 8 * 2 * (old + new), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        why = "not asked for" if level == "structure" else ""
        if not why and need > room:
            why = f"both models in float64 take {size_text(need)}, and {size_text(room)} may be used"
        small = None if why else self.small
        if not why and small is None:
            why = f"the small base is needed: {self._missing}"
        if small is None:
            if level == "full":
                raise SourceError(f"--prove full: {why}")
            return None, why
        with TensorFiles.open(small) as files:
            tensors = {name: files.read(name) for name in files}
        inputs = probe_inputs(small, batch=2, length=64, seed=0).batches
        return Bases(self.plan, tensors, self.sides, inputs), ""


def sides_of(family: Family, prefix: str = "") -> Sides:
    """Which dims of a base's weights are read and written, by the patterns of its family.

    Args:
        family: the base's.
        prefix: what patterns have before names that the base's checkpoint leaves out.
    """

    def of(name: str) -> tuple[int, int]:
        about, pattern, _ = family.find(family.full_name(name, prefix))
        stands = [{atom.stand for atom in dim.atoms()} for dim in stored_dims(about, pattern)]
        if sorted(map(sorted, stands)) != [["read"], ["write"]]:
            raise SourceError(f"{name} is no matrix that reads one dim and writes the other; it takes no adapter")
        return stands.index({"read"}), stands.index({"write"})

    return of


def verify_adapter(src: Path, out: Path, level: str) -> Proof:
    """Prove from two folders of adapters that the one is the other, grown.

    Raises:
        SourceError: a folder or the receipt cannot be read.
    """
    from growformer.proof.adapters import Adapter, prove_follow, prove_rank

    receipt = Receipt.read(out)
    changed = [f"{name} in the source" for name in receipt.check_files(src, "source")]
    changed += [f"{name} in the grown folder" for name in receipt.check_files(out, "target")]
    said = f"other than in the receipt: {', '.join(changed)}" if changed else "every hash as in the receipt"
    files = Claim("files", not changed, said, "none changed")
    old, new = Adapter(*read_adapter(src)), Adapter(*read_adapter(out))
    if receipt.method == "rank":
        proof = prove_rank(old, new)
    else:
        base = GrownBase(Path(str(new.config.get("base_model_name_or_path"))))
        bases, why = base.bases(level)
        proof = prove_follow(base.follow(old, receipt.seed), old, new, bases, why)
    return Proof((files, *proof.claims), proof.measured)
