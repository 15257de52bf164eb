"""The claim *changed*: a method that makes another function of the model says by how much, and by how much it lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from growformer.proof.case import Case
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    import torch


def changed(case: Case, measured: dict[str, Any]) -> Claim:
    """Both models in true float64: how far their outputs are apart, and what the next token costs before and after."""
    from growformer.proof.functional import compare_outputs, outputs64, worst
    from growformer.proof.inputs import probe_inputs
    from growformer.proof.outputs import grown_axes

    probe = probe_inputs(case.source, batch=4, length=128, seed=0)
    measured["probe"] = {"kind": probe.kind, "reason": probe.reason, "inputs": probe.shapes}
    batch = probe.batches[:1]
    before, after = outputs64(case.source, batch), outputs64(case.target, batch)
    difference = worst(compare_outputs(before, after, grown_axes(case.plan.axes)))
    losses = token_cost(before, batch[0].inputs), token_cost(after, batch[0].inputs)
    measured["changed"] = {"relative": difference.relative, "loss_before": losses[0], "loss_after": losses[1]}
    cost = "" if None in losses else f", a token costs {losses[0]:.4f} -> {losses[1]:.4f} nats"
    found = f"outputs {difference.relative:.1e} apart{cost}"
    return Claim("changed", None, found, required=False, detail="; ".join(case.plan.changes), told=True)


def token_cost(outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> float | None:
    """The mean cross-entropy of the next token in nats; None where the model gives none."""
    import torch

    logits, ids = next((x for name, x in outputs.items() if name.startswith("logits")), None), inputs.get("input_ids")
    if logits is None or ids is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        return None
    if int(ids.max()) >= logits.shape[-1]:  # scores of labels, not of tokens
        return None
    wanted = ids[:, 1:].reshape(-1)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(wanted), -1).double(), wanted))
