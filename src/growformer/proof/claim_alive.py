"""The claim *alive*: every new entry learns within two passes, or the plan says why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growformer.algebra import Atom
from growformer.checkpoint.stock import full_config
from growformer.planning import Plan
from growformer.planning.build import idle_rows
from growformer.planning.sizes import size_of
from growformer.proof.case import Case
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    import torch

TOKENS = 4096
"""Tokens that aliveness is judged on at most (each row of an embedding stands for the others; rows unseen are not
counted, and the claim says how many were seen)."""


def new_entries(plan: Plan) -> dict[str, torch.Tensor]:
    """For every target tensor, which entries are new: drawn, zero, means, or copies that nobody reads yet."""
    import torch

    out = {}
    for tensor in plan.tensors:
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        for block in tensor.blocks():
            if block.source is not None and block.back is not None and not any(block.mean):
                mask[tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))] = False
        out[tensor.name] = mask
    return out


def _trainable_new_entries(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """`new_entries` without those that have no gradient in any model of the family, and how many those are."""
    full = full_config(case.target_config)[0]

    def size(atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else size_of(case.family.axes[atom.axis], full)

    masks, idle = new_entries(case.plan), 0
    for name, mask in masks.items():
        for start, stop in idle_rows(case.family, case.pattern(name), size):
            idle += int(mask[start:stop].sum())
            mask[start:stop] = False
    return masks, idle


def alive(case: Case, measured: dict[str, Any]) -> Claim:
    """Train the target's stock model in float64 for two passes and count new entries without a gradient."""
    from growformer.proof.alive import covering_tokens, dead_entries, parameter_masks
    from growformer.proof.float64 import build64

    model = build64(case.target)
    if model.get_output_embeddings() is None:
        return Claim("alive", None, "-", required=False, detail="the checkpoint has no head, so nothing to train by")
    vocab = int(case.source_full["vocab_size"])
    learned = "positions" in case.family.axes
    positions = size_of(case.family.axes["positions"], case.source_full) if learned else 128
    data = covering_tokens(vocab, positions, seed=0)
    data = data[: max(2, TOKENS // positions)]
    new, idle = _trainable_new_entries(case)
    unseen = _unseen(vocab, data)
    pad = case.source_full.get("pad_token_id")
    if isinstance(pad, int) and -vocab <= pad < vocab:
        unseen[pad] = True  # torch never gives the row of a padding token a gradient, in any model
    for name, mask in new.items():
        for dim, part in enumerate(case.pattern(name).dims):
            if part.atom is not None and part.atom.axis == "vocab" and part.atom.stand == "read":
                mask[(slice(None),) * dim + (unseen,)] = False
    masks = parameter_masks(case.target_config, new)
    dead = dead_entries(model, masks, data)
    total = sum(int(mask.sum()) for mask in masks.values())
    named = {name: n for name, n in dead.items() if n}
    measured["alive"] = {"new_entries": total, "dead": named, "idle": idle, "tokens": int((~unseen).sum())}
    found = f"{total - sum(named.values()):,} of {total:,} new entries within two passes"
    if idle:
        found += f" ({idle:,} key biases aside, which softmax sees in no model)"
    if bool(unseen.any()):
        found += f" (embeddings: {int((~unseen).sum()):,} tokens of {vocab:,})"
    excused = {axis for axis, entry in case.plan.axes.items() if entry["dead"]}
    undeclared = [name for name in named if not case.pattern(name).axes() & excused]
    allowed = "all" if not excused else f"all but those the plan names dead ({', '.join(sorted(excused))})"
    detail = "dead: " + ", ".join(f"{name} ({named[name]})" for name in undeclared[:4])
    return Claim("alive", not undeclared, found, allowed, detail=detail)


def _unseen(vocab: int, data: torch.Tensor) -> torch.Tensor:
    """[vocab], true at the ids that `data` does not hold."""
    import torch

    unseen = torch.ones(vocab, dtype=torch.bool)
    unseen[data.flatten()] = False
    return unseen
