"""Cache, left padding, windows and positions: before and after growth, and each check sees its own path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer.errors import UncheckedError
from growformer.proof import decoding
from growformer.proof.bar import BAR
from growformer.proof.decoding import decoding_differences
from growformer.proof.float64 import build64, true_float64
from tests.proof.every_model import save

MISTRAL = "transformers.models.mistral.modeling_mistral"
PATHS = ["key-value cache", "left padding", "position_ids"]


def grown(src: Path, out: Path, closed: float = 0.0) -> Path:
    """Five more MLP channels in every layer, their way out `closed`."""
    shutil.copytree(src, out)
    tensors = load_file(src / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, x in tensors.items():
        if "gate_proj.weight" in name or "up_proj.weight" in name:
            tensors[name] = torch.cat([x, torch.randn(5, x.shape[1], generator=generator)])
        elif "gate_proj.bias" in name or "up_proj.bias" in name:
            tensors[name] = torch.cat([x, torch.ones(5)])
        elif "down_proj.weight" in name:
            tensors[name] = torch.cat([x, torch.full((x.shape[0], 5), closed)], 1).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 5}))
    return out


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_growth_is_exact_on_every_path(name: str, tmp_path: Path) -> None:
    src = save(name, tmp_path / "src")
    found = decoding_differences(src, grown(src, tmp_path / "good"), length=14)
    assert list(found) == PATHS + (["sliding window"] if name != "llama" else [])
    assert all(difference.relative <= BAR for difference in found.values())
    found = decoding_differences(src, grown(src, tmp_path / "bad", closed=1e-5), length=14)
    assert all(difference.relative > BAR for difference in found.values())


def test_a_long_window_is_cut_in_both_models_and_the_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = save("mistral", tmp_path / "src", sliding_window=4096)
    out = grown(src, tmp_path / "out")
    (name,) = set(decoding_differences(src, out, length=14)) - set(PATHS)
    assert name == "sliding window (sliding_window cut to 8)"
    monkeypatch.setattr(decoding, "WINDOW", 6)
    assert "cut to 6" in list(decoding_differences(src, out, length=14))[-1]


def test_the_cached_path_gives_what_the_whole_sequence_gives(tmp_path: Path) -> None:
    """What the check runs is decoding: token by token it is the model's own function."""
    model = build64(save("mistral", tmp_path / "src"))
    tokens = torch.randint(3, 41, (2, 15), generator=torch.Generator().manual_seed(1))
    with true_float64(), torch.no_grad():
        whole = model(input_ids=tokens).logits
        cached = decoding.CHECKS["key-value cache"](model, tokens)
    assert cached is not None
    assert float((whole - cached["cached"]).abs().max() / whole.abs().max()) <= BAR


def _no_rope(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q, k


@pytest.mark.parametrize("check", ["sliding window", "position_ids", "left padding"])
def test_each_check_depends_on_what_it_is_about(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the window, the positions or the mask out of the way, the path gives something else."""
    model = build64(save("mistral", tmp_path / "src"))
    tokens = torch.randint(3, 41, (3, 20), generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        with true_float64(), torch.no_grad():
            found = decoding.CHECKS[check](model, tokens)
        assert found is not None
        return found["logits"]

    before = run()
    spoil: dict[str, Callable[[], object]] = {
        "sliding window": lambda: setattr(model.config, "sliding_window", 7),
        "position_ids": lambda: monkeypatch.setattr(f"{MISTRAL}.apply_rotary_pos_emb", _no_rope),
        "left padding": lambda: monkeypatch.setattr(
            f"{MISTRAL}.create_sliding_window_causal_mask", lambda **kwargs: None
        ),
    }
    spoil[check]()
    assert float((run() - before).abs().max()) > BAR


def test_an_encoder_and_a_path_that_only_one_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = save("bert", tmp_path / "bert")
    with pytest.raises(UncheckedError, match="causal language models only"):
        decoding_differences(bert, bert)
    windowed, whole = save("mistral", tmp_path / "a"), save("mistral", tmp_path / "b", sliding_window=None)
    with pytest.raises(UncheckedError, match="sliding window"):
        decoding_differences(windowed, whole, length=14)
