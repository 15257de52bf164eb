"""The certificate's rules for experts that are split: each broken alone, and the certificate names where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from breaks import config, fact, grown, norm, put, swap, times, told
from certified import Growth, failing
from stock import grow_stock

from growformer.algebra import replace
from growformer.proof.axes import read_axes
from growformer.proof.bar import BAR
from growformer.proof.facts import Facts
from growformer.proof.pullback import PulledBack

MOE = "model.layers.1.block_sparse_moe."
EXPERT = MOE + "experts.{}.{}.weight"
HALVES = {"num_local_experts": 10, "num_experts_per_tok": 4, "intermediate_size": 7}
SPLIT: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "mixtral": ("mixtral", {}, HALVES),
    "sevenths": ("mixtral", {}, {"num_local_experts": 35, "intermediate_size": 2}),
    "with all else": (
        "mixtral",
        {},
        HALVES | {"hidden_size": 36, "num_hidden_layers": 5, "num_attention_heads": 8, "head_dim": 14},
    ),
    "qwen2_moe": ("qwen2_moe", {}, {"num_experts": 10, "moe_intermediate_size": 7, "hidden_size": 35}),
    "not normalised": ("qwen2_moe", {"norm_topk_prob": False}, {"num_experts": 10, "moe_intermediate_size": 7}),
    "qwen3_moe": ("qwen3_moe", {}, {"num_experts": 12, "moe_intermediate_size": 7, "intermediate_size": 40}),
    "groups": ("deepseek_v3", {}, {"n_routed_experts": 42, "moe_intermediate_size": 1}),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split_experts_are_certified_and_pulled_back(name: str) -> None:
    growth = grown(*SPLIT[name])
    certificate = growth.certify()
    assert certificate.failures == []
    back = PulledBack(*growth.arguments(), source_full=growth.source_full)
    assert set(back.names) == set(growth.source)
    for tensor, x in growth.source.items():
        slack = torch.finfo(torch.float32).eps * float(x.abs().max())
        assert float((back.read(tensor) - x).abs().max()) <= slack
        assert torch.equal(back.read(tensor, slice(0, 1)), back.read(tensor)[:1])


def test_sevenths_are_rounded_and_halves_are_scaled() -> None:
    assert grown(*SPLIT["mixtral"]).certify().counts == {"identical": 84, "scaled": 30, "rounded": 0, "new": 0}
    assert grown(*SPLIT["sevenths"]).certify().counts == {"identical": 234, "scaled": 0, "rounded": 105, "new": 0}


def test_float64_pulls_back_to_the_bar() -> None:
    growth = grow_stock("mixtral", {}, SPLIT["sevenths"][2], dtype=torch.float64)
    back = PulledBack(*growth.arguments(), source_full=growth.source_full)
    apart = (float((back.read(n) - x).abs().max() / x.abs().max()) for n, x in growth.source.items())
    assert max(apart) <= BAR


def copy(of: str, to: str) -> Callable[[Growth], object]:
    return lambda growth: growth.target.update({to: growth.target[of].clone()})


def exchange(growth: Growth) -> None:
    """The first half of every expert behind the second, in the weights alone."""
    for name in [name for name in growth.target if ".experts." in name]:
        head, _, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        if int(number) < 5:
            other = f"{head}.experts.{int(number) + 5}.{part}"
            growth.target[name], growth.target[other] = growth.target[other], growth.target[name]


def row(growth: Growth) -> None:
    gate = growth.target[MOE + "gate.weight"]
    gate[7] = gate[3]


def pattern(name: str, text: str | None) -> Callable[[Growth], object]:
    """A family that says otherwise of a tensor, or knows one more."""

    def broken(growth: Growth) -> None:
        family = growth.family
        growth.family = replace(family, tensors={**family.tensors, name: text})

    return broken


WRONG: dict[str, tuple[Callable[[Growth], object], tuple[str, ...]]] = {
    "a slice of gate twice": (copy(EXPERT.format(1, "w1"), EXPERT.format(6, "w1")), (EXPERT.format(6, "w1"),)),
    "a slice of up twice": (copy(EXPERT.format(1, "w3"), EXPERT.format(6, "w3")), (EXPERT.format(6, "w3"),)),
    "a slice of down twice": (copy(EXPERT.format(6, "w2"), EXPERT.format(1, "w2")), (EXPERT.format(1, "w2"),)),
    "down is not multiplied": (times(EXPERT.format(2, "w2"), 0.5), (EXPERT.format(2, "w2"), "times 2.0")),
    "down of a later slice is not multiplied": (times(EXPERT.format(7, "w2"), 0.5), (EXPERT.format(7, "w2"),)),
    "gate is multiplied": (times(EXPERT.format(7, "w1"), 2.0), (EXPERT.format(7, "w1"),)),
    "one row of a slice": (swap(EXPERT.format(8, "w3"), 0, 6), (EXPERT.format(8, "w3"),)),
    "one number of a slice": (put(EXPERT.format(9, "w2"), (3, 4), 0.1), (EXPERT.format(9, "w2") + "[3, 4]",)),
    "the router's row of another expert": (row, (MOE + "gate.weight[7, 0]",)),
    "slices exchanged in the weights alone": (exchange, (".experts.", "required")),
    "slices exchanged in the receipt alone": (told("mlp", lift=[[7, 7], [7, 0]]), (".experts.", "required")),
    "the same slice twice in the receipt": (told("mlp", lift=[[7, 0], [7, 0]]), ("axis mlp", "R E")),
    "a channel twice, one R alone": (
        told("mlp", lift=[[7, 0], [1, 0, "1", None], [6, 8]]),
        ("axis mlp", "R E is 0 at old channel 7"),
    ),
    "a coefficient": (told("mlp", lift=[[7, 0], [7, 7, "4", "1/4"]]), ("axis mlp", "coefficients must be 1")),
    "no slices told": (lambda g: g.axes["mlp"].pop("slices"), ("axis mlp", "14 channels; it says 7")),
    "copies and not slices": (
        lambda g: g.axes.update(mlp={**g.axes["mlp"], "slices": 1, "new": 14}),
        ("axis mlp", "target config says 7"),
    ),
    "more slices than copies": (
        told("mlp", slices=14, new=1),
        ("axis mlp: in 14 slices", "as many copies of all experts", "found 2"),
    ),
    "slices of experts that are not copied": (
        lambda g: g.axes.update(experts={**g.axes["experts"], "lift": [[5, 0], [5, None]]}),
        ("axis mlp: in 2 slices", "found none"),
    ),
    "slices of an axis that is no expert's": (told("heads", slices=2, lift=[[4, 0], [4, None]]), ("axis heads",)),
    "slices of the experts": (told("experts", slices=2, new=5), ("axis experts: in 2 slices",)),
    "slices of the layers": (told("layer", slices=3, new=1), ("axis layer: in 3 slices",)),
    "slices that make no sense": (told("mlp", slices=True), ("axis mlp", "True slices")),
    "slices of a text": (told("mlp", slices="2"), ("axis mlp", "'2' slices")),
    "as many chosen as before": (config("num_experts_per_tok", 2), ("num_experts_per_tok", "required 4")),
    "the whole width": (config("intermediate_size", 14), ("axis mlp", "target config says 14")),
    "no experts": (fact(experts=None), ("axis mlp: in 2 slices", "no experts")),
    "a norm over the width": (norm("final", axis="mlp"), ("axis mlp: in 2 slices", "a norm reads all of them")),
    "a dense layer of the same width": (
        pattern("model.layers.{layer}.mlp.up_proj.weight", "mlp <- hidden"),
        ("axis mlp: in 2 slices", "model.layers.{layer}.mlp.up_proj.weight is no single expert's"),
    ),
    "a bias that each expert gives": (
        pattern("model.layers.{layer}.block_sparse_moe.experts.{experts}.w2.bias", "-> hidden [experts]"),
        ("axis mlp: in 2 slices", "w2.bias", "how its copies add up"),
    ),
    "down that is not summed over experts": (
        pattern("model.layers.{layer}.block_sparse_moe.experts.{experts}.w2.weight", "hidden <- mlp"),
        ("axis mlp: in 2 slices", "w2.weight", "how its copies add up"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    broken, said = WRONG[case]
    growth = grown(*SPLIT["mixtral"])
    broken(growth)
    failing(growth, *said)


def test_slices_may_stand_in_any_order_that_the_receipt_tells() -> None:
    """The control of two of the above: weights and receipt exchanged together."""
    growth = grown(*SPLIT["mixtral"])
    exchange(growth)
    told("mlp", lift=[[7, 7], [7, 0]])(growth)
    assert growth.certify().failures == []
    back = PulledBack(*growth.arguments(), source_full=growth.source_full)
    name = EXPERT.format(2, "w1")
    assert torch.equal(back.read(name), growth.source[name].double())


def test_slices_under_a_new_router_are_not_covered() -> None:
    growth = grown(*SPLIT["mixtral"])
    axes, problems = read_axes(growth.family, growth.axes, {}, growth.layers)
    assert problems == [] == Facts(growth.family, axes, tied=False).problems
    (said,) = Facts(growth.family, axes, tied=False, routed=True).problems
    assert said == "experts under a new router are whole copies; slices of them are not covered"
