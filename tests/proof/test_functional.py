"""Comparisons of logits: what each number means, what fails, and that a fresh process says the same."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from growformer.errors import ChangedError, UncheckedError
from growformer.proof import functional as f
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64, build64_from, stock_model, true_float64
from growformer.proof.probe import probe_tokens
from growformer.proof.worker import answer

MLP, NEW_MLP = 26, 40
TOKENS = torch.tensor([[5, 17, 2, 40, 33, 8, 21], [1, 39, 39, 0, 12, 30, 7]])
Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: x.contiguous() for k, x in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, dict[str, Any]]:
    """A random float32 Llama: folder, tensors, config.json."""
    folder = tmp_path_factory.mktemp("source")
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=12, intermediate_size=MLP, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.1, std=0.5)
    model.save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def grow_mlp(tensors: Tensors, closed: float = 0.0) -> Tensors:
    """New gate and up rows random, new down columns `closed`."""
    generator = torch.Generator().manual_seed(5)
    grown = dict(tensors)
    for name, x in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            grown[name] = torch.cat([x, torch.randn(NEW_MLP - MLP, x.shape[1], generator=generator)])
        elif "down_proj" in name:
            grown[name] = torch.cat([x, torch.full((len(x), NEW_MLP - MLP), closed)], 1)
    return grown


def permuted_mlp(tensors: Tensors, draws: int) -> Iterator[Tensors]:
    generator = torch.Generator().manual_seed(6)
    for _ in range(draws):
        order = torch.randperm(MLP, generator=generator)
        draw = dict(tensors)
        for name, x in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                draw[name] = x[order]
            elif "down_proj" in name:
                draw[name] = x[:, order]
        yield draw


def scaled(tensors: Tensors, name: str, factor: float) -> Tensors:
    return {**tensors, name: tensors[name] * factor}


GATE = "model.layers.1.mlp.gate_proj.weight"


# --- compare_logits and require


def test_each_number_of_a_difference_is_what_it_says() -> None:
    a = torch.tensor([[[0.0, 2.0, -4.0], [1.0, 0.0, 0.0]]])
    b = a + torch.tensor([[[0.0, -3.0, 0.0], [0.5, 0.0, 0.0]]])
    found = f.compare_logits(a, b)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert found.max_abs == 3 and found.relative == 3 / 4
    assert found.rms == pytest.approx(math.sqrt((9 + 0.25) / 6), rel=1e-15)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-12)
    assert found.top1_agree == 0.5
    assert (found.new_logits, found.greedy) == (0, None)


def test_the_differences_do_not_depend_on_how_rows_are_cut() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(3, 700, 5, generator=generator)
    b = a + torch.randn(3, 700, 5, generator=generator)
    found = f.compare_logits(a, b)
    x, y = a.double(), b.double()
    assert found.max_abs == float((x - y).abs().max())
    assert found.rms == pytest.approx(float((x - y).square().mean().sqrt()), rel=1e-12)
    assert found.top1_agree == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).double().mean()), rel=1e-12)


def test_halved_logits_keep_their_greedy_text_and_fail() -> None:
    a = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    found = f.compare_logits(a, a / 2)
    assert found.top1_agree == 1 and found.relative == 0.5 and found.kl > 0
    with pytest.raises(ChangedError, match=r"algebra: relative difference 0\.5 .* at most 1e-12 is allowed"):
        f.require(found, BAR, "algebra")
    f.require(f.compare_logits(a, a), BAR, "algebra")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2000])
def test_a_number_that_is_not_finite_never_passes(bad: float, row: int) -> None:
    a = torch.randn(2001, 5, generator=torch.Generator().manual_seed(1))
    b = a.clone()
    b[row, 2] = bad
    found = f.compare_logits(a, b)
    assert found.relative == math.inf
    with pytest.raises(ChangedError):
        f.require(found, BAR, "algebra")
    with pytest.raises(ChangedError):
        f.require(dataclasses.replace(found, relative=math.nan), BAR, "algebra")
    if bad != -math.inf:  # a masked logit of the source is no error
        with pytest.raises(UncheckedError, match="not finite"):
            f.compare_logits(b, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masked_logits_do_not_hide_a_change(dtype: torch.dtype) -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]], dtype=dtype)
    a[:, 1] = torch.finfo(dtype).min
    b = a.clone()
    b[0, 0] = 2.0
    assert f.compare_logits(a, b).relative == 0.25
    b[0, 1] = 0.0
    assert f.compare_logits(a, b).relative == math.inf


def test_comparisons_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UncheckedError, match=r"\[2, 3\] and \[2, 4\]"):
        f.compare_logits(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(UncheckedError, match="all zero"):
        f.compare_logits(torch.zeros(2, 3), torch.zeros(2, 3))


# --- models


def test_logits_do_not_depend_on_the_batch_and_need_no_float64(source: Any) -> None:
    model = build64(source[0])
    with true_float64():
        whole = f.outputs(model, TOKENS)["logits"]
        assert whole.shape == (2, 7, 41) and whole.dtype == torch.float64
        other = f.outputs(model, {"input_ids": TOKENS}, batch=1)["logits"]
        assert f.compare_logits(whole, other).relative <= BAR


def test_functional_passes_a_growth_and_fails_an_open_block(source: Any, tmp_path: Path) -> None:
    src, tensors, config = source
    wider = {**config, "intermediate_size": NEW_MLP}
    good = f.functional(src, save(tmp_path / "good", grow_mlp(tensors), wider), TOKENS)
    assert good.relative <= BAR and good.top1_agree == 1
    bad = f.functional(src, lambda: build64_from(wider, grow_mlp(tensors, closed=1e-6)), TOKENS)
    with pytest.raises(ChangedError, match="stored"):
        f.require(bad, BAR, "stored")


def test_a_grown_vocabulary_is_compared_on_the_old_logits_and_says_so(source: Any) -> None:
    src, tensors, config = source
    grown = {k: torch.cat([x, x[:3] * 2]) if x.shape[0] == 41 else x for k, x in tensors.items()}
    found = f.functional(src, lambda: build64_from({**config, "vocab_size": 44}, grown), TOKENS)
    assert found.relative <= BAR and found.new_logits == 3
    with pytest.raises(UncheckedError, match="cannot be compared"):
        f.functional(lambda: build64_from({**config, "vocab_size": 44}, grown), src, TOKENS)


def test_runtime_passes_a_growth_and_fails_a_change_above_the_floor(source: Any, tmp_path: Path) -> None:
    src, tensors, config = source
    rounded = scaled(tensors, GATE, math.sqrt(1.5))
    rounded[GATE] = rounded[GATE] / math.sqrt(1.5)
    assert not torch.equal(rounded[GATE], tensors[GATE]), "rounding changed nothing, so b would measure nothing"
    floor = f.noise(src, TOKENS, permuted_mlp(tensors, 4), rounded)["logits"]
    assert floor.a > 0 and floor.b > 0 and floor.floor == f.combine(floor.a, floor.b)
    # The floor is noise: far above float64's, far below any logit.
    assert BAR < floor.floor < 1e-3

    wider = {**config, "intermediate_size": NEW_MLP}
    grown = f.judged(f.runtime(src, save(tmp_path / "good", grow_mlp(tensors), wider), TOKENS, floor))
    assert grown.passed and grown.ratio <= f.FLOOR_MULTIPLE
    bad = save(tmp_path / "bad", scaled(tensors, GATE, 1 + 1e-4), config)
    changed = f.judged(f.runtime(src, bad, TOKENS, {"logits": floor}))
    assert not changed.passed and changed.ratio > 10

    silent = f.NoiseFloor(0.0, 0.0, 0.0)
    assert f.judged(f.runtime(src, src, TOKENS, silent)).ratio == 0
    assert dataclasses.replace(changed, floor=silent).ratio == math.inf
    broken = dataclasses.replace(grown, difference=dataclasses.replace(grown.difference, relative=math.inf))
    assert not broken.passed
    assert f.judged({"a": grown, "b": broken, "c": changed}) in (broken, changed)
    assert f.judged({"a": dataclasses.replace(changed, floor=f.NoiseFloor(1.0, 1.0, 1.0)), "b": broken}) is broken


def test_a_is_the_root_mean_square_over_the_draws(source: Any) -> None:
    src, tensors, _ = source
    draws = list(permuted_mlp(tensors, 3))
    each = [f.noise(src, TOKENS, [draw], tensors)["logits"].a for draw in draws]
    together = f.noise(src, TOKENS, iter(draws), tensors)["logits"]
    assert together.a == pytest.approx(math.sqrt(sum(x * x for x in each) / 3), rel=1e-12)
    assert together.b == 0 and len(set(each)) > 1


def test_a_floor_without_draws_or_with_a_tensor_left_out_is_refused(source: Any) -> None:
    src, tensors, _ = source
    with pytest.raises(UncheckedError, match="at least one"):
        f.noise(src, TOKENS, [], tensors)
    with pytest.raises(UncheckedError, match=r"model\.norm\.weight"):
        f.noise(src, TOKENS, [{k: x for k, x in tensors.items() if k != "model.norm.weight"}], tensors)


def test_the_storage_dtype_is_the_one_that_runs(source: Any, tmp_path: Path) -> None:
    _, tensors, config = source
    half = {name: x.bfloat16() for name, x in tensors.items()}
    folder = save(tmp_path / "half", half, {**config, "dtype": "bfloat16"})
    assert f.load_report(folder)["dtype"] == "torch.bfloat16"
    # A change below bfloat16's rounding is gone when the model runs, and one of a whole step is not.
    unseen = f.noise(folder, TOKENS, [half], {**half, GATE: half[GATE].float() * (1 + 1e-4)})
    assert unseen == {"logits": f.NoiseFloor(0.0, 0.0, 0.0)}
    assert f.noise(folder, TOKENS, [half], {**half, GATE: half[GATE].float() * (1 + 2**-6)})["logits"].b > 0


def test_load_report_and_greedy(source: Any, tmp_path: Path) -> None:
    src, tensors, config = source
    report = f.load_report(src)
    assert report["missing_keys"] == report["unexpected_keys"] == [] and report["tied"] is False
    assert report["parameters"] == sum(x.numel() for x in tensors.values())

    tied = {k: x for k, x in tensors.items() if k not in ("lm_head.weight", "model.norm.weight")}
    folder = save(tmp_path / "tied", {**tied, "stray": torch.ones(1)}, {**config, "tie_word_embeddings": True})
    report = f.load_report(folder)
    assert report["missing_keys"] == ["model.norm.weight"] and report["unexpected_keys"] == ["stray"]
    assert report["tied"] is True

    ids = [3, 1, 4]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(f.outputs(stock_model(src)[0], torch.tensor([ids]))["logits"][0, -1].argmax()))
    assert f.greedy(src, [3, 1, 4], 4) == ids[3:]


def test_encoder_decoder_and_other_inputs(tmp_path: Path) -> None:
    t5 = transformers.T5Config(vocab_size=41, d_model=12, d_kv=4, d_ff=26, num_layers=2, num_heads=3)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert f.functional(tmp_path / "t5", tmp_path / "t5", TOKENS).relative == 0
    vit = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=26, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(vit)
    model.classifier.bias.data.normal_()
    model.save_pretrained(tmp_path / "vit")
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    assert f.functional(tmp_path / "vit", tmp_path / "vit", pixels).relative == 0
    with pytest.raises(UncheckedError, match="without a vocabulary"):
        probe_tokens(tmp_path / "vit", 2, 4, 0)


# --- the worker


def test_the_worker_answers_as_the_functions_do(source: Any, tmp_path: Path) -> None:
    src, tensors, config = source
    out = save(tmp_path / "out", scaled(tensors, GATE, 1.5), config)
    pair = {"src": str(src), "out": str(out), "tokens": TOKENS.tolist()}
    assert answer({"command": "functional", **pair}) == dataclasses.asdict(f.functional(src, out, TOKENS))
    floor = f.NoiseFloor(3e-8, 4e-8, 5e-8)
    found = answer({"command": "runtime", **pair, "floor": dataclasses.asdict(floor)})
    assert found["passed"] is False and found["ratio"] == f.judged(f.runtime(src, out, TOKENS, floor)).ratio
    assert answer({"command": "greedy", "folder": str(src), "prompt": [3, 1], "n": 3}) == {
        "ids": f.greedy(src, [3, 1], 3)
    }
    with pytest.raises(UncheckedError, match="functional lacks arguments"):
        answer({"command": "functional"})


def test_a_fresh_process_finds_the_same_difference(source: Any, tmp_path: Path) -> None:
    src, tensors, config = source
    out = save(tmp_path / "out", scaled(tensors, GATE, 1.5), config)
    found = f.Difference(**f.fresh_process("functional", src=src, out=out, tokens=TOKENS))
    here = f.functional(src, out, TOKENS)
    assert found.relative == pytest.approx(here.relative, rel=1e-9) and found.relative > BAR


def test_an_error_in_a_fresh_process_and_its_death_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UncheckedError, match=r"The worker knows functional, .* asked: .*'nothing'"):
        f.fresh_process("nothing")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UncheckedError, match=r"died \(code 1\)"):
        f.fresh_process("load_report", folder=Path())


# --- probe


def tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: every byte is a token, 256 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level).save_pretrained(folder)


def config_only(folder: Path, **fields: Any) -> Path:
    transformers.LlamaConfig(hidden_size=12, num_attention_heads=3, **fields).save_pretrained(folder)
    return folder


def test_a_probe_is_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    config_only(tmp_path, vocab_size=256)
    tokenizer(tmp_path)
    probe = probe_tokens(tmp_path, 3, 50, seed=1)
    assert probe.kind == "text" and probe.reason == "" and probe.tokens.shape == (3, 50)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = (Path(f.__file__).parent / "probe.txt").read_text(encoding="utf-8")
    ids = words(text, add_special_tokens=False)["input_ids"] * 2
    joined = ",".join(map(str, ids))
    assert all(",".join(map(str, row)) in joined for row in probe.tokens.tolist())
    assert torch.equal(probe.tokens, probe_tokens(tmp_path, 3, 50, seed=1).tokens)
    assert not torch.equal(probe.tokens, probe_tokens(tmp_path, 3, 50, seed=2).tokens)
    # Longer than the text: it starts over.
    assert probe_tokens(tmp_path, 1, 5000, seed=1).tokens.shape == (1, 2048)
    assert probe_tokens(config_only(tmp_path, vocab_size=256, max_position_embeddings=9000), 1, 8000, 1).kind == "text"


def test_ids_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    tokenizer(config_only(tmp_path, vocab_size=80, max_position_embeddings=30))
    probe = probe_tokens(tmp_path, 4, 64, seed=1)
    assert probe.kind == "text" and probe.tokens.shape == (4, 30) and int(probe.tokens.max()) < 80


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: None, "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be used"),
        (lambda folder: tokenizer(config_only(folder, vocab_size=1)), "one id"),
    ],
    ids=["none", "damaged", "useless"],
)
def test_without_a_usable_tokenizer_a_probe_is_random(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    config_only(tmp_path, vocab_size=41)
    spoil(tmp_path)
    probe = probe_tokens(tmp_path, 2, 20, seed=4)
    assert probe.kind == "random" and reason in probe.reason
    assert probe.tokens.shape == (2, 20) and 0 <= int(probe.tokens.min()) <= int(probe.tokens.max()) < 41
    assert torch.equal(probe.tokens, probe_tokens(tmp_path, 2, 20, seed=4).tokens)


def test_the_real_checkpoint_is_probed_with_text_and_tells_its_story(stories: Path) -> None:
    probe = probe_tokens(stories, 2, 32, seed=0)
    assert probe.kind == "text" and int(probe.tokens.max()) < 512
    assert f.load_report(stories)["tied"] is True
    words = transformers.AutoTokenizer.from_pretrained(stories)
    assert words.decode(f.greedy(stories, [1], 24)).strip().startswith("Once upon a time, there was a little girl")
