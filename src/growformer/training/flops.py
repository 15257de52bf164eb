"""FLOPs of a training step, counted by torch itself on a model without weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from growformer.planning import Plan
from growformer.training.triggers import Size


def size_of_model(config: Mapping[str, Any], length: int) -> Size:
    """Parameters and FLOPs of a causal language model.

    One sequence goes forward and backward on the meta device, and torch's FlopCounterMode counts its matrix products
    (attention included, both triangles of it; norms, activations and the optimizer are not counted).

    Args:
        config: what config.json holds.
        length: tokens of a sequence.
    """
    try:
        return _counted(config, length, "meta", "batched_mm")
    except (RuntimeError, NotImplementedError, ValueError):
        # Experts of other classes look at their router's numbers, which a model without memory does not have.
        return _counted(config, length, "cpu", "eager")


def lift_flops(plan: Plan) -> float:
    """FLOPs of making a grown model's tensors by a learned lift once, and of going back to its matrices.

    Args:
        plan: of the growth: a mix of layers costs its products with all of them, a matrix E for a dim its products with
            the tensor. As for steps, going back counts as twice going forward.
    """
    total = 0
    for tensor in plan.tensors:
        sizes = [dim.old for dim in tensor.dims]
        mixed = [axis for axis in plan.layers if axis in plan.learned and f"{{{axis}}}" in tensor.pattern]
        total += sum(2 * int(plan.axes[axis]["old"]) * math.prod(sizes) for axis in mixed)
        for i, dim in enumerate(tensor.dims):
            if not dim.is_identity:
                total += 2 * dim.new * math.prod(sizes)
                sizes[i] = dim.new
    return 3.0 * total


def _counted(config: Mapping[str, Any], length: int, device: str, experts: str) -> Size:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    with torch.device(device):
        # Kernels whose products the counter sees on every device; with a mask nothing looks at positions' numbers.
        model = AutoModelForCausalLM.from_config(
            made, attn_implementation="eager", experts_implementation=experts, trust_remote_code=False
        ).train()
        tokens = torch.zeros((1, length), dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            given = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
            model(**given, use_cache=False).loss.backward()
    return Size(sum(x.numel() for x in model.parameters()), counter.get_total_flops() / length)
