"""Aliveness: a growth closed on one side can learn everywhere, one closed on both sides is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from growformer.errors import UncheckedError
from growformer.proof import alive, loss
from growformer.proof.alive import covering_tokens, dead_entries, next_token_loss, parameter_masks
from growformer.proof.float64 import build64, build64_from, stock_model
from growformer.proof.loss import output_loss

VOCAB, HIDDEN, MLP, OLD_MLP, POSITIONS = 41, 12, 26, 17, 9
NEW = MLP - OLD_MLP

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_head=3, n_layer=2, n_positions=POSITIONS, n_inner=MLP,
        bos_token_id=0, eos_token_id=1,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, head_dim=4, num_local_experts=3, num_experts_per_tok=2,
    ),
}  # fmt: skip
TOKENS = covering_tokens(VOCAB, POSITIONS, seed=0)


def random_model(family: str, folder: Path) -> Any:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.1, std=0.5)
    model.save_pretrained(folder)
    return build64(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder)
    return folder


@pytest.fixture
def llama(saved: Path) -> Any:
    return build64(saved)


def close_mlp(model: Any, sides: tuple[str, ...], layer: int = 1) -> dict[str, torch.Tensor]:
    """Zero the new MLP channels of one layer in the named matrices; return the mask of its new entries."""
    masks = {}
    for side in ("gate", "up", "down"):
        name = f"model.layers.{layer}.mlp.{side}_proj.weight"
        weight = model.get_parameter(name)
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        (mask[:, OLD_MLP:] if side == "down" else mask[OLD_MLP:]).fill_(True)
        masks[name] = mask
        if side in sides:
            weight.data[mask] = 0
    return masks


@pytest.mark.parametrize("side", ["down", "up", "gate"])
def test_channels_closed_on_one_side_are_alive(llama: Any, side: str) -> None:
    masks = close_mlp(llama, (side,))
    assert dead_entries(llama, masks, TOKENS) == dict.fromkeys(masks, 0)


@pytest.mark.parametrize("sides", [("gate", "up"), ("gate", "down"), ("up", "down")], ids="+".join)
def test_channels_closed_on_two_sides_are_dead(llama: Any, sides: tuple[str, str]) -> None:
    """The gradient of each zero side is a product with the other, and the third is only reached through them."""
    masks = close_mlp(llama, sides)
    assert dead_entries(llama, masks, TOKENS) == dict.fromkeys(masks, NEW * HIDDEN)


def test_the_second_pass_is_what_opens_the_closed_side(llama: Any) -> None:
    masks = close_mlp(llama, ("down",))
    first = dead_entries(llama, masks, TOKENS, passes=1)
    by_side = {name.split(".")[-2]: count for name, count in first.items()}
    assert by_side == {"gate_proj": NEW * HIDDEN, "up_proj": NEW * HIDDEN, "down_proj": 0}


def test_a_gradient_in_any_pass_counts(llama: Any) -> None:
    names = iter(["model.norm.weight", "model.layers.0.input_layernorm.weight"])

    def one_norm_a_pass(model: torch.nn.Module) -> torch.Tensor:
        return model.get_parameter(next(names)).square().sum()

    masks = {n: torch.ones(HIDDEN, dtype=torch.bool) for n, _ in llama.named_parameters() if "norm" in n}
    found = dead_entries(llama, masks, one_norm_a_pass)
    alive_names = {name for name, count in found.items() if count == 0}
    assert alive_names == {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
    assert len(found) == 7 and set(found.values()) == {0, HIDDEN}


def test_two_closures_in_series_need_a_third_pass(llama: Any) -> None:
    """A new layer closed at o, and its queries zero as well: keys wait for the queries, which wait for o."""
    attention = llama.model.layers[1].self_attn
    attention.o_proj.weight.data.zero_()
    attention.q_proj.weight.data.zero_()
    name = "model.layers.1.self_attn.{}_proj.weight"
    masks = {name.format(x): torch.ones_like(llama.get_parameter(name.format(x)), dtype=torch.bool) for x in "qk"}
    assert dead_entries(llama, masks, TOKENS, passes=2) == {name.format("q"): 0, name.format("k"): 8 * HIDDEN}
    assert dead_entries(llama, masks, TOKENS, passes=3) == {name.format("q"): 0, name.format("k"): 0}


def test_a_new_layer_closed_at_its_outputs_is_alive(llama: Any) -> None:
    layer = llama.model.layers[1]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    masks = {n: torch.ones_like(x, dtype=torch.bool) for n, x in llama.named_parameters() if ".layers.1." in n}
    assert dead_entries(llama, masks, TOKENS) == dict.fromkeys(masks, 0)


def test_new_hidden_channels_need_gains(llama: Any) -> None:
    """The paper's Table 1 lists the new gains as zero; with a final norm that is for ever."""
    old = HIDDEN - 3
    masks, zero_gain = {}, []
    for name, x in llama.named_parameters():
        mask = torch.zeros(x.shape, dtype=torch.bool)
        if "norm" in name:
            mask[old:] = True
            zero_gain.append((x, mask))
        elif "o_proj" in name or "down_proj" in name:
            mask[old:] = True
            x.data[mask] = 0
        else:
            mask[:, old:] = True
            if "embed" in name:
                x.data[mask] = 0
        masks[name] = mask
    assert sum(dead_entries(llama, masks, TOKENS).values()) == 0
    for x, mask in zero_gain:
        x.data[mask] = 0
    found = dead_entries(llama, masks, TOKENS)
    assert found["model.norm.weight"] == 3 and found["model.embed_tokens.weight"] == 3 * VOCAB


@pytest.mark.parametrize("step", [1e-5, 1e-3, 1e-1])
def test_the_length_of_the_step_does_not_change_the_counts(
    llama: Any, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "STEP", step)
    assert sum(dead_entries(llama, close_mlp(llama, ("down",), 1), TOKENS).values()) == 0
    assert sum(dead_entries(llama, close_mlp(llama, ("gate", "up"), 2), TOKENS).values()) == 3 * NEW * HIDDEN


def test_data_that_is_cut_for_memory_gives_the_same_counts(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = close_mlp(llama, ("gate", "up"))
    masks["model.embed_tokens.weight"] = torch.ones(VOCAB, HIDDEN, dtype=torch.bool)
    whole = dead_entries(llama, masks, TOKENS)
    rows: list[int] = []

    def spy(inputs: dict[str, torch.Tensor]) -> loss.Loss:
        rows.append(len(inputs["input_ids"]))
        return output_loss(inputs)

    monkeypatch.setattr(loss, "output_loss", spy)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 2 * POSITIONS * VOCAB)
    assert dead_entries(llama, masks, TOKENS) == whole
    assert sum(rows) == len(TOKENS) and max(rows) == 2


def test_every_position_and_token_is_reached_only_by_data_that_covers_them(tmp_path: Path) -> None:
    model = random_model("gpt2", tmp_path)
    masks = {name: torch.ones_like(x, dtype=torch.bool) for name, x in model.named_parameters()}
    for name, mask in masks.items():
        if name.endswith("c_attn.bias"):  # softmax does not see a key's bias: its gradient is rounding, or zero
            mask[HIDDEN : 2 * HIDDEN] = False
    found = dead_entries(model, masks, TOKENS)
    assert found == dict.fromkeys(masks, 0)
    found = dead_entries(model, masks, TOKENS[:, :-2])
    assert found["transformer.wpe.weight"] == 2 * HIDDEN


def test_an_untied_embedding_row_that_no_data_holds_is_dead(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    model = build64_from({**config, "tie_word_embeddings": False}, tensors)
    name = "model.embed_tokens.weight"
    mask = {name: torch.ones(VOCAB, HIDDEN, dtype=torch.bool)}
    assert dead_entries(model, mask, TOKENS) == {name: 0}
    assert dead_entries(model, mask, TOKENS.clamp(max=VOCAB - 4)) == {name: 3 * HIDDEN}


def test_covering_tokens_hold_every_id_and_fill_every_position() -> None:
    for vocab, positions in [(41, 9), (5, 9), (40, 8), (7, 1)]:
        tokens = covering_tokens(vocab, positions, seed=3)
        assert tokens.shape[1] == positions and tokens.shape[0] >= 2
        assert set(tokens.flatten().tolist()) == set(range(vocab))
        assert torch.equal(tokens, covering_tokens(vocab, positions, seed=3))


def test_tied_tensors_are_counted_once_by_any_name(llama: Any) -> None:
    mask = torch.zeros(VOCAB, HIDDEN, dtype=torch.bool)
    one, other = mask.clone(), mask.clone()
    one[:, 0], other[:, 1] = True, True

    def nothing(model: torch.nn.Module) -> torch.Tensor:
        return model.get_parameter("model.norm.weight").sum()

    masks = {"lm_head.weight": one, "model.embed_tokens.weight": other}
    assert dead_entries(llama, masks, nothing) == {"model.embed_tokens.weight": 2 * VOCAB}
    assert dead_entries(llama, {"lm_head.weight": one}, TOKENS) == {"model.embed_tokens.weight": 0}


def test_the_model_comes_back_as_it_was(llama: Any) -> None:
    llama.train()
    llama.model.norm.weight.requires_grad_(False)
    llama.lm_head.weight.grad = torch.full_like(llama.lm_head.weight, 2.0)
    before = {name: x.detach().clone() for name, x in llama.named_parameters()}
    dead_entries(llama, close_mlp(llama, ()), TOKENS)
    assert all(torch.equal(x, before[name]) for name, x in llama.named_parameters())
    assert llama.training and not llama.model.norm.weight.requires_grad
    assert llama.model.layers[0].mlp.up_proj.weight.grad is None and float(llama.lm_head.weight.grad.max()) == 2


def test_masks_by_on_disk_name_reach_fused_experts(tmp_path: Path) -> None:
    model = random_model("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in tensors.items()}
    # Not all in one place: the last expert's up, the first expert's down.
    up = next(name for name in masks if name.endswith("experts.2.w3.weight"))
    down = next(name for name in masks if name.endswith("experts.0.w2.weight"))
    masks[up][OLD_MLP:] = True
    masks[down][:, OLD_MLP:] = True
    config = json.loads((tmp_path / "config.json").read_text())
    by_parameter = parameter_masks(config, masks)
    parameters = dict(model.named_parameters())
    assert set(by_parameter) < set(parameters) - set(masks), "experts are fused in memory"
    for mask_on_disk in (up, down):
        marked = tensors[mask_on_disk][masks[mask_on_disk]]
        found = torch.cat([parameters[name].detach()[mask] for name, mask in by_parameter.items()])
        assert set(marked.tolist()) <= set(found.tolist())
    assert sum(int(mask.sum()) for mask in by_parameter.values()) == 2 * NEW * HIDDEN
    assert sum(dead_entries(model, by_parameter, TOKENS).values()) == 0
    del masks["model.norm.weight"]
    with pytest.raises(UncheckedError, match=r"missing_keys: model\.norm\.weight"):
        parameter_masks(config, masks)


def test_a_mask_that_fits_nothing_and_a_loss_that_is_not_finite_are_refused(llama: Any, saved: Path) -> None:
    with pytest.raises(UncheckedError, match=r"no parameter of the model \(model\.embed_tokens"):
        dead_entries(llama, {"model.nothing": torch.ones(2, dtype=torch.bool)}, TOKENS)
    with pytest.raises(UncheckedError, match=r"shape \[2\], the tensor \[12\]"):
        dead_entries(llama, {"model.norm.weight": torch.ones(2, dtype=torch.bool)}, TOKENS)
    with pytest.raises(UncheckedError, match="inf"):
        dead_entries(llama, {}, lambda model: next_token_loss(TOKENS)(model) * torch.inf)
    narrow = stock_model(saved, dtype=torch.float32, attn_implementation="eager")[0]
    with pytest.raises(UncheckedError, match="not in float64"):
        dead_entries(narrow, {}, TOKENS)
