"""One tiny model of every family: inputs fit, all of it is float64, from disk as in memory, and all of it can learn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from growformer.errors import UncheckedError
from growformer.proof.alive import still_dead
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64
from growformer.proof.functional import compare_outputs, outputs64, worst
from growformer.proof.inputs import Inputs, probe_inputs
from growformer.proof.loss import covering_inputs, experts, output_loss
from growformer.proof.offload import outputs64_offloaded
from growformer.proof.unreached import experts_never_chosen, idle_weights
from tests.proof.every_model import MODELS, build, save

QUICK = ("mixtral", "gemma4_text", "gpt_neox", "bert-base", "bert-qa", "deberta_v2", "dinov2", "clip", "whisper", "t5")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]

OUTSIDE_ITS_MODULE = ("deberta_v2", "siglip")
"""Models that use a weight of a module that does not run then, so that they cannot be run module by module."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")

    class Saved(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = save(name, root / name)
            return self[name]

    return Saved()


@pytest.mark.parametrize("name", EVERY)
def test_every_output_is_finite_float64_and_repeats_exactly(name: str, folders: Mapping[str, Path]) -> None:
    probe = probe_inputs(folders[name], 4, 24, 0)
    once, twice = (outputs64(folders[name], probe.batches) for _ in range(2))
    assert {x.dtype for x in once.values()} == {torch.float64}
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in once.values())
    assert worst(compare_outputs(once, twice)).max_abs == 0


@pytest.mark.parametrize("name", EVERY)
def test_from_disk_as_in_memory(name: str, folders: Mapping[str, Path]) -> None:
    inputs: Inputs = probe_inputs(folders[name], 2, 12, 0).batches
    if name in OUTSIDE_ITS_MODULE:
        with pytest.raises(UncheckedError, match="outside the module that has it"):
            outputs64_offloaded(folders[name], inputs, memory=2000)
        return
    found = outputs64_offloaded(folders[name], inputs, memory=2000)
    assert worst(compare_outputs(outputs64(folders[name], inputs), found)).relative <= BAR


@pytest.mark.parametrize("name", ["mixtral", "bart", "gemma4_text"])
def test_renamed_fused_and_buffered_tensors_are_all_read(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """The control: whatever tensor changes on disk that is no parameter there, the outputs change with it."""
    inputs: Inputs = probe_inputs(folders[name], 4, 30, 0).batches[:1]  # enough tokens for every expert
    base = outputs64_offloaded(folders[name], inputs)
    tensors = load_file(folders[name] / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
    parameters = dict(build64(folders[name]).named_parameters())
    for key in [k for k in tensors if k not in parameters and ".layers.1." not in k]:
        # Another number each, for softmax sees no common shift.
        moved = tensors[key] + 0.1 * torch.arange(1, tensors[key].numel() + 1).view(tensors[key].shape).sin()
        save_file(tensors | {key: moved}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert worst(compare_outputs(base, outputs64_offloaded(tmp_path, inputs))).relative > BAR, key


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_of_a_random_model_can_learn(name: str, folders: Mapping[str, Path]) -> None:
    model = build64(folders[name])
    learned = any("position" in key and key.endswith("weight") and "rel" not in key for key in model.state_dict())
    inputs = covering_inputs(model, learned)
    never = experts_never_chosen(model, inputs)
    masks = {key: torch.ones(x.shape, dtype=torch.bool) for key, x in model.named_parameters()}
    for key, still in still_dead(model, masks, inputs).items():
        if key == "embeddings.mask_token":
            assert bool(still.all())  # DINOv2 uses it in its own training only
            continue
        if key.rpartition(".")[0] in never:
            still = still[[i for i in range(len(still)) if i not in never[key.rpartition(".")[0]]]]
        rows = still.flatten(1).all(1) if still.dim() > 1 else still
        assert not bool((still.flatten(1) ^ rows[:, None]).any()) if still.dim() > 1 else True, f"{key}: single entries"
        if "router" in key and never:
            continue
        # Rows that no input reaches: padding, distances and offsets that do not occur, key biases.
        special = ("embed", "shared", "relative", "k_proj.bias", "k_lin.bias", "key.bias")
        assert int(rows.sum()) == 0 or any(word in key for word in special), f"{key}: {int(rows.sum())} rows"


def test_a_weight_that_no_output_uses_is_idle_by_its_name_on_disk(folders: Mapping[str, Path]) -> None:
    model = build64(folders["vit"])
    inputs = covering_inputs(model, False)
    assert not any(bool(x.all()) for x in idle_weights(model, inputs).values())
    model.vit.layers[1].mlp.fc2.weight.data.zero_()
    model.vit.layers[1].mlp.fc1.weight.data.zero_()
    model.vit.layers[1].mlp.fc1.bias.data.zero_()
    found = {key for key, x in idle_weights(model, inputs).items() if bool(x.all())}
    parts = ("layernorm_after.weight", "layernorm_after.bias")
    parts += ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
    assert {key for key in found if key.startswith("vit.")} == {f"vit.encoder.layer.1.{part}" for part in parts}


def test_an_expert_that_no_token_chooses_is_named(folders: Mapping[str, Path]) -> None:
    model = build64(folders["qwen3_moe"])
    inputs = covering_inputs(model, False)
    assert experts(model) == [(f"model.layers.{i}.mlp.experts", 5) for i in range(2)]
    assert experts_never_chosen(model, inputs) == {}
    # A router that prefers two experts by far, whatever the token.
    norm, router = model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp.gate
    norm.weight.data.zero_()
    router.weight.data.zero_()
    chosen = experts_never_chosen(model, inputs)["model.layers.1.mlp.experts"]
    assert len(chosen) == 3, "all scores are equal, so the same two experts are taken every time"


def test_a_gelu_that_rounds_to_zero_is_no_dead_unit(folders: Mapping[str, Path]) -> None:
    model = build64(folders["bert-base"])
    inputs = covering_inputs(model, True)
    up, down = model.encoder.layer[0].intermediate.dense, model.encoder.layer[0].output.dense
    up.bias.data[3] = -1e3
    name = "encoder.layer.0.intermediate.dense.weight"
    mask = {name: torch.zeros(up.weight.shape, dtype=torch.bool)}
    mask[name][3] = True
    assert bool((torch.nn.functional.gelu(up.bias[3]) == 0).all())
    assert int(still_dead(model, mask, inputs)[name].sum()) == 0
    up.weight.data[3] = up.bias.data[3] = down.weight.data[:, 3] = 0
    assert bool(still_dead(model, mask, inputs)[name][3].all())


def test_a_unit_that_is_off_for_all_data_is_no_dead_unit(folders: Mapping[str, Path]) -> None:
    """ReLU leaks while aliveness is judged; what is closed on both sides still has no gradient."""
    model = build64(folders["opt"])
    layer = model.model.decoder.layers[0]
    layer.fc1.bias.data[3] = -1e6
    inputs = covering_inputs(model, True)
    name = "model.decoder.layers.0.fc1.weight"
    mask = {name: torch.zeros(layer.fc1.weight.shape, dtype=torch.bool)}
    mask[name][3] = True
    assert int(still_dead(model, mask, inputs)[name].sum()) == 0
    layer.fc1.weight.data[3] = layer.fc1.bias.data[3] = layer.fc2.weight.data[:, 3] = 0
    assert int(still_dead(model, mask, inputs)[name].sum()) == 24


def test_the_loss_of_a_model_without_a_head_reaches_every_channel_it_gives(folders: Mapping[str, Path]) -> None:
    model = build64(folders["bert-base"])
    loss = output_loss(covering_inputs(model, True))(model)
    loss.backward()
    assert bool((model.pooler.dense.bias.grad != 0).all())
    assert bool((model.encoder.layer[1].output.LayerNorm.bias.grad != 0).all())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", "BertForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("vit", "ViTModel"),
        ("clip", "CLIPModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_a_checkpoint_that_names_no_class_gets_that_of_its_type(name: str, expected: str) -> None:
    from growformer.checkpoint.stock import stock_class

    config: Any = build(name).config
    config.architectures = None
    assert stock_class(config) is getattr(transformers, expected)
    config.architectures = ["LlamaModel"]
    assert stock_class(config) is transformers.LlamaModel
