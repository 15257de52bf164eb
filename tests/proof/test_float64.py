"""True float64: models that compute the same function agree to 1e-12, and what is not float64 is never passed off."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from growformer.errors import SourceError, UncheckedError
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64, build64_from, stock_config, stock_model, true_float64

TOKENS = torch.tensor([[5, 17, 2, 40, 33, 8, 21], [1, 39, 39, 0, 12, 30, 7]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=41, hidden_size=12, intermediate_size=26, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, rms_norm_eps=1e-3, rope_theta=700.0,
        attention_bias=True, mlp_bias=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=41, n_embd=12, n_head=3, n_layer=2, n_positions=10, n_inner=26, bos_token_id=0, eos_token_id=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        vocab_size=41, hidden_size=12, intermediate_size=26, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, rms_norm_eps=1e-3, tie_word_embeddings=True,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        vocab_size=41, hidden_size=12, intermediate_size=26, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, num_local_experts=3, num_experts_per_tok=2,
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, alibi=True, bias=True
    ),
}  # fmt: skip


def save_random(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Save a model whose every tensor is random, gains and biases too; return its tensors by on-disk name."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.1, std=0.5)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def true_logits(model: Any) -> torch.Tensor:
    with true_float64(), torch.no_grad():
        return model(input_ids=TOKENS).logits


def plain_double_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return stock_model(folder, attn_implementation="eager")[0].double()(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_models_build_and_run_without_one_narrow_number(family: str, tmp_path: Path) -> None:
    tensors = save_random(CONFIGS[family](), tmp_path)
    from_folder = build64(tmp_path)
    from_memory = build64_from(json.loads((tmp_path / "config.json").read_text()), tensors)
    with true_float64() as check, torch.no_grad():
        # Padding and a cache, for masks and caches are made in the forward pass.
        first = from_folder(input_ids=TOKENS, attention_mask=PADDED, use_cache=True)
        second = from_memory(input_ids=TOKENS, attention_mask=PADDED, use_cache=True)
        following = from_folder(input_ids=TOKENS[:, :1], past_key_values=first.past_key_values, use_cache=True)
        assert not check.leaks
    assert first.logits.dtype == following.logits.dtype == torch.float64
    assert torch.equal(first.logits, second.logits)
    named = [*from_folder.named_parameters(), *from_folder.named_buffers()]
    assert {x.dtype for _, x in named if x.is_floating_point()} == {torch.float64}
    assert not from_folder.training


@pytest.mark.parametrize("family", CONFIGS)
def test_the_counter_sees_what_the_function_mode_would_have_caught(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(CONFIGS[family](), tmp_path)
    model = build64(tmp_path)
    monkeypatch.setattr("growformer.proof.float64._is_narrow", lambda dtype: False)  # nothing is widened or counted
    with true_float64(strict=False) as blind, torch.no_grad():
        model(input_ids=TOKENS)
    assert not blind.leaks
    monkeypatch.undo()
    monkeypatch.setattr("growformer.proof.float64._widen", lambda value: value)
    monkeypatch.setattr("growformer.proof.float64._CASTS", {})
    with true_float64(strict=False) as check, torch.no_grad():
        model(input_ids=TOKENS)
    # GPT-2's eager path casts nowhere; every other family does.
    assert bool(check.leaks) == (family != "gpt2")


def test_rotary_tables_are_float64_when_built_and_float32_in_a_doubled_model(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"](), tmp_path)
    exact = torch.tensor([700.0 ** (-2 * j / 4) for j in range(2)], dtype=torch.float64)
    built, doubled = build64(tmp_path), stock_model(tmp_path)[0].double()
    assert relative(exact, built.model.rotary_emb.inv_freq) <= BAR
    assert relative(exact, doubled.model.rotary_emb.inv_freq) > 1e3 * BAR
    half_done = stock_model(tmp_path, attn_implementation="eager")[0]
    for parameter in half_done.parameters():
        parameter.data = parameter.data.double()
    with torch.no_grad(), pytest.raises(UncheckedError, match="narrower"), true_float64():
        half_done(input_ids=TOKENS)


def grow_llama(
    source: dict[str, torch.Tensor], config: dict[str, Any], hidden: int, head_dim: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Grow hidden and head_dim of a Llama by hand: writers of hidden zero, the rest of the new entries random."""
    old, old_d = config["hidden_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(3)
    # A rotary pair is (j, j + d/2), so old pairs keep their place in each half, and theta keeps their frequencies.
    pairs = torch.cat([torch.arange(old_d // 2), torch.arange(old_d // 2) + head_dim // 2])

    def free(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    def spread(x: torch.Tensor, new_is_zero: bool, places: torch.Tensor) -> torch.Tensor:
        """Rows (heads d) to rows (heads d')."""
        per_head = x.unflatten(0, (-1, old_d))
        grown = free(len(per_head), head_dim, *x.shape[1:]) * (not new_is_zero)
        grown[:, places] = per_head
        return grown.flatten(0, 1)

    grown = {}
    for name, x in source.items():
        x = x.double()
        if x.dim() == 1 and "norm" in name:
            x = torch.cat([x * math.sqrt(old / hidden), free(hidden - old)])
        elif "embed" in name:
            x = torch.cat([x, torch.zeros(len(x), hidden - old, dtype=torch.float64)], 1)
        elif "o_proj.weight" in name:
            x = spread(x.T, True, torch.arange(old_d)).T
        elif "q_proj" in name:
            x = spread(x, False, pairs)
        elif "k_proj" in name:
            x = spread(x * math.sqrt(head_dim / old_d), True, pairs)
        elif "v_proj" in name:
            x = spread(x, False, torch.arange(old_d))
        if "o_proj" in name or "down_proj" in name:
            x = torch.cat([x, torch.zeros(hidden - old, *x.shape[1:], dtype=torch.float64)])
        elif x.dim() == 2 and "embed" not in name:
            x = torch.cat([x, free(len(x), hidden - old)], 1)
        grown[name] = x.contiguous()
    theta = config["rope_parameters"]["rope_theta"] ** (head_dim / old_d)
    changes = {
        "hidden_size": hidden,
        "head_dim": head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * old / hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "dtype": "float64",
    }
    return grown, {**config, **changes}


def grown_pair(tmp_path: Path, **broken: Any) -> tuple[Path, Path]:
    src, out = tmp_path / "src", tmp_path / "out"
    source = save_random(CONFIGS["llama"](), src, torch.float64)
    grown, config = grow_llama(source, json.loads((src / "config.json").read_text()), hidden=18, head_dim=10)
    out.mkdir()
    save_file(grown, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, **broken}))
    return src, out


def test_a_grown_llama_is_equal_in_true_float64_but_not_in_plain_double(tmp_path: Path) -> None:
    src, out = grown_pair(tmp_path)
    assert relative(true_logits(build64(src)), true_logits(build64(out))) <= BAR
    # The same two folders, in the float64 that .double() gives.
    assert 1e4 * BAR < relative(plain_double_logits(src), plain_double_logits(out)) < 1e-5


@pytest.mark.parametrize(
    "broken",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        # What a float32 table would do.
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0**2.5 * (1 + 1e-7)}},
    ],
    ids=["eps left out", "theta left out", "theta off by one float32 rounding"],
)
def test_a_growth_that_leaves_something_out_is_seen(tmp_path: Path, broken: dict[str, Any]) -> None:
    src, out = grown_pair(tmp_path, **broken)
    assert relative(true_logits(build64(src)), true_logits(build64(out))) > 1e3 * BAR


X = torch.linspace(-1, 1, 6, dtype=torch.float64)
NARROW = X.float()
F = torch.nn.functional

CASTS: dict[str, Callable[[], torch.Tensor]] = {
    "float": lambda: X.float(),
    "half": lambda: X.half(),
    "bfloat16": lambda: X.bfloat16(),
    "cfloat": lambda: X.cfloat(),  # type: ignore[attr-defined]
    "to dtype": lambda: X.to(torch.float32),
    "to dtype=": lambda: X.to(dtype=torch.bfloat16),
    "to device, dtype": lambda: X.to("cpu", torch.float16),
    "to device, dtype, flags": lambda: X.to("cpu", torch.float32, False, copy=True),
    "to other": lambda: X.to(NARROW),
    "to tensor=": lambda: X.to(tensor=NARROW),  # type: ignore[call-overload]
    "type_as": lambda: X.type_as(NARROW),
    "type_as other=": lambda: X.type_as(other=NARROW),
    "type dtype": lambda: X.type(torch.float32),
    "type name": lambda: X.type("torch.FloatTensor"),
    "type class": lambda: X.type(torch.HalfTensor),  # type: ignore[call-overload]
    "fp8": lambda: X.to(torch.float8_e4m3fn),
    "complex64": lambda: X.to(torch.complex64),
    "arange": lambda: torch.arange(5, dtype=torch.float),
    "arange default": lambda: torch.arange(5.0),
    "zeros": lambda: torch.zeros(3, dtype=torch.float32),
    "ones": lambda: torch.ones(3, dtype=torch.bfloat16),
    "full": lambda: torch.full((2,), 0.1, dtype=torch.float16),
    "tensor": lambda: torch.tensor([0.1], dtype=torch.float32),
    "tensor default": lambda: torch.tensor(0.1),
    "as_tensor": lambda: torch.as_tensor([0.1], dtype=torch.float32),
    "linspace": lambda: torch.linspace(0, 1, 5, dtype=torch.float32),
    "empty_like": lambda: torch.zeros_like(X, dtype=torch.float32),
    "new_zeros": lambda: X.new_zeros(2, dtype=torch.float32),
    "new_tensor": lambda: X.new_tensor([1.0], dtype=torch.float32),
    "sum": lambda: X.sum(dtype=torch.float32),
    "mean": lambda: torch.mean(X, dim=0, dtype=torch.float32),
    "cumsum": lambda: X.cumsum(0, dtype=torch.float32),
    "softmax": lambda: torch.softmax(X, -1, torch.float32),
    "F.softmax": lambda: F.softmax(X, dim=-1, dtype=torch.float32),
    "F.log_softmax": lambda: F.log_softmax(X, dim=-1, dtype=torch.float32),
    "module": lambda: torch.nn.Linear(2, 3, dtype=torch.float64).to(torch.float32).weight,
    "randn": lambda: torch.randn(3),
}


@pytest.mark.parametrize("cast", CASTS)
def test_every_way_to_narrow_a_tensor_is_widened(cast: str) -> None:
    outside = CASTS[cast]().dtype
    assert outside.itemsize < (16 if outside.is_complex else 8), "the case does not narrow, so it would test nothing"
    with true_float64():
        assert CASTS[cast]().dtype == (torch.complex128 if outside.is_complex else torch.float64)


def test_autocast_is_off_and_one_that_is_turned_on_is_seen() -> None:
    a = torch.eye(3, dtype=torch.float64)
    narrow = torch.eye(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (narrow @ narrow).dtype == torch.bfloat16
        with true_float64():
            # Models ask this to choose a dtype of their own.
            assert not torch.is_autocast_enabled("cpu")
            assert (a @ a).dtype == torch.float64
    with true_float64(strict=False) as check, torch.autocast("cpu", torch.bfloat16):
        narrow @ narrow
    assert check.leaks["aten.mm.default"] == 1


def test_a_narrow_input_counts_although_the_result_is_wide() -> None:
    with pytest.raises(UncheckedError, match=r"aten\.mul\.Tensor \(2x\)"), true_float64() as check:
        for _ in range(2):
            assert (X * NARROW).dtype == torch.float64
        assert check.leaks == {"aten.mul.Tensor": 2}


def test_reinterpreted_bytes_keep_their_values_and_are_reported() -> None:
    with true_float64(strict=False) as check:
        ones = torch.tensor([0x3F800000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert ones.tolist() == [1.0, 1.0]
    assert check.leaks


def test_a_float32_model_is_reported_rather_than_a_clash_of_dtypes() -> None:
    layer = torch.nn.Linear(6, 2)
    with pytest.raises(UncheckedError, match=r"aten\.t\.default"), true_float64():
        layer(X)
    with pytest.raises(RuntimeError, match="dtype"), true_float64(strict=False):
        layer(X)
    with pytest.raises(RuntimeError, match="shape"), true_float64():
        X @ torch.eye(3, dtype=torch.float64)


def test_the_context_restores_the_default_dtype_and_hides_no_other_error() -> None:
    with pytest.raises(KeyError), true_float64():
        NARROW * 2
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"](), tmp_path)
    change_tensors(tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.bias"))
    with pytest.raises(UncheckedError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.bias \(1 in all\)"):
        build64(tmp_path)
    save_random(CONFIGS["llama"](), tmp_path)
    change_tensors(tmp_path, lambda t: t.update(extra=torch.ones(2)))
    with pytest.raises(UncheckedError, match="unexpected_keys: extra"):
        build64(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = save_random(CONFIGS["llama"](), tmp_path)
    tensors["model.norm.weight"] = torch.ones(13)
    with pytest.raises(SourceError, match="cannot be loaded"):
        build64_from(json.loads((tmp_path / "config.json").read_text()), tensors)


def test_folders_that_are_no_stock_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No stock model config"):
        build64(tmp_path)
    with pytest.raises(SourceError, match="No stock model config"):
        stock_config({"model_type": "no_such_model"})
    save_random(CONFIGS["llama"](), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be loaded"):
        build64(tmp_path)


def test_a_config_in_memory_reads_as_the_same_config_on_disk(tmp_path: Path) -> None:
    """Old spellings too: a theta outside rope_parameters, torch_dtype for dtype."""
    old = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 3, "rope_theta": 700.0,
           "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    on_disk = stock_config(tmp_path).to_dict()
    assert stock_config(old).to_dict() == {**on_disk, "_name_or_path": ""}
    assert stock_config(old).rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}


def test_a_quantised_checkpoint_cannot_be_checked(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UncheckedError, match="quantised"):
        build64(tmp_path)


def test_a_table_that_stays_narrow_when_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow_table(*args: Any, **options: Any) -> Any:
        model, report = stock_model(*args, **options)
        # Past the counter: not by an operation, as a table from other code would come.
        model.model.rotary_emb._buffers["inv_freq"] = NARROW
        return model, report

    save_random(CONFIGS["llama"](), tmp_path)
    monkeypatch.setattr("growformer.proof.float64.stock_model", narrow_table)
    with pytest.raises(UncheckedError, match=r"not in float64: model\.rotary_emb\.inv_freq \(1 in all\)"):
        build64(tmp_path)


def test_a_model_in_memory_does_not_share_the_tensors_it_came_from(tmp_path: Path) -> None:
    tensors = save_random(CONFIGS["llama"](), tmp_path, torch.float64)
    before = tensors["model.norm.weight"].clone()
    model = build64_from(json.loads((tmp_path / "config.json").read_text()), tensors)
    model.model.norm.weight.data.zero_()
    assert torch.equal(tensors["model.norm.weight"], before)


def test_the_head_that_config_json_names_is_the_one_that_is_built(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=26
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = build64(tmp_path)
    assert type(model).__name__ == "BertForMaskedLM"
    assert true_logits(model).dtype == torch.float64
