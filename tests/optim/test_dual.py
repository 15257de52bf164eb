"""Moments against true gradients: AdamW's m and v of a grown model are those of its source, carried by the dual."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from growformer.checkpoint.stock import full_config
from growformer.errors import SourceError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.optim.dual import grow_moments
from growformer.planning import Plan, apply, make_plan
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64_from, true_float64
from growformer.proof.prove import new_entries

CONFIG: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "attention_bias": True,
    "mlp_bias": True,
    "rms_norm_eps": 1e-3,
}
GROWTHS: dict[str, dict[str, int]] = {
    "mlp": {"intermediate_size": 17},
    "heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "head_dim": {"head_dim": 10},
    "hidden": {"hidden_size": 20},
    "layers": {"num_hidden_layers": 5},
}
GROWTHS["all"] = {name: size for request in GROWTHS.values() for name, size in request.items()} | {"hidden_size": 18}
BATCHES = 3
B1, B2 = 0.9, 0.999
WRONG = 1e-2
""""Seen": a rule that is wrong is wrong by factors, not by rounding."""


def source(tied: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A tiny Llama's config and its tensors, every one random, in float64."""
    config = LlamaConfig(**CONFIG, tie_word_embeddings=tied).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LlamaForCausalLM(LlamaConfig.from_dict(config)).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        values = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = 1 + values if "norm" in name else values
    return config, tensors


def planned(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], request: Mapping[str, int]) -> Plan:
    full, defaults = full_config(config)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    return make_plan(FAMILIES["llama"], METHODS["paper"], config, full, defaults, shapes, request)


def moments(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adam's two moments after a few batches, the weights held still: by name, float64."""
    model = build64_from(config, tensors)
    m = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    v = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for _ in range(BATCHES):
        tokens = torch.randint(0, CONFIG["vocab_size"], (3, 16), generator=generator)
        with true_float64():
            loss = model(input_ids=tokens, labels=tokens).loss
            found = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(m, found, strict=True):
            m[name].mul_(B1).add_(gradient, alpha=1 - B1)
            v[name].mul_(B2).add_(gradient.square(), alpha=1 - B2)
    return m, v


def worst(plan: Plan, found: Mapping[str, torch.Tensor], carried: Mapping[str, torch.Tensor]) -> float:
    """The largest difference at old entries, relative to the tensor's largest old entry."""
    ratios = []
    for name, new in new_entries(plan).items():
        if plan.by_name[name].source is not None:
            old = found[name][~new]
            ratios.append(float((old - carried[name][~new]).abs().max() / old.abs().max()))
    assert ratios
    return max(ratios)


@dataclass(frozen=True)
class Case:
    """One growth of the tiny Llama: its plan, and the moments of the source (m, v) and of the grown model."""

    plan: Plan
    m: dict[str, torch.Tensor]
    v: dict[str, torch.Tensor]
    grown_m: dict[str, torch.Tensor]
    grown_v: dict[str, torch.Tensor]


@cache
def source_moments(tied: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return moments(*source(tied))


@cache
def case(tied: bool, growth: str) -> Case:
    config, tensors = source(tied)
    plan = planned(config, tensors, GROWTHS[growth])
    return Case(plan, *source_moments(tied), *moments(plan.target_config, apply(plan, tensors)))


either = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@either
@pytest.mark.parametrize("growth", GROWTHS)
def test_moments_are_the_grown_models_own(growth: str, tied: bool) -> None:
    c = case(tied, growth)
    assert worst(c.plan, c.grown_m, grow_moments(c.plan, c.m, 1)) < BAR
    assert worst(c.plan, c.grown_v, grow_moments(c.plan, c.v, 2)) < BAR


@either
@pytest.mark.parametrize("growth", ["head_dim", "hidden", "all"])
def test_the_wrong_power_is_seen(growth: str, tied: bool) -> None:
    c = case(tied, growth)
    for power in (-1, 0, 2):
        assert worst(c.plan, c.grown_m, grow_moments(c.plan, c.m, power)) > WRONG
    for power in (-2, 0, 1):
        assert worst(c.plan, c.grown_v, grow_moments(c.plan, c.v, power)) > WRONG


@pytest.mark.parametrize("growth", ["heads", "head_dim"])
def test_the_wrong_place_is_seen(growth: str) -> None:
    # Old entries in front, new ones behind: right for the MLP's rows, wrong for heads and rotary pairs.
    c = case(False, growth)
    new = new_entries(c.plan)
    carried = grow_moments(c.plan, c.m, 1)
    for name, values in carried.items():
        old = values[~new[name]]
        shuffled = torch.zeros_like(values).flatten()
        shuffled[: old.numel()] = old
        carried[name] = shuffled.view(values.shape)
    assert worst(c.plan, c.grown_m, carried) > WRONG


@either
@pytest.mark.parametrize("growth", GROWTHS)
def test_new_entries_have_no_past(growth: str, tied: bool) -> None:
    config, tensors = source(tied)
    plan = planned(config, tensors, GROWTHS[growth])
    new = new_entries(plan)
    sevens = {name: torch.full_like(x, 7) for name, x in tensors.items()}
    for power in (1, 2):
        carried = grow_moments(plan, sevens, power)
        assert set(carried) == {t.name for t in plan.tensors if t.source is not None}
        assert all(torch.equal(values != 0, ~new[name]) for name, values in carried.items())
    # At power 0 each old entry arrives once, unscaled.
    for name, values in grow_moments(plan, sevens, 0).items():
        assert torch.equal(values, 7.0 * ~new[name])
        assert int((values != 0).sum()) == tensors[plan.by_name[name].source or ""].numel()


def test_dtypes_and_what_has_no_state() -> None:
    plan = planned(*source(False), GROWTHS["all"])
    name = "model.layers.1.self_attn.k_proj.weight"
    (grown,) = (t for t in plan.tensors if t.source == name)
    carried = grow_moments(plan, {name: torch.ones(grown.source_shape, dtype=torch.bfloat16)}, 1)
    assert set(carried) == {grown.name} and carried[grown.name].dtype == torch.bfloat16
    counts = grow_moments(plan, {name: torch.full(grown.source_shape, 7)}, 0)[grown.name]
    assert counts.dtype == torch.int64 and set(counts.flatten().tolist()) == {0, 7}


def test_a_state_of_another_shape_is_refused() -> None:
    plan = planned(*source(False), GROWTHS["mlp"])
    with pytest.raises(SourceError, match=r"model\.norm\.weight.*\[13\].*\[12\]"):
        grow_moments(plan, {"model.norm.weight": torch.zeros(13)}, 1)


def test_key_moments_have_the_papers_factor() -> None:
    # Keys are multiplied by sqrt(k'/k) = 2 (arXiv 2308.06103, eq. 19), so their moments are halved.
    config, tensors = source(False)
    plan = planned(config, tensors, {"head_dim": 4 * CONFIG["head_dim"]})
    name = "model.layers.0.self_attn.k_proj.weight"
    m = 1 + torch.rand_like(tensors[name])
    carried = grow_moments(plan, {name: m}, 1)[name]
    assert sorted(carried[carried != 0].tolist()) == sorted((m / 2).flatten().tolist())
