"""Dense models become mixtures of experts: exact, alive, distinct; and what is broken is noticed, in structure and in
outputs."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build
from upcycled import BECOMES, Upcycled, upcycle

from growformer import expand
from growformer.api.becoming import case_of
from growformer.api.planned import family_of, on_disk
from growformer.checkpoint import read_config
from growformer.proof.bar import BAR
from growformer.proof.claim_alive import new_entries
from growformer.proof.claim_runtime import routed
from growformer.proof.float64 import build64_from, true_float64

MORE: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 36, "intermediate_size": 33, "num_hidden_layers": 5, "head_dim": 14},
    "qwen2": {"hidden_size": 36, "moe_intermediate_size": 33, "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3": {"hidden_size": 35, "moe_intermediate_size": 33, "num_hidden_layers": 4, "head_dim": 20},
}
"""Growth along other axes in the same plan."""

LAYER = "model.layers.1."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BECOMES)
def test_the_mixture_computes_what_the_dense_model_computes(kind: str, dtype: torch.dtype) -> None:
    grown = upcycle(kind, dtype)
    found = grown.certificate()
    assert found.failures == []
    assert found.counts["rounded"] == found.counts["scaled"] == 0  # every expert has the source's bits
    assert grown.difference().relative <= BAR
    pulled = grown.pulled()
    assert pulled.keys() == grown.source.keys()
    assert all(torch.equal(pulled[name], x.double()) for name, x in grown.source.items())


@pytest.mark.parametrize("kind", MORE)
def test_other_axes_grow_in_the_same_plan(kind: str) -> None:
    grown = upcycle(kind, torch.float64, **MORE[kind])
    assert grown.certificate().failures == []
    assert grown.difference().relative <= BAR


def expert(grown: Upcycled, which: int, part: str) -> torch.Tensor:
    """One tensor of an expert in the middle layer: `part` is gate, up or down."""
    w = {"gate": "w1", "up": "w3", "down": "w2"}[part]
    found = [x for name, x in grown.target.items() if name.startswith(LAYER) and f"experts.{which}.{w}." in name] or [
        x for name, x in grown.target.items() if name.startswith(LAYER) and f"experts.{which}.{part}_proj." in name
    ]
    return found[0]


def change(**fields: Any) -> Callable[[Upcycled], object]:
    return lambda grown: grown.target_config.update(fields)


def forget(*fields: str) -> Callable[[Upcycled], object]:
    return lambda grown: [grown.target_config.pop(name) for name in fields]


def shares(grown: Upcycled) -> None:
    """The copies of an expert share what reads them, as they must under the router's own copies."""
    expert(grown, 0, "down").mul_(2)
    expert(grown, 1, "down").zero_()


BROKEN: dict[str, tuple[str, Callable[[Upcycled], object], str]] = {
    "a copy altered": ("llama", lambda g: expert(g, 3, "gate")[2, 5].add_(1.0), "experts.3.w1"),
    "a copy closed": ("qwen3", lambda g: expert(g, 4, "down").zero_(), "experts.4.down_proj"),
    "copies that share": ("llama", shares, "experts.0.w2"),
    "gate and up the other way round": (
        "mistral",
        lambda g: [x.copy_(y.clone()) for x, y in [(expert(g, 1, "gate"), expert(g, 1, "up"))]],
        "experts.1.w1",
    ),
    "a shared expert that speaks": (
        "qwen2",
        lambda g: g.target[f"{LAYER}mlp.shared_expert.down_proj.weight"][3, 2].fill_(0.5),
        "shared_expert.down_proj",
    ),
    "weights that do not add up": ("qwen3", change(norm_topk_prob=False), "norm_topk_prob"),
    "weights that do not add up, by default": ("qwen2", forget("norm_topk_prob"), "norm_topk_prob"),
    "the eps of the other class": ("llama", forget("rms_norm_eps"), "rms_norm_eps"),
    "the base of the other class": ("llama", forget("rope_theta", "rope_parameters"), "rope_theta"),
    "the window of the other class": ("mistral", forget("sliding_window"), "sliding_window"),
    "the head of the other class": ("mistral", forget("head_dim"), "axis key"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_noticed(what: str) -> None:
    kind, breaks, says = BROKEN[what]
    grown = upcycle(kind)
    breaks(grown)
    failures = grown.certificate().failures
    assert any(says in failure for failure in failures), failures
    if what != "the head of the other class":  # which no longer fits the weights
        assert grown.difference().relative > 1e6 * BAR


LIES: dict[str, tuple[str, Callable[[Upcycled], object], str]] = {
    "no router": ("llama", lambda g: g.target.pop(f"{LAYER}block_sparse_moe.gate.weight"), "gate.weight: missing"),
    "an expert less": (
        "llama",
        lambda g: [g.target.pop(name) for name in list(g.target) if ".experts.4." in name],
        "experts.4",
    ),
    "more chosen than there are": ("llama", change(num_experts_per_tok=6), "1 to 5"),
    "none chosen": ("llama", change(num_experts_per_tok=0), "1 to 5"),
    "a layer without experts": ("qwen3", change(mlp_only_layers=[1]), "mlp_only_layers"),
    "every other layer": ("qwen3", change(decoder_sparse_step=2), "decoder_sparse_step"),
    "another family": ("llama", change(model_type="llama"), "model_type"),
    "another class": ("llama", change(architectures=["MixtralModel"]), "architectures"),
    "a count that is not the config's": (
        "llama",
        lambda g: g.axes["experts"].update(new=3, lift=[[1, 0], [1, 0, "1", None], [1, 0, "1", None]]),
        "axis experts",
    ),
    "an expert from nowhere": (
        "llama",
        lambda g: g.axes["experts"].update(lift=[[1, 0], [4, None]]),
        "only whole copies",
    ),
    "a source with what the target has no place for": (
        "llama",
        lambda g: g.source_config.update(mlp_bias=True),
        "mlp_bias",
    ),
    "a source with windows in some layers": (
        "qwen3",
        lambda g: g.source_config.update(use_sliding_window=True),
        "use_sliding_window",
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_what_does_not_belong_together_is_noticed(what: str) -> None:
    kind, breaks, says = LIES[what]
    grown = upcycle(kind)
    breaks(grown)
    failures = grown.certificate().failures
    assert any(says in failure for failure in failures), failures


TOKENS = torch.randint(37, (4, 24), generator=torch.Generator().manual_seed(2))
"""Enough to reach every expert."""


def routers(model: Any) -> tuple[list[torch.Tensor], float]:
    """Gradients of a next-token loss at the routers, and the largest at the embeddings, in true float64."""
    with true_float64():
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters()}
    largest = float(found["model.embed_tokens.weight"].abs().max())
    return [x for name, x in found.items() if name.endswith("mlp.gate.weight")], largest


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_routers_learn_in_the_second_pass(kind: str) -> None:
    grown = upcycle(kind, torch.float64)
    model = build64_from(grown.target_config, grown.target)
    # While the experts are equal, what a router says changes nothing: its gradient is rounding.
    first, largest = routers(model)
    assert len(first) == 3 and max(float(x.abs().max()) for x in first) < BAR * largest
    with torch.no_grad():
        for x in model.parameters():
            x.sub_(x.grad if x.grad is not None else torch.zeros_like(x), alpha=0.1)
    second, largest = routers(model)
    assert min(float(x.abs().min()) for x in second) > 1e3 * BAR * largest


def test_one_expert_a_token_leaves_the_router_dead_and_the_plan_says_so() -> None:
    grown = upcycle("llama", torch.float64, num_experts_per_tok=1)
    assert "num_experts_per_tok=2 is alive" in grown.plan.dead[0]
    assert grown.certificate().failures == []
    model = build64_from(grown.target_config, grown.target)
    for _ in range(2):
        found, largest = routers(model)
        assert max(float(x.abs().max()) for x in found) < BAR * largest
        with torch.no_grad():
            for x in model.parameters():
                x.sub_(x.grad if x.grad is not None else torch.zeros_like(x), alpha=0.1)
    assert upcycle("llama").plan.dead == ()


def test_experts_part_as_they_train() -> None:
    model = expand(build("llama"), **BECOMES["llama"]).train()
    for name, x in model.named_parameters():
        if "experts." in name:
            assert all(torch.equal(x[0], other) for other in x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    for name, x in model.named_parameters():
        if "experts." in name:
            assert all(float((a - b).abs().max()) > 1e-4 for a, b in itertools.combinations(x.detach(), 2)), name


def test_every_copy_but_the_first_is_new() -> None:
    grown = upcycle("llama")
    mask = new_entries(grown.plan)
    for name, new in mask.items():
        if ".experts." in name:
            assert bool(new.all()) == (".experts.0." not in name) and bool(new.any()) == bool(new.all())
        else:
            assert bool(new.all()) == name.endswith("block_sparse_moe.gate.weight") == bool(new.any())
    old, new_count = grown.plan.parameters
    assert old == sum(x.numel() for x in grown.source.values())
    assert new_count == sum(x.numel() for x in grown.target.values())


def test_the_floor_counts_what_routing_adds_but_not_a_growth_that_is_wrong(tmp_path: Path) -> None:
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    grown = expand(model, **BECOMES["llama"])
    grown.save_pretrained(tmp_path / "grown")
    raw, config = read_config(tmp_path / "source"), read_config(tmp_path / "grown")
    case = case_of(family_of(raw), grown.growformer_plan, tmp_path / "source", tmp_path / "grown", raw, config)
    source = {name: x.detach() for name, x in on_disk(model).items()}
    tokens = torch.randint(37, (2, 16), generator=torch.Generator().manual_seed(1))
    assert 1e-3 < routed(case, source, tokens)["logits"] < 1
    # The same plan with one expert's gate and up the other way round: another function, which makes no floor.
    gate, up = (f"{LAYER}block_sparse_moe.experts.1.{w}.weight" for w in ("w1", "w3"))
    other = {gate: case.plan.by_name[up].source, up: case.plan.by_name[gate].source}
    tensors = tuple(replace(t, source=other.get(t.name, t.source)) for t in case.plan.tensors)
    assert routed(replace(case, plan=replace(case.plan, tensors=tensors)), source, tokens) == {}
