"""The claim *alive*: every new entry learns within two passes, or the plan says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growformer.algebra import OUTSIDE, WILD, Atom, Dim, NamePattern, TensorPattern
from growformer.checkpoint import TensorFiles
from growformer.checkpoint.stock import full_config
from growformer.planning.cover import idle_rows, stored_dims
from growformer.planning.newness import new_entries
from growformer.planning.rotary import turned_channels
from growformer.planning.sizes import size_of
from growformer.proof.case import Case
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    import torch


def _trainable_new_entries(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """`new_entries` without those that have no gradient in any model of the family, and how many those are."""
    full = full_config(case.target_config)[0]

    masks, idle = new_entries(case.plan), 0
    rotaries = [attention.rotary for attention in case.family.attentions if attention.rotary is not None]
    turned = {r.axis: turned_channels(r, size_of(case.family.axes[r.axis], full), full) for r in rotaries}
    for name, mask in masks.items():

        def size(atom: Atom, stored: int = mask.shape[0] if mask.dim() else 1) -> int:
            if isinstance(atom.axis, int):
                return atom.axis
            return stored if atom.axis == WILD else size_of(case.family.axes[atom.axis], full)

        for start, stop in idle_rows(case.family, _pattern(case, name)[1], size, turned):
            idle += int(mask[start:stop].sum())
            mask[start:stop] = False
    return masks, idle


def alive(case: Case, measured: dict[str, Any]) -> Claim:
    """Train the target's stock model in float64 for two passes and count new entries without a gradient."""
    from growformer.proof.alive import parameter_masks, still_dead
    from growformer.proof.float64 import build64
    from growformer.proof.loss import covering_inputs
    from growformer.proof.unreached import excuse, experts_never_chosen

    learned = any(axis in case.family.axes for axis in OUTSIDE if axis != "vocab")
    new, idle = _trainable_new_entries(case)
    aside = excuse(case.plan, new, _idle_in_source(case, learned))
    model = build64(case.target)
    inputs = covering_inputs(model, learned)
    unseen = _unseen(model.config, inputs)
    for name, mask in new.items():
        for dim, part in enumerate(case_dims(case, name)):
            if part.atom is not None and part.atom.axis == "vocab" and part.atom.stand == "read":
                mask[(slice(None),) * dim + (unseen,)] = False
    masks = parameter_masks(case.target_config, new)
    never = experts_never_chosen(model, inputs)
    for name, mask in masks.items():
        mask[never.get(name.rpartition(".")[0], [])] = False
    total = sum(int(mask.sum()) for mask in masks.values())
    late = 0
    dead = still_dead(model, masks, inputs)
    if any(bool(mask.any()) for mask in dead.values()) and _third_pass(case):
        before = sum(int(mask.sum()) for mask in dead.values())
        dead = still_dead(model, masks, inputs, passes=3)
        late = before - sum(int(mask.sum()) for mask in dead.values())
    named = {name: int(n) for name, n in _on_disk(model, dead).items() if n}
    measured["alive"] = {
        "new_entries": total,
        "dead": named,
        "third_pass": late,
        "idle": idle,
        "idle_in_source": aside,
        "experts_never_chosen": never,
        "tokens": int((~unseen).sum()),
    }
    found = f"{total - sum(named.values()) - late:,} of {total:,} new entries within two passes"
    if late:
        found += f" and {late:,} in the third (gains of norms whose input starts closed)"
    if idle:
        found += f" ({idle:,} key biases aside, which softmax sees in no model)"
    if aside:
        found += (
            f" ({sum(aside.values()):,} aside that extend what has no gradient in the source: {_some(list(aside))})"
        )
    if never:
        found += f" (no token chose some experts: {_some([f'{name} {which}' for name, which in never.items()])})"
    if bool(unseen.any()):
        found += f" (embeddings: {int((~unseen).sum()):,} tokens of {len(unseen):,})"
    excused = {axis.partition("@")[0] for axis, entry in case.plan.axes.items() if entry["dead"]}
    undeclared = [name for name in named if not _pattern(case, name)[1].axes() & excused]
    allowed = "all" if not excused else f"all but those the plan names dead ({', '.join(sorted(excused))})"
    detail = "dead: " + ", ".join(f"{name} ({named[name]})" for name in undeclared[:4])
    return Claim("alive", not undeclared, found, allowed, detail=detail)


def _third_pass(case: Case) -> bool:
    """Whether a norm's new gains wait for its input, which waits for what reads it, and nothing exact is open sooner.

    A head that is tied reads new columns of zero, for the stream to be closed: the last branch's new rows wait for the
    columns, and the gain of a norm behind that branch for the rows. Under one norm over all heads, a new head's query
    rows are zero and wait for its output columns, and the norm's gain for the rows. Where keys are values as well, new
    queries wait for new keys, which learn as values first, and the gains of both for the two.
    """
    grown = {axis for axis, entry in case.plan.axes.items() if entry["old"] != entry["new"]}
    if any(len(norm.axes) > 1 and grown & set(norm.axes[:-1]) for norm in case.family.norms.values()):
        return True
    if any(attention.value in attention.key and attention.value in grown for attention in case.family.attentions):
        return True
    tied = case.family.tied
    with TensorFiles.open(case.source) as files:
        stored = tied is not None and tied.head in files
    added = any(norm.output == "added" for norm in case.family.norms.values())
    return added and tied is not None and case.family.headed(case.source_full) and not stored


def _idle_in_source(case: Case, learned: bool) -> dict[str, torch.Tensor]:
    """What has no gradient in the source; its model is gone before the target's is built."""
    from growformer.proof.float64 import build64
    from growformer.proof.loss import covering_inputs
    from growformer.proof.unreached import idle_weights

    model = build64(case.source)
    return idle_weights(model, covering_inputs(model, learned))


def _on_disk(model: Any, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How many entries each mask by parameter name marks, by name on disk: patterns and people go by those."""
    from growformer.checkpoint.stock import disk_names

    return {name: x.sum() for name, x in disk_names(model, {n: m.double() for n, m in masks.items()}).items()}


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _pattern(case: Case, name: str) -> tuple[NamePattern, TensorPattern]:
    """The pattern of a tensor by its name on disk, or by the name that a class with or without a head gives it."""
    return case.grown.find(case.grown.full_name(name, case.grown.prefix))[:2]


def case_dims(case: Case, name: str) -> list[Dim]:
    """The dims of a stored tensor."""
    return stored_dims(*_pattern(case, name))


def _unseen(config: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[vocab], true at the ids that the inputs do not hold; empty where they hold none."""
    import torch

    from growformer.proof.inputs import size

    ids = [x for name, x in inputs.items() if name in ("input_ids", "decoder_input_ids")]
    vocab = int(size(config, "vocab_size")) if ids else 0
    unseen = torch.ones(vocab, dtype=torch.bool)
    for x in ids:
        unseen[x.flatten()] = False
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if isinstance(pad, int) and -vocab <= pad < vocab:
        unseen[pad] = True  # torch never gives the row of a padding token a gradient, in any model
    return unseen
