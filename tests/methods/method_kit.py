"""Tiny stock models grown by a method: tensors, logits and gradients in true float64, each made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

import growformer as gf
from growformer.algebra import Kind
from growformer.api.planned import on_disk
from growformer.checkpoint.layout import layout_of
from growformer.methods import METHODS
from growformer.optim.dual import box, has_past
from growformer.planning import Plan, apply
from growformer.proof.float64 import build64_from, true_float64
from tests.tiny import build

VOCAB = 37

# For each model the request of an axis, and the kinds of ways that it takes.
REQUESTS: dict[str, dict[str, tuple[dict[str, int], set[Kind]]]] = {
    "llama": {
        "mlp": ({"intermediate_size": 41}, {"mlp"}),
        "heads": ({"num_attention_heads": 12, "num_key_value_heads": 6}, {"heads"}),
        "queries": ({"num_attention_heads": 6}, {"heads"}),
        "head_dim": ({"head_dim": 16}, {"key", "value"}),
        "hidden": ({"hidden_size": 48}, {"hidden"}),
        "hidden x 3": ({"hidden_size": 72}, {"hidden"}),
        "layers": ({"num_hidden_layers": 6}, {"layer"}),
    },
    "llama-tied-bias": {
        "mlp": ({"intermediate_size": 84}, {"mlp"}),
        "heads": ({"num_attention_heads": 8, "num_key_value_heads": 4}, {"heads"}),
        "hidden": ({"hidden_size": 48}, {"hidden"}),
        "hidden x 3": ({"hidden_size": 72}, {"hidden"}),
        "width": (
            {"intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48},
            {"mlp", "heads", "hidden"},
        ),
        "layers": ({"num_hidden_layers": 6}, {"layer"}),
    },
    "gpt2": {
        "mlp": ({"n_inner": 130}, {"mlp"}),
        "width": ({"n_embd": 48, "n_head": 8}, {"heads", "hidden"}),
        "width x 3": ({"n_embd": 72, "n_head": 12}, {"heads", "hidden"}),
        "head_dim": ({"n_embd": 48}, {"key", "value", "hidden"}),
        "layers": ({"n_layer": 6}, {"layer"}),
    },
}
CASES = [(kind, method, axis) for kind in REQUESTS for method in METHODS for axis in REQUESTS[kind]]
TURNING = {("llama", "net2net", "head_dim")}
"""Copies of keys that rotary positions turn: the method knows keys, the model has none that can be copied."""
OLD_VALUES = {("llama", "zero-in", "queries")}
"""New heads that would read old values, which cannot be closed where they are written."""
DECLARED = [
    (kind, method, axis)
    for kind, method, axis in CASES
    if REQUESTS[kind][axis][1] <= set(METHODS[method].ways) and (kind, method, axis) not in TURNING | OLD_VALUES
]
"""What a method says it grows, and can on this model."""


def preserving(kind: str, method: str, axis: str) -> bool:
    """Whether the method's ways for this axis keep the function."""
    return all(METHODS[method].ways[way].preserving for way in REQUESTS[kind][axis][1])


KEPT = [case for case in DECLARED if preserving(*case)]
LEARNED = ("ligo",)
"""Methods that start as copies, and change the function once they learn on a loss."""
CHANGED = [case for case in DECLARED if not preserving(*case) and case[1] not in LEARNED]


def tokens() -> Tensor:
    """Token ids [sequence, position]."""
    return torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Model:
    """A config and tensors by their names on disk, float64."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [sequence, position, token], and the loss's gradient by name on disk."""
        model = build64_from(self.config, self.tensors)
        ids = tokens()
        with true_float64():
            out = model(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
        grads = {name: x.grad for name, x in model.named_parameters()}
        return out.logits.detach(), {disk: view.of(grads[view.name]) for disk, view in layout_of(model).views.items()}

    @property
    def logits(self) -> Tensor:
        return self.run[0]

    @property
    def gradients(self) -> dict[str, Tensor]:
        return self.run[1]


@dataclass(frozen=True)
class Grown:
    """A growth: the plan, and the models before and after."""

    plan: Plan
    before: Model
    after: Model

    @property
    def relative(self) -> float:
        """max|a-b| / max|a| over the logits of the two."""
        a, b = self.before.logits, self.after.logits
        return float((a - b).abs().max() / a.abs().max())

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor before and after."""
        return self.before.tensors[name], self.after.tensors[name]


@cache
def stock(kind: str) -> Any:
    return build(kind).double()


@cache
def source(kind: str) -> Model:
    model = stock(kind)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Model(config, {name: x.detach() for name, x in on_disk(model).items()})


def grow(kind: str, method: str, seed: int = 0, **request: int) -> Grown:
    plan = gf.plan(stock(kind), method=method, seed=seed, **request)
    before = source(kind)
    return Grown(plan, before, Model(plan.target_config, apply(plan, before.tensors)))


@cache
def grown(kind: str, method: str, axis: str) -> Grown:
    return grow(kind, method, **REQUESTS[kind][axis][0])


def sources(plan: Plan, axis: str) -> list[int | None]:
    """For each new channel of an axis the old one that it is, or is a copy of."""
    out: list[int | None] = []
    for count, old, *_ in plan.axes[axis]["lift"]:
        out += [None if old is None else old + i for i in range(count)]
    return out


def past(plan: Plan, name: str) -> Tensor:
    """Which entries of a target tensor continue what an optimizer knows of the source."""
    mask = torch.zeros(plan.by_name[name].shape, dtype=torch.bool)
    for block in plan.by_name[name].blocks():
        mask[box(block)] = has_past(block)
    return mask
