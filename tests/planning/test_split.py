"""Which requests split experts, what moves along, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.algebra import Field, Times, replace
from growformer.api.checks.requests import Planner
from growformer.api.checks.samples import save_tiny
from growformer.checkpoint import TensorFiles
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.planning import Plan, apply, pull_back
from growformer.planning.split import inner_axes
from growformer.proof.bar import BAR

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {"moe_intermediate_size": 6}),
    "not normalised": ("deepseek_v3", {"moe_intermediate_size": 6, "norm_topk_prob": False}),
    "gpt_oss": ("gpt_oss", {}),
    "gemma4": ("gemma4_text", FAMILIES["gemma4_text"].variants[-1]),
    "llama": ("llama", {}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    made = {}
    for name, (kind, changes) in SOURCES.items():
        family = FAMILIES[kind]
        made[name] = save_tiny(family, family.architectures[0], root / name.replace(" ", "-"), "float64", changes)
    return made


SERVED: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
    "halves": (
        "mixtral",
        {"num_local_experts": 10, "num_experts_per_tok": 4, "intermediate_size": 7},
        {"num_local_experts": 10, "num_experts_per_tok": 4, "intermediate_size": 7},
    ),
    "what a token takes follows": (
        "mixtral",
        {"num_local_experts": 35, "intermediate_size": 2},
        {"num_experts_per_tok": 14},
    ),
    "beside the dense layers' width": (
        "qwen3_moe",
        {"num_experts": 12, "moe_intermediate_size": 7, "intermediate_size": 40},
        {"num_local_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 7, "intermediate_size": 40},
    ),
    "beside the shared expert's width": (
        "qwen2_moe",
        {"num_experts": 10, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 22},
        {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 22},
    ),
    "shared experts keep their width": (
        "deepseek_v3",
        {"n_routed_experts": 12, "moe_intermediate_size": 3},
        {"num_experts_per_tok": 4, "n_shared_experts": 4, "n_group": 6, "topk_group": 4},
    ),
    "shared experts may grow": (
        "deepseek_v3",
        {"n_routed_experts": 12, "moe_intermediate_size": 3, "n_shared_experts": 5, "topk_group": 4},
        {"n_shared_experts": 5},
    ),
    "copies with what follows spelled out": (
        "mixtral",
        {"num_local_experts": 10, "num_experts_per_tok": 4},
        {"intermediate_size": 14, "num_experts_per_tok": 4},
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_request_that_is_served(case: str, sources: dict[str, Path]) -> None:
    kind, request, fields = SERVED[case]
    made = gf.plan(sources[kind], **request)
    assert {name: made.target_config[name] for name in fields} == fields
    assert Plan.from_json(json.loads(made.dumps())).tensors == made.tensors
    with TensorFiles.open(sources[kind]) as files:
        source = {name: files.read(name) for name in files.names}
    back = pull_back(made, apply(made, source))
    assert set(back) == set(source)
    assert max(float((back[n] - x).abs().max() / x.abs().max()) for n, x in source.items()) <= BAR


def test_what_moves_is_said(sources: dict[str, Path]) -> None:
    made = gf.plan(sources["deepseek_v3"], n_routed_experts=12, moe_intermediate_size=3)
    assert made.moved == (
        "n_shared_experts 2 -> 4: n_shared_experts x moe_intermediate_size stays 12",
        "num_experts_per_tok 2 -> 4: every expert is split into 2",
        "n_group 3 -> 6: every expert is split into 2",
        "topk_group 2 -> 4: every expert is split into 2",
    )
    assert gf.plan(sources["mixtral"], num_local_experts=10).moved == (
        "num_experts_per_tok 2 -> 4: every expert is there 2 times",
    )


def test_what_was_asked_does_not_move(sources: dict[str, Path]) -> None:
    assert gf.plan(sources["mixtral"], num_local_experts=10, num_experts_per_tok=4, intermediate_size=7).moved == ()


def test_each_slice_of_an_expert(sources: dict[str, Path]) -> None:
    made = gf.plan(sources["mixtral"], num_local_experts=10, intermediate_size=7)
    with TensorFiles.open(sources["mixtral"]) as files:
        source = {name: files.read(name) for name in files.names}
    target = apply(made, source)
    moe, router = "model.layers.1.block_sparse_moe.", "model.layers.1.block_sparse_moe.gate.weight"
    for expert in range(5):
        for half in range(2):
            at, mine = slice(7 * half, 7 * half + 7), expert + 5 * half
            for part in ("w1", "w3"):
                old = source[f"{moe}experts.{expert}.{part}.weight"][at]
                assert torch.equal(target[f"{moe}experts.{mine}.{part}.weight"], old)
            old = source[f"{moe}experts.{expert}.w2.weight"][:, at]
            assert torch.equal(target[f"{moe}experts.{mine}.w2.weight"], 2 * old)
            assert torch.equal(target[router][mine], source[router][expert])


REFUSED: dict[str, tuple[str, dict[str, int], str]] = {
    "narrower, and not more": (
        "mixtral",
        {"intermediate_size": 7},
        r"^intermediate_size=7 is smaller than the source's 14; an expert gets narrower only where it is split .*"
        r"; num_local_experts=10 works with the rest of the request$",
    ),
    "narrower by no part": (
        "mixtral",
        {"intermediate_size": 6},
        r"intermediate_size=6 is smaller .*; intermediate_size=7, num_local_experts=10 works",
    ),
    "no equal slices": (
        "mixtral",
        {"intermediate_size": 5, "num_local_experts": 10},
        r"^intermediate_size=5 with num_local_experts=10: experts are split into equal slices, and 5 of width 14 into "
        r"m become m times 5 of width 14/m; intermediate_size=7 works with the rest of the request$",
    ),
    "slices and copies at once": (
        "mixtral",
        {"intermediate_size": 7, "num_local_experts": 20},
        r"intermediate_size=7 with num_local_experts=20: .*; num_local_experts=10 works with the rest of the request$",
    ),
    "slices and copies in sevenths": (
        "mixtral",
        {"intermediate_size": 7, "num_local_experts": 35},
        r"num_local_experts=10 or intermediate_size=2 works with the rest of the request$",
    ),
    "as many taken as before": (
        "mixtral",
        {"intermediate_size": 7, "num_local_experts": 10, "num_experts_per_tok": 2},
        r"^num_experts_per_tok=2: it follows from num_local_experts, .*; with num_local_experts=10 it is 4"
        r"; num_experts_per_tok=4 works with the rest of the request$",
    ),
    "other numbers taken of copies": (
        "mixtral",
        {"num_local_experts": 10, "num_experts_per_tok": 3},
        r"^num_experts_per_tok=3: it follows .* it is 4; num_experts_per_tok=4 works",
    ),
    "more taken, and nothing else": ("mixtral", {"num_experts_per_tok": 4}, "with num_local_experts=5 it is 2"),
    "as many taken, and nothing else": ("mixtral", {"num_experts_per_tok": 2}, "is the source's own size"),
    "too few shared experts": (
        "deepseek_v3",
        {"n_routed_experts": 12, "moe_intermediate_size": 3, "n_shared_experts": 3},
        r"^n_shared_experts=3 with moe_intermediate_size=3 makes the shared_mlp size smaller than the source's 12"
        r"; n_shared_experts=4 works",
    ),
    "weights that do not add up": (
        "not normalised",
        {"n_routed_experts": 12, "moe_intermediate_size": 3},
        r"moe_intermediate_size=3 is smaller .* exact with norm_topk_prob=True alone, and config.json says False",
    ),
    "experts in one tensor": (
        "gpt_oss",
        {"num_local_experts": 10, "intermediate_size": 7},
        r"^intermediate_size=7 is smaller .*; gpt_oss cannot split its experts, for model\.layers\.\{layer\}\.mlp\."
        r"experts\.gate_up_proj holds all experts in one tensor, .* copies of experts, of the width that they have, "
        r"are exact: num_local_experts=10 alone$",
    ),
    "experts in one tensor of gemma4": (
        "gemma4",
        {"num_experts": 10, "moe_intermediate_size": 3},
        r"gemma4_text cannot split its experts, for .*gate_up_proj holds all experts in one tensor",
    ),
    "a dense width": ("qwen3_moe", {"num_experts": 12, "intermediate_size": 14}, "growing never takes away"),
    "a dense model's width": ("llama", {"intermediate_size": 14}, "growing never takes away"),
    "a dense model's experts": ("llama", {"num_experts_per_tok": 2}, "unknown key num_experts_per_tok"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_is_refused(case: str, sources: dict[str, Path]) -> None:
    kind, request, said = REFUSED[case]
    with pytest.raises(RequestError, match=said):
        gf.plan(sources[kind], **request)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a dense layer as wide": (
        {"tensors": {"model.layers.{layer}.mlp.up_proj.weight": "mlp <- hidden"}},
        r"model\.layers\.\{layer\}\.mlp\.up_proj\.weight, which is no expert's, has that width as well",
    ),
    "a bias for each expert": (
        {"tensors": {"model.layers.{layer}.block_sparse_moe.experts.{experts}.w2.bias": "-> hidden [experts]"}},
        r"w2\.bias is more to an expert than a map from or to its inner width",
    ),
    "a field that sizes two axes": ({"axes": {"dense": Field("intermediate_size")}}, "is the size of dense too"),
    "a fixed multiple": ({"axes": {"dense": Times(2, "intermediate_size")}}, "is the size of dense too"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_family_whose_experts_share_what_would_be_sliced(case: str, sources: dict[str, Path]) -> None:
    changes, said = ODD[case]
    family = FAMILIES["mixtral"]
    odd = replace(family, **{name: {**getattr(family, name), **more} for name, more in changes.items()})
    planner = Planner(odd, sources["mixtral"])
    with pytest.raises(RequestError, match=said):
        planner.glance({"num_local_experts": 10, "intermediate_size": 7})
    Planner(family, sources["mixtral"]).glance({"num_local_experts": 10, "intermediate_size": 7})


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("mixtral", ["mlp"]),
        ("qwen3_moe", ["expert_mlp"]),
        ("qwen2_moe", ["expert_mlp"]),
        ("deepseek_v3", ["expert_mlp"]),
        ("gpt_oss", ["mlp"]),
        ("llama", []),
    ],
)
def test_what_an_expert_has_to_itself(family: str, axes: list[str]) -> None:
    assert inner_axes(FAMILIES[family]) == axes
