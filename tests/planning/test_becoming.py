"""Which requests make a dense model a mixture of experts, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from upcycled import BECOMES

import growformer as gf
from growformer.algebra import NamePattern
from growformer.errors import RequestError
from growformer.families import BECOMING, FAMILIES


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    kinds = {kind: (kind, dict[str, Any]()) for kind in ("llama", "qwen2", "qwen3", "gpt2")}
    kinds |= {"biased": ("llama", {"attention_bias": True}), "windows": ("qwen3", {"use_sliding_window": True})}
    return {name: tiny.save(root / name, kind, **fields) for name, (kind, fields) in kinds.items()}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no family with experts": (
        "gpt2",
        {"model_type": "mixtral", "num_local_experts": 4},
        r"is a gpt2; no family .*llama -> mixtral",
    ),
    "another's family": (
        "llama",
        {"model_type": "qwen3_moe", "num_experts": 4},
        r"is a llama; it can become mixtral \(",
    ),
    "a field of the mixture's": (
        "llama",
        {"num_local_experts": 4},
        "unknown key num_local_experts.* model_type=mixtral",
    ),
    "how many": ("llama", {"model_type": "mixtral"}, "how many experts. Add num_local_experts=8"),
    "more chosen than there are": (
        "llama",
        {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 4},
        "num_experts_per_tok=4: .* num_local_experts=3; num_experts_per_tok=2 works",
    ),
    "more by default": (
        "qwen3",
        {"model_type": "qwen3_moe", "num_experts": 6},
        r"num_experts_per_tok=8 \(the default of qwen3_moe\)",
    ),
    "one expert": ("llama", {"model_type": "mixtral", "num_local_experts": 1}, "num_local_experts=2 works"),
    "weights that do not add up": (
        "qwen3",
        {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": False},
        "norm_topk_prob=False: the weights of a token's experts would not add up to one.*only norm_topk_prob=True",
    ),
    "the dense layers' width": (
        "qwen2",
        {"model_type": "qwen2_moe", "num_experts": 8, "intermediate_size": 40},
        "ask for moe_intermediate_size=40 or shared_expert_intermediate_size=40",
    ),
    "a narrower expert": (
        "llama",
        {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 20},
        "smaller than the source's 28",
    ),
    "the same twice": (
        "qwen3",
        {"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 8},
        "num_local_experts is asked for twice",
    ),
    "biases": (
        "biased",
        {"model_type": "mixtral", "num_local_experts": 4},
        "attention_bias=True has no place in a mixtral",
    ),
    "windows in some layers": (
        "windows",
        {"model_type": "qwen3_moe", "num_experts": 8},
        "use_sliding_window=True has no place in a qwen3_moe",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(sources: dict[str, Path], what: str) -> None:
    kind, request, says = REFUSED[what]
    with pytest.raises(RequestError, match=says):
        gf.plan(sources[kind], **request)


def test_a_field_that_only_the_target_reads_is_refused(tmp_path: Path) -> None:
    src = tiny.save(tmp_path / "src", "llama", sliding_window=7)
    with pytest.raises(RequestError, match="sliding_window=7 says nothing to llama, and would to mixtral; take it out"):
        gf.plan(src, model_type="mixtral", num_local_experts=4)


def test_what_was_suggested_is_granted(sources: dict[str, Path]) -> None:
    for request in ({"num_local_experts": 3, "num_experts_per_tok": 2}, {"num_local_experts": 2}):
        assert gf.plan(sources["llama"], model_type="mixtral", **request).source_family == "llama"


def test_the_default_of_how_many_are_chosen_is_told(sources: dict[str, Path]) -> None:
    made = gf.plan(sources["llama"], model_type="mixtral", num_local_experts=4)
    assert made.target_config["num_experts_per_tok"] == 2
    assert "num_experts_per_tok -> 2: the default of mixtral" in made.moved
    assert made.request == {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_the_source_s_own_family_is_no_change(sources: dict[str, Path]) -> None:
    made = gf.plan(sources["llama"], model_type="llama", intermediate_size=40)
    assert (made.family, made.source_family) == ("llama", "")


def test_a_plan_is_the_same_after_json(sources: dict[str, Path]) -> None:
    made = gf.plan(sources["qwen2"], **BECOMES["qwen2"])
    again = type(made).from_json(json.loads(made.dumps()))
    assert again.to_json() == made.to_json() and again.source_family == "qwen2"
    plain = gf.plan(sources["qwen2"], hidden_size=36)
    assert plain.source_family == type(made).from_json(plain.to_json()).source_family == ""


def test_a_shared_expert_may_have_any_width(sources: dict[str, Path]) -> None:
    for width in (3, 28, 99):
        made = gf.plan(sources["qwen2"], **BECOMES["qwen2"] | {"shared_expert_intermediate_size": width})
        down = made.by_name["model.layers.0.mlp.shared_expert.down_proj.weight"]
        assert down.shape == (24, width) and not any(block.free for block in down.blocks())
    told = gf.plan(sources["qwen2"], model_type="qwen2_moe", num_experts=5).moved
    assert any(line.startswith("shared_expert_intermediate_size is as intermediate_size") for line in told)


@pytest.mark.parametrize("pair", BECOMING)
def test_declarations_name_what_the_families_have(pair: tuple[str, str]) -> None:
    becoming, source, target = BECOMING[pair], FAMILIES[pair[0]], FAMILIES[pair[1]]
    both = {**target.tensors, **target.tasks}
    assert set(becoming.tensors) <= set(source.tensors)
    assert set(becoming.tensors.values()) | set(becoming.new) <= set(target.tensors)
    kept = set(source.tensors) - set(becoming.tensors) - set(source.optional)
    assert kept <= set(both)
    # Whatever of the target comes from nothing is declared to be new, but for layers without experts.
    made = {becoming.tensors.get(name, name) for name in source.tensors} | set(becoming.new)
    assert set(target.tensors) - made <= set(target.uneven)
    assert set(becoming.architectures) <= set(source.architectures)
    assert set(becoming.architectures.values()) <= set(target.architectures)
    assert target.experts is not None and target.experts.whole is not None
    for name in becoming.tensors.values():
        assert NamePattern(name).axes == ("layer", target.experts.axis)


def test_what_the_two_classes_fill_in_otherwise_is_written_out(sources: dict[str, Path], tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(sources["llama"], src)
    config = json.loads((src / "config.json").read_text())
    for name in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "architectures", "attention_bias"):
        del config[name]
    (src / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": None}))
    made = gf.plan(src, model_type="mixtral", num_local_experts=3).target_config
    assert (made["rms_norm_eps"], made["max_position_embeddings"]) == (1e-6, 2048)  # Mixtral's are 1e-5 and 131072
    assert made["rope_theta"] == made["rope_parameters"]["rope_theta"] == 5000.0  # Mixtral's is 1e6
    assert not {"attention_bias", "mlp_bias", "pretraining_tp", "architectures"} & set(made)


def test_a_backbone_without_a_head(tmp_path: Path) -> None:
    tiny.build("llama").model.save_pretrained(tmp_path)
    made = gf.plan(tmp_path, model_type="mixtral", num_local_experts=3)
    assert made.target_config["architectures"] == ["MixtralModel"]
    assert made.by_name["layers.0.block_sparse_moe.experts.2.w2.weight"].source == "layers.0.mlp.down_proj.weight"
